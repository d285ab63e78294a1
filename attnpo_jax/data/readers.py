"""The examples of a source, whatever it is, each read without those before it.

Several processes may read one source together: each looks at a part of it only.
"""

import bisect
import functools
import itertools
import json
import mmap
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attnpo_jax.data.pair import BadExample
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.team import Team

ACCEPTED_SOURCES = (
    "builtin:train, builtin:eval, a .json, .jsonl, .parquet or .arrow file, a folder saved by "
    "datasets (FOLDER or FOLDER@split) or copied from the hub (FOLDER@split), or a hub id "
    "owner/name@split, owner/name:config@split or owner/name/folder@split"
)

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")
_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<folder>\w[\w./-]*)|:(?P<config>[^@:]+))?"
    r"(?:@(?P<split>[^@]+))?"
)
_READ = mmap.ACCESS_READ
_Fields = Callable[[str], bool]  # whether a column of a table is wanted


class Examples(Protocol):
    """A source that is open. The place of an example is its number less 1."""

    def __len__(self) -> int:
        """How many places there are; some may hold no example."""

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        """Examples with their numbers, an example being whatever was found.

        Places ascend. What is read of a table is all held at once.
        """


class HubSplit(NamedTuple):
    """A split of a dataset on the hub: its owner and name, and which part of it."""

    name: str  # `owner/name`
    config: str | None  # the part's name; None for the only part, or the default one
    folder: str | None  # the part's folder in the repository, where parts are told by folders
    split: str | None  # the split's name, as datasets takes it; None where the source names none


def hub_split(source: str) -> HubSplit | None:
    """What a source on the hub is made of; None for any other source."""
    path, folder = pathlib.Path(source).expanduser(), source.rpartition("@")[0]
    if source.startswith("builtin:") or path.exists():
        return None
    if folder and pathlib.Path(folder).expanduser().exists():
        return None
    hub = _hub_id(source)
    return None if hub is None or hub.split is None else hub


def _hub_id(source: str) -> HubSplit | None:
    hub = _HUB_ID.fullmatch(source)
    if hub is None or (hub["folder"] or hub["name"]).endswith(_FILE_ENDINGS):
        return None
    return HubSplit(**{field: hub[field] for field in HubSplit._fields})


def open_source(source: str, fields: _Fields, team: Team) -> tuple[str, Examples]:
    """A source's short name (for fallback ids) and its examples."""
    if source.startswith("builtin:"):
        split = source.removeprefix("builtin:")
        if split not in ("train", "eval"):
            raise UserError(f"no builtin data {source!r}; accepted: builtin:train, builtin:eval")
        return f"builtin-{split}", _JsonLines(_BUILTIN / f"{split}.jsonl", team)

    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return path.stem, _open_file(path, source, fields, team)
    if path.is_dir():
        return path.name, _Table(_saved_dataset(path, None, source), source, fields)
    folder, at, split = source.rpartition("@")
    folder = pathlib.Path(folder).expanduser()
    if at and folder.is_dir():
        dataset = _saved_dataset(folder, split, source)
        return f"{folder.name}@{split}", _Table(dataset, source, fields)
    if at and folder.is_file():
        raise UserError(f"{source}: a single file has no splits; write {str(folder)!r}")

    hub = _hub_id(source)
    if hub is None:
        raise FileNotFoundError(f"no data at {source!r}; accepted: {ACCEPTED_SOURCES}")
    if hub.split is None:
        raise FileNotFoundError(
            f"no data at {source!r}; if it is a hub id, name the split: {source}@train"
        )
    dataset = datasets.load_dataset(hub.name, hub.config, data_dir=hub.folder, split=hub.split)
    return source, _Table(dataset, source, fields)


def _open_file(path: pathlib.Path, source: str, fields: _Fields, team: Team) -> Examples:
    match path.suffix:
        case ".jsonl":
            return _JsonLines(path, team)
        case ".json":
            return _JsonList(path, source)
        case ".parquet":
            return _Parquet(path, source, fields)
        case ".arrow":
            try:
                return _Table(datasets.Dataset.from_file(str(path)), source, fields)
            except pa.ArrowInvalid as error:
                raise UserError(f"{source}: not an Arrow stream file ({error})") from error
    raise UserError(
        f"{source}: a file ending in {path.suffix!r}; accepted: {', '.join(_FILE_ENDINGS)}"
    )


class _JsonLines:
    """A file of one object a line; blank lines are no examples."""

    def __init__(self, path: pathlib.Path, team: Team):
        self._path = path
        size = path.stat().st_size
        check_alike(team, path, "bytes", size)
        part = team.part(size)
        ends: list[int] = []
        if part:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=_READ) as content:
                start = part.start
                while (end := content.find(b"\n", start, part.stop)) >= 0:
                    ends.append(start := end + 1)
        self._starts = np.concatenate([[0], *team.exchange(ends)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        with self._path.open("rb") as file:
            for place in places:
                file.seek(self._starts[place])
                line = file.readline()
                if not line.strip():
                    continue
                try:
                    # utf-8-sig: some editors put a byte order mark before the first line.
                    yield place + 1, json.loads(line.decode("utf-8-sig"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    yield place + 1, BadExample(f"not a line of JSON ({error})")


class _JsonList:
    """A file that is one JSON document: every process has to read all of it."""

    def __init__(self, path: pathlib.Path, source: str):
        try:
            content = json.loads(path.read_text(encoding="utf-8-sig"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(
                f"{source}: not a JSON file ({error}); a file with one object a line ends in .jsonl"
            ) from error
        self._examples = content.get("data") if isinstance(content, dict) else content
        if not isinstance(self._examples, list):
            raise UserError(f'{source}: accepted is a list of examples or {{"data": [examples]}}')

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        return ((place + 1, self._examples[place]) for place in places)


class _Parquet:
    """A Parquet file; of its row groups, the one that was read last is kept."""

    def __init__(self, path: pathlib.Path, source: str, fields: _Fields):
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{source}: not a Parquet file ({error})") from error
        self._columns = _needed_columns(fields, self._file.schema_arrow.names, source)
        metadata = self._file.metadata
        sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = list(itertools.accumulate(sizes, initial=0))
        self._group = functools.lru_cache(maxsize=1)(
            functools.partial(self._file.read_row_group, columns=self._columns)
        )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        by_group = itertools.groupby(places, lambda place: bisect.bisect(self._starts, place) - 1)
        for group, members in by_group:
            numbers = list(members)
            first = numbers[0]
            of_group = self._group(group).slice(
                first - self._starts[group], numbers[-1] - first + 1
            )
            rows = of_group.take([place - first for place in numbers]).to_pylist()
            yield from zip((place + 1 for place in numbers), rows, strict=True)


class _Table:
    """A dataset in Arrow's form, which stays on disk."""

    def __init__(self, dataset: datasets.Dataset, source: str, fields: _Fields):
        columns = _needed_columns(fields, dataset.column_names, source)
        self._dataset = dataset.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        rows = self._dataset[list(places)].to_pylist() if places else []
        return zip((place + 1 for place in places), rows, strict=True)


def check_alike(team: Team, source: Any, unit: str, found: int) -> None:
    """Checks that a source is as long for each of a team; UserError if it is not."""
    everyones = team.exchange(found)
    if len(set(everyones)) > 1:
        listed = ", ".join(map(str, everyones))
        raise UserError(
            f"{source}: the processes find different numbers of {unit} ({listed}); accepted: the "
            "same data for all of them"
        )


def _saved_dataset(folder: pathlib.Path, split: str | None, source: str) -> datasets.Dataset:
    known = ("dataset_dict.json", "dataset_info.json")
    if not any((folder / name).is_file() for name in known):
        if split is None:
            raise UserError(
                f"{source}: a folder without {' or '.join(known)}; accepted: a folder written by "
                f"datasets' save_to_disk, or a copy of a hub dataset with its split, {folder}@train"
            )
        try:
            return datasets.load_dataset(str(folder), split=split)
        except ValueError as error:
            raise UserError(f"{source}: {error}") from error
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            found = "no split named" if split is None else f"no split {split!r}"
            choices = ", ".join(f"{folder}@{name}" for name in dataset)
            raise UserError(f"{source}: {found}; accepted: {choices}")
        return dataset[split]
    if split is not None:
        raise UserError(f"{source}: this folder has no splits; write {str(folder)!r}")
    return dataset


def _needed_columns(fields: _Fields, columns: Sequence[str], source: str) -> list[str]:
    for needed in ("chosen", "rejected"):
        if needed not in columns:
            raise UserError(f"{source}: no column `{needed}`; columns found: {', '.join(columns)}")
    return [name for name in columns if fields(name)]
