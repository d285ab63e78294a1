"""The examples of a source, whatever it is, each read without those before it.

Several processes may read one source together: each looks at a part of it only.
"""

import bisect
import functools
import glob
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from attnpo_jax.data import text_files
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.paths import searched
from attnpo_jax.runtime.team import Team, check_alike

ACCEPTED_SOURCES = (
    "builtin:train, builtin:eval, a .json, .jsonl, .csv or .tsv file (or one of these and .gz or "
    ".zst), a .parquet or .arrow file, a pattern of files (data/*.jsonl), a folder saved by "
    "datasets (FOLDER or FOLDER@split) or copied from the hub (FOLDER@split), or a hub id "
    "owner/name@split, owner/name:config@split or owner/name/folder@split"
)

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
_TEXT_ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
_PACKED_ENDINGS = tuple(a + b for a in _TEXT_ENDINGS for b in text_files.PACKED)
_FILE_ENDINGS = (*_TEXT_ENDINGS, ".parquet", ".arrow", *_PACKED_ENDINGS)
_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<folder>\w[\w./-]*)|:(?P<config>[^@:]+))?"
    r"(?:@(?P<split>[^@]+))?"
)
# From the columns that a table has, and its source's name, those to read.
_Select = Callable[[Sequence[str], str], list[str]]


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
    if hub is None or (hub["folder"] or hub["name"]).lower().endswith(_FILE_ENDINGS):
        return None
    return HubSplit(**{field: hub[field] for field in HubSplit._fields})


def expand(source: str, team: Team) -> list[str]:
    """The files that a pattern stands for, by name; any other source as it is.

    Raises:
      FileNotFoundError: a pattern that no file matches.
    """
    path = pathlib.Path(source).expanduser()
    plain = source.startswith("builtin:") or path.exists() or _hub_id(source) is not None
    if plain or not glob.has_magic(source):
        return [source]
    found = sorted(glob.glob(str(path), recursive=True))
    check_alike(team, source, "files", len(found))
    if not found:
        folder = pathlib.Path(*itertools.takewhile(lambda x: not glob.has_magic(x), path.parts))
        looked = f"no file in {folder.absolute()} matches" if folder.is_dir() else searched(folder)
        raise FileNotFoundError(f"no data at {source!r}: {looked}; accepted: {ACCEPTED_SOURCES}")
    return found


def open_source(source: str, select: _Select, team: Team) -> tuple[str, Examples]:
    """A source's short name (for fallback ids) and its examples."""
    if source.startswith("builtin:"):
        split = source.removeprefix("builtin:")
        if split not in ("train", "eval"):
            raise UserError(f"no builtin data {source!r}; accepted: builtin:train, builtin:eval")
        path = _BUILTIN / f"{split}.jsonl"
        return f"builtin-{split}", text_files.JsonLines(path, source, team, None)

    path = pathlib.Path(source).expanduser()
    if path.is_file():
        packed = path.suffix.lower() in text_files.PACKED
        short_name = pathlib.Path(path.stem).stem if packed else path.stem
        return short_name, _open_file(path, source, select, team)
    if path.is_dir():
        return path.name, _Table(_saved_dataset(path, None, source), source, select)
    folder, at, split = source.rpartition("@")
    folder = pathlib.Path(folder).expanduser()
    if at and folder.is_dir():
        dataset = _saved_dataset(folder, split, source)
        return f"{folder.name}@{split}", _Table(dataset, source, select)
    if at and folder.is_file():
        raise UserError(f"{source}: a single file has no splits; write {str(folder)!r}")

    hub = _hub_id(source)
    if hub is None:
        raise FileNotFoundError(
            f"no data at {source!r}; accepted: {ACCEPTED_SOURCES}; {searched(path)}"
        )
    if hub.split is None:
        raise FileNotFoundError(
            f"no data at {source!r}; if it is a hub id, name the split: {source}@train"
        )
    dataset = datasets.load_dataset(hub.name, hub.config, data_dir=hub.folder, split=hub.split)
    return source, _Table(dataset, source, select)


def _open_file(path: pathlib.Path, source: str, select: _Select, team: Team) -> Examples:
    name, unpacked = path.name.lower(), None
    if name.endswith(_PACKED_ENDINGS):
        unpacked = text_files.Unpacked(path, source)
        path, name = unpacked.path, name.rpartition(".")[0]
    match pathlib.Path(name).suffix:
        case ".jsonl":
            return text_files.JsonLines(path, source, team, unpacked)
        case ".json":
            return text_files.json_list(path, source)
        case ".csv":
            return text_files.delimited(path, source, ",", select)
        case ".tsv":
            return text_files.delimited(path, source, "\t", select)
        case ".parquet":
            return _Parquet(path, source, select)
        case ".arrow":
            try:
                return _Table(datasets.Dataset.from_file(str(path)), source, select)
            except pa.ArrowInvalid as error:
                raise UserError(f"{source}: not an Arrow stream file ({error})") from error
    raise UserError(
        f"{source}: a file ending in {path.suffix!r}; accepted: {', '.join(_FILE_ENDINGS)}"
    )


class _Parquet:
    """A Parquet file; of its row groups, the one that was read last is kept."""

    def __init__(self, path: pathlib.Path, source: str, select: _Select):
        try:
            self._file = pq.ParquetFile(path)
        except pa.ArrowInvalid as error:
            raise UserError(f"{source}: not a Parquet file ({error})") from error
        self._columns = select(self._file.schema_arrow.names, source)
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

    def __init__(self, dataset: datasets.Dataset, source: str, select: _Select):
        columns = select(dataset.column_names, source)
        self._dataset = dataset.select_columns(columns).with_format("arrow")

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        rows = self._dataset[list(places)].to_pylist() if places else []
        return zip((place + 1 for place in places), rows, strict=True)


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
