"""Writing a prepared dataset, shard by shard; the module `prepared` says what is on disk."""

import dataclasses
import hashlib
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import pyarrow as pa

from attnpo_jax.data import shards
from attnpo_jax.data.manifest import (
    FORMAT,
    METADATA,
    PLAN,
    canonical,
    check_components,
    features,
    file_digest,
    fingerprint,
    read,
    read_bad_rows,
    sealed,
    versions,
)
from attnpo_jax.runtime import atomic


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
        content = shards.to_bytes(table)
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
            if file.name not in recorded:
                shards.check_sum(file, table)
            shards.check_table(table, self._features, stop - start - len(bad_rows))
            if self._ids is not None:
                shards.check_ids(table, self._good_ids(shard, bad_rows))
        except (pa.ArrowException, OSError, ValueError) as error:
            return f"can't be used ({error})"
        return None
