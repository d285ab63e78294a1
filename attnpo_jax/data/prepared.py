"""The prepared dataset on disk: what judge and reference say about every pair, computed once.

A folder that `datasets.load_from_disk` reads:

- `plan.json`, written first: the components that the rows depend on, and how rows fall into
  shards;
- `data-00000-of-00010.arrow`, ...: the shards, Arrow streams with the columns of the module
  `shards`. Each appears under its final name only when it is whole, so whatever has that name
  survives an interruption and is not computed again;
- `bad-00000-of-00010.jsonl`, ...: beside a shard, the planned rows that it lacks because they
  turned out bad, one JSON object each, with their `id`; no file where there are none;
- `state.json`, `dataset_info.json`: what `datasets` wants beside them;
- `prepared.json`, written last: its presence means that all shards were there. It holds
  `fingerprint` and the `components` behind it (model, template, lengths, judged layers ...),
  `num_rows`, `planned_rows` (bad ones included), `rows_per_shard`, `shards` (file, rows, bytes,
  sha256), `counts`, `versions` and `check`, a digest of all of that; `plan.json` has one too.

`components` is a JSON object. Some of its entries have a meaning here: `source_layers`, a list of
what attention is kept of (S of it, none without a judge: layers by number, heads and rollout by
name), `num_layers`, the model's number of layers, `weight_columns`, if there are any: the names of
the precomputed weights (K of them), and, if they are not those of the judge and of the reference's
log-probs, `columns`, of `shards.GROUPS`. What the latter leave out may be there in sets of columns,
see `column_sets`.
"""

import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from attnpo_jax.data import manifest, shards
from attnpo_jax.data.manifest import (
    METADATA,
    PLAN,
    check_components,
    features,
    file_digest,
    groups,
    identity,
    read,
)
from attnpo_jax.runtime.errors import UserError

STATUSES = ("absent", "partial", "complete")


class DamagedShard(UserError):
    """A shard of a complete dataset is missing or is not what was written."""

    def __init__(self, file: pathlib.Path, found: str, remedy: str):
        super().__init__(
            f"{file}: {found}; {remedy}run prepare again, which recomputes this shard only"
        )
        self.file = file


def status(path: str | os.PathLike, components: Mapping[str, Any]) -> str:
    """`absent`, `partial` (some shards or the metadata still to write) or `complete`.

    Shards are looked at by name and size; `Prepared.open` checks what is in them.
    """
    path = pathlib.Path(path)
    check_components(path, components)
    metadata = read(path / METADATA)
    if metadata is None:
        return "absent" if read(path / PLAN) is None else "partial"
    whole = all(
        (path / shard["file"]).is_file() and (path / shard["file"]).stat().st_size == shard["bytes"]
        for shard in metadata["shards"]
    )
    described = all((path / name).is_file() for name in ("state.json", "dataset_info.json"))
    return "complete" if whole and described else "partial"


class Prepared:
    """A complete prepared dataset, memory-mapped; random access to rows as numpy arrays.

    Made by `Prepared.open`. Arrays are read-only views of the mapped files.
    """

    def __init__(self, path: pathlib.Path, meta: dict[str, Any], tables: Sequence[pa.Table]):
        self.path = path
        self.groups = groups(meta["components"])  # of `shards.GROUPS`
        self._meta = meta
        self._shards = [shards.Shard(table) for table in tables]
        self._starts = np.cumsum([0, *(table.num_rows for table in tables)])

    @classmethod
    def open(cls, path: str | os.PathLike) -> "Prepared":
        """Open the dataset in folder `path` after checking every shard's checksum.

        Raises:
            FileNotFoundError: there is no complete dataset.
            DamagedShard: a shard is missing or its bytes have changed; the message says what to do.
        """
        path = pathlib.Path(path)
        meta = read(path / METADATA)
        if meta is None:
            raise FileNotFoundError(f"{path} has no {METADATA}: not prepared, or not to the end")
        expected = features(meta["components"])
        tables = []
        for shard in meta["shards"]:
            file = path / shard["file"]
            if not file.is_file():
                raise DamagedShard(file, "missing", "")
            found = file_digest(file)
            if found != shard["sha256"]:
                raise DamagedShard(
                    file,
                    f"damaged (sha256 {found[:12]}..., written {shard['sha256'][:12]}...)",
                    "delete this file and ",
                )
            try:
                table = shards.read_table(file)
                shards.check_table(table, expected, shard["rows"])
            except (pa.ArrowException, ValueError) as error:
                raise DamagedShard(
                    file, f"can't be used ({error})", f"delete it and {METADATA} and "
                ) from error
            tables.append(table)
        return cls(path, meta, tables)

    @property
    def meta(self) -> dict[str, Any]:
        """The content of `prepared.json`."""
        return self._meta

    @property
    def identity(self) -> dict[str, Any]:
        """What rows depend on, as JSON: the components, but for which columns there are."""
        return identity(self._meta["components"])

    @property
    def source_layers(self) -> tuple[int | str, ...]:
        """What the judge columns hold the attention of (S of it), in that order: layers by number,
        heads as "23:4", "rollout".
        """
        return tuple(self._meta["components"]["source_layers"]) if "judge" in self.groups else ()

    @property
    def weight_columns(self) -> tuple[str, ...]:
        """The names of the precomputed weights (K of them), in the order of the `ready` columns."""
        return tuple(self._meta["components"].get("weight_columns", ()))

    @property
    def scorers(self) -> tuple[str, ...]:
        """The names of the scorers whose columns there are."""
        return ()

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of all columns that weightings read by name: the scorers', then the data's."""
        return (*self.scorers, *self.weight_columns)

    @property
    def whole_responses(self) -> bool:
        """Whether the judge columns come with figures of whole responses (see `shards`)."""
        return "judge" in self.groups and manifest.whole_responses(self._meta["components"])

    @property
    def own_prompts(self) -> bool:
        """Whether responses may have prompts of their own."""
        return manifest.own_prompts(self._meta["components"])

    @property
    def num_layers(self) -> int:
        """Layers of the model that judged."""
        return self._meta["components"]["num_layers"]

    def __len__(self) -> int:
        return self._meta["num_rows"]

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`: id (str), text lengths (int), int32 ids, and, where the dataset has them,
        float32 log-probs, judge (2, S, T) and precomputed weights (K, T).
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)} in {self.path}")
        index = int(index) % len(self)
        shard = int(np.searchsorted(self._starts, index, side="right")) - 1
        return self._shards[shard].row(index - int(self._starts[shard]))

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (self[index] for index in range(len(self)))

    def lengths(self) -> dict[str, np.ndarray]:
        """Tokens by row: `prompt` (a second one of the pair's included), `chosen`, `rejected` ->
        int32 (rows,); reads offsets alone.
        """
        lengths = {name: self.length(f"{name}_ids") for name in ("prompt", "chosen", "rejected")}
        if self.own_prompts:
            lengths["prompt"] = lengths["prompt"] + self.length("rejected_prompt_ids")
        return lengths

    def length(self, column: str) -> np.ndarray:
        """Length of each row's last axis in a column, int32 (rows,)."""
        return np.concatenate([shard.lengths(column) for shard in self._shards])

    def ids(self) -> list[str]:
        """The rows' ids."""
        return [id for shard in self._shards for id in shard.ids()]
