"""Columns of a prepared dataset that are computed apart from the rest, set by set.

`prepare` computes what a config reads of judge and reference. What another config reads beside that
is computed later into `columns/NAME` in the dataset's folder: a prepared dataset too, of ids and
the new columns alone, in the same rows. So nothing is computed twice, and no file that someone
reads is written again. What comes of other models than the one that training starts from is in such
sets always, and so are scorers; each is there under its own fingerprint.

A dataset and its sets serve whoever asks for the same or for less: fewer of the judge's layers,
fewer scorers, no verdict.

The components of a set are those of the dataset, with `of`, the dataset's fingerprint, `columns`,
what the set has of `shards.GROUPS`, and what the columns depend on beside that: `reference` of
another reference; `scorer` of a scorer; and `judge`, `source_layers` and `num_layers` of another
judge, or of one that the dataset knows nothing of.
"""

import dataclasses
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data.manifest import (
    METADATA,
    PLAN,
    PreparedMismatch,
    canonical,
    check_components,
    differences,
    fingerprint,
    groups,
    identity,
    read,
    with_groups,
)
from attnpo_jax.data.pair import SIDES
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.shards import GROUPS
from attnpo_jax.runtime.errors import UserError

FOLDER = "columns"

_REFERENCE = ("reference_logps", "reference_entropy")
_JUDGE = ("judge", "source_layers", "num_layers")
_ATTENTION = ("judge_chosen", "judge_rejected")
_WHOLE = ("judge_chosen_whole", "judge_rejected_whole")
_MORE = ("verdict", "whole_responses")  # what a judge may be asked for beside attention
_COMPUTED = {name for names in GROUPS.values() for name in names}
Part = tuple[pathlib.Path, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What a run reads of a split.

    Attributes:
      components: those of the dataset; of another judge, they know nothing.
      reads: of `shards.GROUPS`, without scorers.
      reference: what the reference is; None for the dataset's own model.
      judge: the components `judge`, `source_layers` and `num_layers` of another judge than the
        dataset's own model; None for that one.
      scorers: by name, what a scorer is.
    """

    components: Mapping[str, Any]
    reads: tuple[str, ...]
    reference: Mapping[str, Any] | None = None
    judge: Mapping[str, Any] | None = None
    scorers: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    @property
    def apart(self) -> tuple[str, ...]:
        """The groups that are in sets always."""
        judge = ("judge",) if self.judge is not None else ()
        return (*judge, *(_REFERENCE if self.reference is not None else ()))

    @property
    def source_layers(self) -> tuple[Any, ...]:
        """The judge's layers that are read."""
        return tuple((self.judge or self.components)["source_layers"])

    @property
    def verdict(self) -> bool:
        """Whether the judge's verdict is read."""
        return ((self.judge or self.components)["judge"] or {}).get("verdict", True)

    @property
    def whole_responses(self) -> bool:
        """Whether the judge's figures of whole responses are read."""
        return ((self.judge or self.components)["judge"] or {}).get("whole_responses", False)

    def identity(self, components: Mapping[str, Any]) -> dict[str, Any]:
        """What the rows that are read depend on, as JSON: whatever else there is on disk.

        Args:
          components: the dataset's.
        """
        found = {**identity(self.components), "data": components["data"]}
        if self.judge is not None and "judge" in self.reads:
            found |= self.judge
        if self.reference is not None and set(_REFERENCE) & set(self.reads):
            found["reference"] = dict(self.reference)
        if self.scorers:
            found["scorers"] = {name: dict(of) for name, of in self.scorers.items()}
        return canonical(found)


def parts(path: pathlib.Path, wanted: Wanted) -> list[Part]:
    """Folder and components of a dataset, and of the sets beside it that are read with it.

    What is on disk, or was begun, stays as it is; of what is lacking, the dataset gets all where
    there is none yet, and sets get it where there is.

    Args:
      path: the dataset's folder.
      wanted: what is read.

    Raises:
      PreparedMismatch: there is a dataset, which does not serve.
    """
    there = _on_disk(path)
    wanted = _with_judge_apart(there, wanted)
    if there is None:
        own = [g for g in GROUPS if g in wanted.reads and g not in wanted.apart]
        base = with_groups(wanted.components, own)
    elif found := uncovered(there, wanted.components, finished=(path / METADATA).is_file()):
        raise PreparedMismatch(path, found)
    else:
        base = dict(there)
    has = [group for group in groups(base) if group not in wanted.apart]
    lacking = [group for group in GROUPS if group in wanted.reads and group not in has]
    sets = [_judge_set(path, base, wanted.judge or {})] if "judge" in lacking else []
    of_reference = [group for group in lacking if group != "judge"]
    # One pass gives both, so that there may be a set of both or sets of one.
    other = {} if wanted.reference is None else {"reference": dict(wanted.reference)}
    for some in (_REFERENCE, *([group] for group in _REFERENCE)):
        candidate = _set(path, base, some, other)
        if _on_disk(candidate[0]) is not None and set(some) & set(of_reference):
            sets.append(candidate)
            of_reference = [group for group in of_reference if group not in some]
    if of_reference:
        sets.append(_set(path, base, of_reference, other))
    scorers = [_set(path, base, ("scorer",), {"scorer": dict(s)}) for s in wanted.scorers.values()]
    return [(path, base), *sets, *dict(scorers).items()]


def joined(dataset: Prepared, wanted: Wanted) -> "Joined":
    """A dataset with the sets that are read with it.

    Raises:
      FileNotFoundError: a set is not there, or not finished.
      PreparedMismatch: the dataset does not serve, or a set is of something else than its name
        says.
    """
    sets = []
    for folder, components in parts(dataset.path, wanted)[1:]:
        if not (folder / METADATA).is_file():
            what = ", ".join(name for group in components["columns"] for name in GROUPS[group])
            if "scorer" in components:
                named = [n for n, s in wanted.scorers.items() if dict(s) == components["scorer"]]
                what = f"columns of the scorer {', '.join(map(repr, named))}"
            raise FileNotFoundError(
                f"{dataset.path}: its {what}, which this config reads, are not prepared, or not "
                "to the end; run `attnpo prepare` with this config and workdir first, which "
                "computes them alone"
            )
        check_components(folder, components)
        sets.append(Prepared.open(folder))
    return Joined(dataset, sets, wanted)


def uncovered(
    there: Mapping[str, Any], wanted: Mapping[str, Any], *, finished: bool
) -> dict[str, tuple[Any, Any]]:
    """What keeps a dataset from serving who wants another: component -> (there, wanted).

    It serves where it is the same, but for more of the judge's layers, for a verdict or figures of
    whole responses that are not wanted, or, if it is finished, for a judge where none is.

    Args:
      there, wanted: components; of the pairs, `wanted` need not know the digest.
    """
    there, asked = identity(there), canonical(identity(wanted))
    if "digest" not in asked["data"]:
        there["data"] = {k: v for k, v in there["data"].items() if k != "digest"}
    plain = differences(there, asked)
    if asked["judge"] is None and finished:
        asked |= {name: there[name] for name in ("judge", "source_layers")}
    elif asked["judge"] and there["judge"] == asked["judge"] | _with_more(there["judge"]):
        asked["judge"] = there["judge"]
    if asked["judge"] and set(asked["source_layers"]) <= set(there["source_layers"]):
        asked["source_layers"] = there["source_layers"]
    return {name: plain.get(name, both) for name, both in differences(there, asked).items()}


def _with_more(judge: Mapping[str, Any] | None) -> dict[str, bool]:
    """What a judge was asked for beside attention."""
    return {name: True for name in _MORE if (judge or {}).get(name)}


def keeps_from_repair(there: Mapping[str, Any], wanted: Wanted) -> dict[str, tuple[Any, Any]]:
    """What keeps a run from computing shards that a finished dataset has lost: as `uncovered`."""
    return uncovered(there, _with_judge_apart(there, wanted).components, finished=False)


def _with_judge_apart(there: Mapping[str, Any] | None, wanted: Wanted) -> Wanted:
    """The judge goes to a set where it is to be added to a dataset that knows of none."""
    components = wanted.components
    if there is None or there["judge"] is not None or components["judge"] is None:
        return wanted
    judge = {name: components[name] for name in _JUDGE}
    without = {**components, "judge": None, "source_layers": []}
    return dataclasses.replace(wanted, components=without, judge=judge)


def _judge_set(path: pathlib.Path, base: Mapping[str, Any], judge: Mapping[str, Any]) -> Part:
    """The set with a judge's columns: one that is finished and serves, or else its own."""
    asked = _set(path, base, ("judge",), judge)
    for folder in sorted((path / FOLDER).glob("judge-*")):
        found = read(folder / METADATA)
        if found is not None and not uncovered(found["components"], asked[1], finished=True):
            return folder, found["components"]
    return asked


def _set(
    path: pathlib.Path, base: Mapping[str, Any], some: Collection[str], other: Mapping[str, Any]
) -> Part:
    of = {"of": fingerprint(base), "columns": list(some)}
    components = canonical({**identity(base), **other, **of})
    return path / FOLDER / f"{'-and-'.join(some)}-{fingerprint(components)[:12]}", components


def _on_disk(path: pathlib.Path) -> Mapping[str, Any] | None:
    for file in (METADATA, PLAN):
        found = read(path / file)
        if found is not None:
            return found["components"]
    return None


class Joined(Prepared):
    """A prepared dataset with the sets beside it, of which it shows what is read alone.

    Rows have `scores_chosen` and `scores_rejected` too, float32 (scorers, T), where there are
    scorers.

    Args:
      dataset: the dataset.
      sets: opened sets of its columns; what they have takes the place of what it has.
      wanted: what is read; the dataset or a set has it.

    Raises:
      UserError: a set is of other rows.
    """

    def __init__(self, dataset: Prepared, sets: Sequence[Prepared], wanted: Wanted):
        vars(self).update(vars(dataset))
        self.groups = tuple(group for group in GROUPS if group in wanted.reads)
        self._dataset, self._wanted = dataset, wanted
        of_scorers = {
            fingerprint(one.meta["components"]["scorer"]): one
            for one in sets
            if "scorer" in one.groups
        }
        self._scorers = {name: of_scorers[fingerprint(of)] for name, of in wanted.scorers.items()}
        self._sets = [one for one in sets if "scorer" not in one.groups]
        # By column that is shown, the last of these that has it.
        self._places = {name: one for one in (dataset, *self._sets) for name in self._shown(one)}
        self._layers = None
        judged = self._places.get("judge_chosen", dataset)
        self._num_layers = judged.num_layers
        if "judge" in self.groups and judged.source_layers != wanted.source_layers:
            self._layers = [judged.source_layers.index(x) for x in wanted.source_layers]
        for one in sets:
            if not _same_rows(dataset, one):
                raise UserError(
                    f"{one.path}: its rows are not those of {dataset.path}; delete it and run "
                    "prepare again, which computes it anew"
                )

    def _shown(self, one: Prepared) -> list[str]:
        """The columns of a dataset or a set that are read."""
        names = [name for group in one.groups if group in self.groups for name in GROUPS[group]]
        hidden = () if self._wanted.verdict else ("judge_verdict",)
        hidden += () if self._wanted.whole_responses else _WHOLE
        return [name for name in names if name not in hidden]

    @property
    def identity(self) -> dict[str, Any]:
        return self._wanted.identity(self._meta["components"])

    @property
    def source_layers(self) -> tuple[Any, ...]:
        return self._wanted.source_layers if "judge" in self.groups else ()

    @property
    def num_layers(self) -> int:
        return self._num_layers

    @property
    def whole_responses(self) -> bool:
        return "judge" in self.groups and self._wanted.whole_responses

    @property
    def scorers(self) -> tuple[str, ...]:
        return tuple(self._scorers)

    def __getitem__(self, index: int) -> dict[str, Any]:
        whole = super().__getitem__(index)
        row = {name: value for name, value in whole.items() if name not in _COMPUTED}
        for one in dict.fromkeys(self._places.values()):
            found = whole if one is self._dataset else one[index]
            row |= {name: x for name, x in found.items() if self._places.get(name) is one}
        if self._layers is not None:
            kept = [name for name in (*_ATTENTION, *_WHOLE) if name in row]
            row |= {name: row[name][:, self._layers] for name in kept}
        if self._scorers:
            scored = [one[index] for one in self._scorers.values()]
            for side in SIDES:
                row[f"scores_{side}"] = np.stack([of[f"score_{side}"] for of in scored])
        return row


def _same_rows(dataset: Prepared, one: Prepared) -> bool:
    if dataset.ids() != one.ids():
        return False
    for side in SIDES:
        tokens, text = (dataset.length(f"{side}_{of}") for of in ("ids", "text_length"))
        lengths = {
            f"judge_{side}": text,
            f"ref_{side}_logps": tokens,
            f"ref_{side}_entropy": tokens,
            f"score_{side}": tokens,
        }
        there = [name for group in one.groups for name in GROUPS[group] if name in lengths]
        if any((one.length(name) != lengths[name]).any() for name in there):
            return False
    return True
