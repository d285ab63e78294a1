"""The examples of a source, whatever it is, each read without those before it.

Several processes may read one source together: each looks at a part of it only.
"""

import bisect
import contextlib
import functools
import glob
import itertools
import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from attnpo_jax.data import limits, text_files
from attnpo_jax.data.arrow_files import refuse_packed
from attnpo_jax.data.pair import BadExample
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.paths import searched
from attnpo_jax.runtime.team import Team, check_alike

ACCEPTED_SOURCES = (
    "builtin:train, builtin:eval, builtin:planted, a .json, .jsonl, .csv or .tsv file (or one of "
    "these and .gz or .zst), a .parquet or .arrow file, a pattern of files (data/*.jsonl), a "
    "folder saved by datasets (FOLDER or FOLDER@split) or copied from the hub (FOLDER@split), or a "
    "hub id owner/name@split, owner/name:config@split or owner/name/folder@split"
)

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
# Those of checks are prompts alone.
_BUILTIN_NAMES = ("train", "eval", "planted", "checks-train", "checks-eval")
_TEXT_ENDINGS = (".json", ".jsonl", ".csv", ".tsv")
_PACKED_ENDINGS = tuple(a + b for a in _TEXT_ENDINGS for b in text_files.PACKED)
_FILE_ENDINGS = (*_TEXT_ENDINGS, ".parquet", ".arrow", *_PACKED_ENDINGS)
_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<folder>\w[\w./-]*)|:(?P<config>[^@:]+))?"
    r"(?:@(?P<split>[^@]+))?"
)
# What datasets and pyarrow raise of files that are not what they seem.
_OF_LIBRARIES = (
    pa.ArrowException,
    datasets.exceptions.DatasetsError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    NotImplementedError,
    RecursionError,
    OverflowError,
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


@contextlib.contextmanager
def naming(source: str) -> Iterator[None]:
    """Has what libraries raise of a file that is not what it seems name the source."""
    try:
        yield
    except (UserError, FileNotFoundError):
        raise
    except OSError as error:
        if error.errno is not None:
            raise
        raise UserError(f"{source}: {error}") from error  # pyarrow's, of a file's content
    except _OF_LIBRARIES as error:
        raise UserError(f"{source}: can't be read ({type(error).__name__}: {error})") from error


def open_source(
    source: str, select: _Select, team: Team, limit: int = limits.MAX_EXAMPLE_BYTES
) -> tuple[str, Examples]:
    """A source's short name (for fallback ids) and its examples.

    Args:
      select: from the columns that a table has, and its source's name, those to read.
      limit: bytes that an example may have; a larger one is a bad example, and is not read.

    Raises:
      UserError, FileNotFoundError: it can't be read; the message names it.
    """
    with naming(source):
        return _open(source, select, team, limit)


def _open(source: str, select: _Select, team: Team, limit: int) -> tuple[str, Examples]:
    if source.startswith("builtin:"):
        split = source.removeprefix("builtin:")
        if split not in _BUILTIN_NAMES:
            accepted = ", ".join(f"builtin:{name}" for name in _BUILTIN_NAMES)
            raise UserError(f"no builtin data {source!r}; accepted: {accepted}")
        path = _BUILTIN / f"{split}.jsonl"
        return f"builtin-{split}", text_files.JsonLines(path, source, team, None, limit)

    path = pathlib.Path(source).expanduser()
    if path.is_file():
        packed = path.suffix.lower() in text_files.PACKED
        short_name = pathlib.Path(path.stem).stem if packed else path.stem
        return short_name, _open_file(path, source, select, team, limit)
    if path.is_dir():
        return path.name, _Table(_saved_dataset(path, None, source), source, select, limit)
    folder, at, split = source.rpartition("@")
    folder = pathlib.Path(folder).expanduser()
    if at and folder.is_dir():
        dataset = _saved_dataset(folder, split, source)
        return f"{folder.name}@{split}", _Table(dataset, source, select, limit)
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
    return source, _Table(dataset, source, select, limit)


def _open_file(
    path: pathlib.Path, source: str, select: _Select, team: Team, limit: int
) -> Examples:
    name, unpacked = path.name.lower(), None
    if name.endswith(_PACKED_ENDINGS):
        unpacked = text_files.Unpacked(path, source, limit)
        path, name = unpacked.path, name.rpartition(".")[0]
    match pathlib.Path(name).suffix:
        case ".jsonl":
            return text_files.JsonLines(path, source, team, unpacked, limit)
        case ".json":
            return text_files.JsonList(path, source, unpacked, limit)
        case ".csv":
            return text_files.delimited(path, source, ",", select, limit)
        case ".tsv":
            return text_files.delimited(path, source, "\t", select, limit)
        case ".parquet":
            return _Parquet(path, source, select, limit)
        case ".arrow":
            try:
                refuse_packed(path, source)
                return _Table(datasets.Dataset.from_file(str(path)), source, select, limit)
            except pa.ArrowInvalid as error:
                raise UserError(f"{source}: not an Arrow stream file ({error})") from error
    raise UserError(
        f"{source}: a file ending in {path.suffix!r}; accepted: {', '.join(_FILE_ENDINGS)}"
    )


class _Parquet:
    """A Parquet file; of its row groups, the one that was read last is kept.

    Texts are kept as the file has them, once for all rows that repeat them, until they are rows.
    """

    def __init__(self, path: pathlib.Path, source: str, select: _Select, limit: int):
        self._source, self._limit = source, limit
        try:
            metadata = pq.read_metadata(path)
            schema = metadata.schema.to_arrow_schema()
        except pa.ArrowInvalid as error:
            raise UserError(f"{source}: not a Parquet file ({error})") from error
        columns = select(schema.names, source)
        leaves = [metadata.schema.column(i) for i in range(metadata.num_columns)]
        texts = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
        self._file = pq.ParquetFile(path, metadata=metadata, read_dictionary=texts)
        # A name may hold dots, so the names of the leaves' columns are counted off.
        self._leaves = [i for i, leaf in enumerate(leaves) if _is_of(leaf.path, columns)]
        groups = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
        self._starts = list(itertools.accumulate(groups, initial=0))
        self._columns = columns
        self._group = functools.lru_cache(maxsize=1)(self._read_group)

    def _read_group(self, index: int) -> tuple[pa.Table, np.ndarray]:
        """A row group, and the bytes of its rows."""
        group = self._file.metadata.row_group(index)
        chunks = [group.column(i) for i in self._leaves]
        self._check(index, sum(max(c.total_uncompressed_size, 8 * c.num_values) for c in chunks))
        table = self._file.read_row_group(index, columns=self._columns)
        sizes = _sizes(table, self._source)
        # One text may stand for those of all rows.
        self._check(index, int(sizes[sizes <= self._limit].sum()))
        return table, sizes

    def _check(self, index: int, size: int) -> None:
        most = limits.AT_ONCE * self._limit
        if size > most:
            raise UserError(
                f"{self._source}: row group {index} takes {size} bytes; accepted: up to {most}, "
                f"{limits.AT_ONCE} times data.max_example_bytes, or smaller row groups"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        by_group = itertools.groupby(places, lambda place: bisect.bisect(self._starts, place) - 1)
        with naming(self._source):
            for group, members in by_group:
                table, sizes = self._group(group)
                first = self._starts[group]
                for place, row in _rows(table, sizes, [m - first for m in members], self._limit):
                    yield first + place + 1, row


def _is_of(leaf: str, columns: Sequence[str]) -> bool:
    return any(leaf == column or leaf.startswith(f"{column}.") for column in columns)


def _sizes(table: pa.Table, source: str) -> np.ndarray:
    try:
        return limits.sizes(table)
    except BadExample as bad:
        raise UserError(f"{source}: {bad.reason}") from None


def _rows(
    table: pa.Table, sizes: np.ndarray, places: Sequence[int], limit: int
) -> Iterator[tuple[int, Any]]:
    """Rows of a table by place, those over the limit as BadExample; few are held at once."""
    wanted = np.asarray(places, np.int64)
    # Those that are too large are not taken out.
    of_wanted = np.where(sizes[wanted] > limit, 0, sizes[wanted])
    for run in limits.runs_of(of_wanted, limit):
        some = [place for place in wanted[run].tolist() if sizes[place] <= limit]
        rows = iter(table.take(some).to_pylist() if some else [])
        for place in wanted[run].tolist():
            large = sizes[place] > limit
            yield place, limits.too_large(int(sizes[place]), limit) if large else next(rows)


class _Table:
    """A dataset in Arrow's form, which stays on disk."""

    def __init__(self, dataset: datasets.Dataset, source: str, select: _Select, limit: int):
        columns = select(dataset.column_names, source)
        self._dataset = dataset.select_columns(columns).with_format("arrow")
        self._source, self._limit = source, limit
        # Offsets that lead out of a file would be followed.
        self._dataset.data.table.validate(full=True)

    def __len__(self) -> int:
        return len(self._dataset)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        if not places:
            return
        with naming(self._source):
            table = self._dataset[list(places)]
            sizes = _sizes(table, self._source)
            for i, row in _rows(table, sizes, range(len(table)), self._limit):
                yield places[i] + 1, row


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
    for file in sorted(folder.rglob("*.arrow")):
        refuse_packed(file, source)
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
