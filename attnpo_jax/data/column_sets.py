"""Columns of a prepared dataset that were computed after the rest, set by set.

`prepare` computes what a config reads of judge and reference. What another config reads beside that
is computed later into `columns/NAME` in the dataset's folder: a prepared dataset too, of ids and
the new columns alone, in the same rows. So nothing is computed twice, and no file that someone
reads is written again. A reference other than the judged model has its columns in such sets always,
one a reference.

The components of a set are those of the dataset, with `of`, the dataset's fingerprint, `columns`,
what the set has of `shards.GROUPS`, and, where the reference is another model, `reference`.
"""

import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from attnpo_jax.data.manifest import (
    METADATA,
    PLAN,
    check_components,
    fingerprint,
    groups,
    identity,
    read,
    with_groups,
)
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.shards import GROUPS
from attnpo_jax.runtime.errors import UserError

FOLDER = "columns"

_REFERENCE = ("reference_logps", "reference_entropy")
Part = tuple[pathlib.Path, dict[str, Any]]


def layout(
    path: pathlib.Path,
    wanted: Mapping[str, Any],
    reads: Collection[str],
    reference: Mapping[str, Any] | None = None,
) -> list[list[str]]:
    """What is where: the groups of columns of a dataset, then those of each set beside it.

    What is on disk, or was begun, stays as it is; the rest goes to the dataset where there is none
    yet, and to a set where there is.

    Args:
      path: the dataset's folder.
      wanted: the dataset's components.
      reads: the groups that are read.
      reference: what the reference is; None for the dataset's own model.
    """
    others = _REFERENCE if reference is not None else ()
    there = _on_disk(path)
    base = [group for group in GROUPS if group in reads and group not in others]
    base = base if there is None else list(groups(there))
    lacking = [g for g in GROUPS if g in reads and (g not in base or g in others)]
    found_sets = [["judge"]] if "judge" in lacking else []
    of_reference = [group for group in lacking if group != "judge"]
    # One pass gives both, so that there may be a set of both or sets of one.
    for some in (_REFERENCE, *([group] for group in _REFERENCE)):
        folder, _ = _set(path, wanted, base, some, reference)
        begun = any((folder / file).is_file() for file in (METADATA, PLAN))
        if begun and set(some) & set(of_reference):
            found_sets.append(list(some))
            of_reference = [group for group in of_reference if group not in some]
    return [base, *found_sets, *([of_reference] if of_reference else [])]


def parts(
    path: pathlib.Path,
    wanted: Mapping[str, Any],
    layout: Sequence[Sequence[str]],
    reference: Mapping[str, Any] | None = None,
) -> list[Part]:
    """Folder and components of a dataset and of the sets beside it; arguments as of `layout`."""
    base, *others = layout
    of_sets = [_set(path, wanted, base, some, reference) for some in others]
    return [(path, with_groups(wanted, base)), *of_sets]


def joined(
    dataset: Prepared, reads: Collection[str], reference: Mapping[str, Any] | None = None
) -> "Joined":
    """A dataset with the sets that are read with it; arguments as of `layout`.

    Raises:
      FileNotFoundError: a set is not there, or not finished.
      PreparedMismatch: a set is of something else than its name says.
    """
    of = dataset.path, dataset.meta["components"]
    sets = []
    for folder, components in parts(*of, layout(*of, reads, reference), reference)[1:]:
        if not (folder / METADATA).is_file():
            columns = [name for group in components["columns"] for name in GROUPS[group]]
            raise FileNotFoundError(
                f"{dataset.path}: its {', '.join(columns)}, which this config reads, are not "
                "prepared, or not to the end; run `attnpo prepare` with this config and workdir "
                "first, which computes them alone"
            )
        check_components(folder, components)
        sets.append(Prepared.open(folder))
    return Joined(dataset, sets, reads, reference)


def _set(
    path: pathlib.Path,
    wanted: Mapping[str, Any],
    base: Sequence[str],
    some: Sequence[str],
    reference: Mapping[str, Any] | None,
) -> Part:
    of = _on_disk(path) or with_groups(wanted, base)
    components = {**identity(of), "of": fingerprint(of), "columns": list(some)}
    if reference is not None and "judge" not in some:
        components["reference"] = dict(reference)
    name = f"{'-and-'.join(some)}-{fingerprint(components)[:12]}"
    return path / FOLDER / name, components


def _on_disk(path: pathlib.Path) -> Mapping[str, Any] | None:
    for file in (METADATA, PLAN):
        found = read(path / file)
        if found is not None:
            return found["components"]
    return None


class Joined(Prepared):
    """A prepared dataset with the sets beside it, of which it shows some groups alone.

    Args:
      dataset: the dataset.
      sets: opened sets of its columns; what they have takes the place of what it has.
      shown: of `shards.GROUPS`, what rows are to have; the dataset or a set has it.
      reference: what the reference is; None for the dataset's own model.

    Raises:
      UserError: a set is of other rows.
    """

    def __init__(
        self,
        dataset: Prepared,
        sets: Sequence[Prepared],
        shown: Collection[str],
        reference: Mapping[str, Any] | None = None,
    ):
        vars(self).update(vars(dataset))
        self.groups = tuple(group for group in GROUPS if group in shown)
        self._sets, self._reference = tuple(sets), reference
        self._hidden = {name for g, names in GROUPS.items() if g not in shown for name in names}
        for one in sets:
            if not _same_rows(dataset, one):
                raise UserError(
                    f"{one.path}: its rows are not those of {dataset.path}; delete it and run "
                    "prepare again, which computes it anew"
                )

    @property
    def identity(self) -> dict[str, Any]:
        found = super().identity
        if self._reference is not None and set(_REFERENCE) & set(self.groups):
            found["reference"] = dict(self._reference)
        return found

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = super().__getitem__(index)
        for one in self._sets:
            row |= one[index]
        return {name: value for name, value in row.items() if name not in self._hidden}


def _same_rows(dataset: Prepared, one: Prepared) -> bool:
    if dataset.ids() != one.ids():
        return False
    for side in ("chosen", "rejected"):
        tokens, text = (dataset.length(f"{side}_{of}") for of in ("ids", "text_length"))
        lengths = {
            f"judge_{side}": text,
            f"ref_{side}_logps": tokens,
            f"ref_{side}_entropy": tokens,
        }
        there = [name for group in one.groups for name in GROUPS[group] if name in lengths]
        if any((one.length(name) != lengths[name]).any() for name in there):
            return False
    return True
