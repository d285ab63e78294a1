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

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from attnpo_jax.data import manifest, shards
from attnpo_jax.data.manifest import (
    FORMAT,
    METADATA,
    PLAN,
    canonical,
    check_components,
    features,
    file_digest,
    fingerprint,
    groups,
    identity,
    read,
    read_bad_rows,
    sealed,
    versions,
)
from attnpo_jax.runtime import atomic
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


class PreparedWriter:
    """Writes a prepared dataset shard by shard; picks up where an interrupted writer stopped.

    Every process makes a writer, writes the shards that its `pending` lists, and when all processes
    are through, process 0 calls `finish`. A finished dataset may be opened again: shards that were
    deleted since are pending.

    Args:
        num_rows: rows in the whole dataset, if none turns out bad.
        rows_per_shard: rows in every shard but the last, likewise. A plan on disk overrules it, so
            that the shards that are there keep their place.
        ids: the ids of all rows in order; shards on disk with other ids are then computed again.
        process_index, process_count: this process writes shards `index % process_count ==
            process_index`.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        components: Mapping[str, Any],
        num_rows: int,
        rows_per_shard: int,
        *,
        ids: Sequence[str] | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if num_rows < 1 or rows_per_shard < 1:
            raise ValueError(
                f"num_rows is {num_rows}, rows_per_shard {rows_per_shard}; both must be 1 or more"
            )
        if not 0 <= process_index < process_count:
            raise ValueError(f"process_index is {process_index} of {process_count} processes")
        if ids is not None and len(ids) != num_rows:
            raise ValueError(f"{len(ids)} ids for {num_rows} rows")
        for name in ("source_layers", "num_layers"):
            if name not in components:
                raise ValueError(f"components lack {name!r}; found: {', '.join(components)}")

        self.path = pathlib.Path(path)
        self._components = canonical(components)
        self._num_rows = num_rows
        self._ids = ids
        self._process_index, self._process_count = process_index, process_count
        self._features = features(self._components)
        self._digests: dict[str, str] = {}

        self.path.mkdir(parents=True, exist_ok=True)
        check_components(self.path, self._components, num_rows)
        plan = read(self.path / PLAN) or read(self.path / METADATA)
        if plan is None:
            if any(self.path.glob("*.arrow")):
                raise FileExistsError(
                    f"{self.path} holds Arrow files but no {PLAN}; move them away"
                )
            plan = {
                "format": FORMAT,
                "components": self._components,
                "num_rows": num_rows,
                "rows_per_shard": rows_per_shard,
            }
            atomic.write_json(self.path / PLAN, sealed(plan))
        self.rows_per_shard: int = plan["rows_per_shard"]
        self.num_shards = -(-num_rows // self.rows_per_shard)

        # What a killed process left of the shards that are this one's.
        for shard in self._own_shards():
            for leftover in self.path.glob(atomic.temporary_pattern(self.shard_name(shard))):
                leftover.unlink(missing_ok=True)

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the rows' columns."""
        return tuple(self._features)

    def shard_name(self, shard: int) -> str:
        """The shard's file name."""
        return f"data-{shard:05d}-of-{self.num_shards:05d}.arrow"

    def bad_rows(self, shard: int) -> list[dict[str, Any]]:
        """The records of the rows that a written shard lacks."""
        file = self._bad_rows_file(shard)
        return read_bad_rows(file, self.shard_name(shard)) if file.is_file() else []

    def _bad_rows_file(self, shard: int) -> pathlib.Path:
        return self.path / f"bad-{shard:05d}-of-{self.num_shards:05d}.jsonl"

    def pending(self) -> list[tuple[int, int, int]]:
        """This process's shards that still have to be written: (shard, first row, row after last).

        A shard that is there but can't be used is listed too, with a warning that says why.
        """
        recorded = self._recorded_digests()
        pending = []
        for shard in self._own_shards():
            fault = self._fault(shard, recorded)
            if fault is not None:
                pending.append((shard, *self.row_range(shard)))
                if fault != "missing":
                    warnings.warn(
                        f"{self.path / self.shard_name(shard)}: {fault}; will be computed again",
                        RuntimeWarning,
                        stacklevel=2,
                    )
        return pending

    def write(
        self,
        shard: int,
        rows: Sequence[Mapping[str, Any]],
        bad_rows: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Write one shard, whole or not at all.

        Args:
            rows: one mapping a row, with exactly the columns of `shards.features`, each value
                an array (or list) of the shape that the module `shards` gives.
            bad_rows: JSON records of the planned rows that are left out, each with its `id`.

        Raises:
            OSError: the file can't be written (disk full ...); shards written before stay usable.
        """
        if shard not in self._own_shards():
            raise ValueError(
                f"shard {shard} of {self.num_shards} is not one of process {self._process_index}"
            )
        start, stop = self.row_range(shard)
        name = self.shard_name(shard)
        if len(rows) + len(bad_rows) != stop - start:
            raise ValueError(
                f"{name} takes rows {start} to {stop - 1}; got {len(rows)} rows"
                + (f" and {len(bad_rows)} bad ones" if bad_rows else "")
            )
        table = shards.to_table(rows, self._features)
        if self._ids is not None:
            shards.check_ids(table, self._good_ids(shard, bad_rows))
        # Before the shard, whose presence says that all of it is there.
        atomic.write_json_lines(self._bad_rows_file(shard), bad_rows)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        content = memoryview(sink.getvalue())
        try:
            atomic.write_atomically(self.path / name, content)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: shard {shard} of {self.num_shards} was not written; finished "
                "shards stay",
                str(self.path / name),
            ) from error
        self._digests[name] = hashlib.sha256(content).hexdigest()

    def finish(self, counts: Mapping[str, Any]) -> None:
        """Check that every shard of every process is there and write the metadata.

        Args:
            counts: JSON values that `prepared.json` keeps under `counts` (bad rows ...).
        """
        if self._process_index != 0:
            raise RuntimeError(f"process {self._process_index} called finish; process 0 does")
        recorded = self._recorded_digests()
        faults = {
            self.shard_name(shard): fault
            for shard in range(self.num_shards)
            if (fault := self._fault(shard, recorded)) is not None
        }
        if faults:
            named = ", ".join(f"{name} ({fault})" for name, fault in faults.items())
            raise RuntimeError(f"{self.path} is not complete: {named}")

        written = []
        for shard in range(self.num_shards):
            start, stop = self.row_range(shard)
            file = self.path / self.shard_name(shard)
            written.append(
                {
                    "file": file.name,
                    "rows": stop - start - len(self.bad_rows(shard)),
                    "bytes": file.stat().st_size,
                    "sha256": self._digests.get(file.name) or file_digest(file),
                }
            )
        content_digest = hashlib.sha256(json.dumps(written).encode()).hexdigest()
        state = {
            "_data_files": [{"filename": shard["file"]} for shard in written],
            "_fingerprint": content_digest[:16],
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        info = dataclasses.asdict(datasets.DatasetInfo(features=self._features))
        metadata = {
            "format": FORMAT,
            "fingerprint": fingerprint(self._components),
            "components": self._components,
            "num_rows": sum(shard["rows"] for shard in written),
            "planned_rows": self._num_rows,
            "rows_per_shard": self.rows_per_shard,
            "shards": written,
            "counts": canonical(counts),
            "versions": versions(),
        }
        for leftover in self.path.glob(atomic.temporary_pattern("*")):
            leftover.unlink()
        atomic.write_json(self.path / "state.json", state)
        atomic.write_json(self.path / "dataset_info.json", info)
        atomic.write_json(self.path / METADATA, sealed(metadata))

    def _own_shards(self) -> range:
        return range(self._process_index, self.num_shards, self._process_count)

    def row_range(self, shard: int) -> tuple[int, int]:
        """A shard's first row, and the one after its last."""
        start = shard * self.rows_per_shard
        return start, min(start + self.rows_per_shard, self._num_rows)

    def _good_ids(self, shard: int, bad_rows: Sequence[Mapping[str, Any]]) -> list[str]:
        """The ids of the shard's rows; needs `ids`."""
        start, stop = self.row_range(shard)
        bad = {bad_row["id"] for bad_row in bad_rows}
        return [id for id in self._ids[start:stop] if id not in bad]

    def _recorded_digests(self) -> dict[str, str]:
        """File name -> sha256 of a finished dataset's shards, but for those written anew since."""
        metadata = read(self.path / METADATA) or {"shards": []}
        return {shard["file"]: shard["sha256"] for shard in metadata["shards"]} | self._digests

    def _fault(self, shard: int, recorded: Mapping[str, str]) -> str | None:
        """Why a shard can't be used: `missing` or what is wrong with it; None if it is whole."""
        file = self.path / self.shard_name(shard)
        if not file.is_file():
            return "missing"
        if file.name in recorded and file_digest(file) != recorded[file.name]:
            return "not the bytes that were written"
        start, stop = self.row_range(shard)
        try:
            bad_rows = self.bad_rows(shard)
            table = shards.read_table(file)
            shards.check_table(table, self._features, stop - start - len(bad_rows))
            if self._ids is not None:
                shards.check_ids(table, self._good_ids(shard, bad_rows))
        except (pa.ArrowException, OSError, ValueError) as error:
            return f"can't be used ({error})"
        return None


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
