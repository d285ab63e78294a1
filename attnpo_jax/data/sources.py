"""From preference files to validated pairs.

A source is named by one string:

- `builtin:train`, `builtin:eval`: the pairs that come with the package;
- a `.jsonl` file (one object a line), a `.json` file (a list, or `{"data": [...]}`), a `.parquet`
  or an `.arrow` file;
- a folder written by datasets' `save_to_disk`; `FOLDER@split` for one split of a DatasetDict;
- `FOLDER@split` of a local copy of a hub dataset (its Parquet or JSON files as published);
- a Hugging Face hub id, `owner/name@split`; one of its parts, if it has several, by its config,
  `owner/name:config@split`, or its folder, `owner/name/folder@split`.

Several sources are read one after another; with shares (see `mixture`) they are mixed.

A row holds `chosen`, `rejected` and perhaps `prompt`, `id` or `prompt_id`; other fields are
ignored. Three forms are accepted:

- explicit prompt: `prompt` is a string (one user turn), a list of chat messages, or an hh-rlhf
  transcript that ends in `\\n\\nAssistant:`; `chosen` and `rejected` are strings, or lists with the
  assistant's message alone;
- implicit prompt: `chosen` and `rejected` are whole conversations (lists of messages) that share
  all but their last turn. A `prompt` beside them must agree: messages equal to the shared turns, or
  a string equal to the first user turn;
- hh-rlhf: `chosen` and `rejected` are strings `\\n\\nHuman: ... \\n\\nAssistant: ...`.

Turns alternate between `user` and `assistant`, after an optional `system` message.
"""

import collections
import dataclasses
import hashlib
import itertools
import json
import os
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from attnpo_jax.data import atomic, mixture, ready_weights
from attnpo_jax.data.rows import Pair, Unfit, own_id, pair_of_row

ACCEPTED_SOURCES = (
    "builtin:train, builtin:eval, a .json, .jsonl, .parquet or .arrow file, a folder saved by "
    "datasets (FOLDER or FOLDER@split) or copied from the hub (FOLDER@split), or a hub id "
    "owner/name@split, owner/name:config@split or owner/name/folder@split"
)

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")
_FIELDS = ("id", "prompt_id", "prompt", "chosen", "rejected")
_HUB_ID = re.compile(
    r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?:/(?P<folder>\w[\w./-]*)|:(?P<config>[^@:]+))?"
    r"(?:@(?P<split>[^@]+))?"
)
_Fields = Callable[[str], bool]  # whether a column of a table is wanted
_READ_ROWS = 1024  # rows turned into Python objects at once, so that a big file is never held twice


@dataclasses.dataclass(frozen=True)
class LoadedPairs:
    """What was loaded.

    Attributes:
        pairs: in source order.
        bad_rows: the skipped rows: `{"file", "row", "reason"}`, `"id"` if any.
        weight_columns: names of the ready-made weights that every pair has.
    """

    pairs: list[Pair]
    bad_rows: list[dict[str, Any]]
    weight_columns: tuple[str, ...] = ()


class BadRow(ValueError):
    """A row that is no preference pair.

    Attributes:
        file: the source as the user named it.
        row: 1-based; the line number in a `.jsonl` file, the place in the list or table elsewhere.
        reason: what was found, and what would be accepted.
        id: the row's id, or None when it has none.
    """

    def __init__(self, file: str, row: int, reason: str, id: str | None = None):
        super().__init__(f"{file}, row {row}: {reason}")
        self.file = file
        self.row = row
        self.reason = reason
        self.id = id

    @classmethod
    def of(cls, pair: Pair, reason: str) -> "BadRow":
        """The row of a pair that `load_pairs` took for good."""
        file, row = pair.origin or (f"pair {pair.id}", 1)
        return cls(file, row, reason, pair.id)

    def as_record(self) -> dict[str, Any]:
        """The line that `bad_rows.jsonl` holds for this row."""
        record = {"file": self.file, "row": self.row, "reason": self.reason}
        return record if self.id is None else record | {"id": self.id}


def load_pairs(
    sources: str | Sequence[str | tuple[str, float]],
    *,
    on_bad_row: str = "error",
    bad_rows_path: str | os.PathLike | None = None,
    weight_columns: str | Sequence[str] = (),
) -> LoadedPairs:
    """Read and validate the preference pairs of one or several sources, in order.

    Where the sources have shares, `0.7` of the mixture or `*0.7` behind the name, the result is the
    largest mixture with these proportions that uses no pair twice: a source that is smaller than
    its share gives all its pairs, and makes the whole smaller. What is taken of the others is
    spread evenly over them, the same whenever they are the same.

    A pair's id is the row's `id`, else its `prompt_id`, else `NAME:ROW` with the source's short
    name and the row number. An id that was seen before gets `#2`, `#3`, ... in order of appearance.

    Args:
        sources: one source or several, each as the module's docstring says.
        on_bad_row: `error` raises at the first bad row; `skip` leaves bad rows out and lists them.
        bad_rows_path: where `skip` writes the bad rows, as JSON lines; an old file there is
            replaced, or removed when no row is bad.
        weight_columns: names of ready-made token weights to read (see `ready_weights`); `all` for
            those of the first row that has any. A row without them is a bad one.

    Raises:
        BadRow: a row is no preference pair and `on_bad_row` is `error`.
        FileNotFoundError: a source is neither a file, a folder nor a hub id.
        ValueError: a file can't be parsed as what its ending says, a split or column is missing,
            or no pair is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; accepted: 'error', 'skip'")
    parsed = mixture.parse(sources)
    sources = [source for source, _ in parsed]
    if not sources:
        raise ValueError(f"no data source given; accepted: {ACCEPTED_SOURCES}")

    every_column = weight_columns == "all"
    columns = () if every_column else tuple(weight_columns)
    wanted_fields = {*_FIELDS, *(ready_weights.fields(columns) if columns else ())}

    def fields(name: str) -> bool:
        return name in wanted_fields or (every_column and ready_weights.is_field(name))

    by_source: list[list[Pair]] = []
    bad_rows: list[dict[str, Any]] = []
    taken_ids: set[str] = set()
    last_numbers: dict[str, int] = collections.defaultdict(lambda: 1)
    for source in sources:
        pairs: list[Pair] = []
        by_source.append(pairs)
        short_name, rows = _open(source, fields)
        for number, row in rows:
            try:
                pair = pair_of_row(row, f"{short_name}:{number}", origin=(source, number))
                if every_column and not columns:
                    columns = ready_weights.names(row)
                if columns or every_column:
                    pair = dataclasses.replace(pair, ready=ready_weights.read(row, columns))
            except Unfit as unfit:
                bad_row = BadRow(source, number, str(unfit), own_id(row))
                if on_bad_row == "error":
                    raise bad_row from None
                bad_rows.append(bad_row.as_record())
                continue
            pairs.append(_with_unique_id(pair, taken_ids, last_numbers))

    shares = [share for _, share in parsed if share is not None]
    if shares:
        available = [len(pairs) for pairs in by_source]
        counts = mixture.take(available, shares)
        if 0 in counts:
            found = ", ".join(
                f"{name} has {n} pairs and gives {count}"
                for name, n, count in zip(sources, available, counts, strict=True)
            )
            raise ValueError(
                f"no mixture has these shares and something of every source: {found}; accepted: "
                "shares that the smallest source allows, or another source"
            )
        by_source = [
            [pairs[i] for i in mixture.spread(len(pairs), count)]
            for pairs, count in zip(by_source, counts, strict=True)
        ]
    pairs = list(itertools.chain.from_iterable(by_source))

    if bad_rows_path is not None and on_bad_row == "skip":
        atomic.write_json_lines(bad_rows_path, bad_rows)
    if not pairs:
        found = f"all {len(bad_rows)} rows are bad" if bad_rows else "no rows"
        first = f", the first one: {bad_rows[0]['reason']}" if bad_rows else ""
        raise ValueError(f"{', '.join(sources)}: no preference pair found ({found}{first})")
    return LoadedPairs(pairs, bad_rows, columns)


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """sha256 (hex) of the pairs' ids and texts, in order; it changes when any of them does."""
    digest = hashlib.sha256()
    for pair in pairs:
        turns = [[message["role"], message["content"]] for message in pair.prompt]
        line = json.dumps([pair.id, turns, pair.chosen, pair.rejected])
        digest.update(line.encode() + b"\n")
        if pair.ready is not None:
            digest.update(pair.ready.digest())
    return digest.hexdigest()


# Opening sources: each reader yields (1-based row number, row), a row being whatever was found.


class HubSplit(NamedTuple):
    """A split of a dataset on the hub: its owner and name, and which part of it, if it has several.

    Attributes:
        name: `owner/name`.
        config: the part's name; None for the only part, or the default one.
        folder: the part's folder in the repository, where parts are told by folders.
        split: the split's name, as datasets takes it; None where the source names none.
    """

    name: str
    config: str | None
    folder: str | None
    split: str | None


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


def _open(source: str, fields: _Fields) -> tuple[str, Iterator[tuple[int, Any]]]:
    """A source's short name (for fallback ids) and its rows."""
    if source.startswith("builtin:"):
        split = source.removeprefix("builtin:")
        if split not in ("train", "eval"):
            raise ValueError(f"no builtin data {source!r}; accepted: builtin:train, builtin:eval")
        return f"builtin-{split}", _jsonl_rows(_BUILTIN / f"{split}.jsonl", source)

    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return path.stem, _file_rows(fields, path, source)
    if path.is_dir():
        return path.name, _folder_rows(fields, path, None, source)
    folder, at, split = source.rpartition("@")
    folder = pathlib.Path(folder).expanduser()
    if at and folder.is_dir():
        return f"{folder.name}@{split}", _folder_rows(fields, folder, split, source)
    if at and folder.is_file():
        raise ValueError(f"{source}: a single file has no splits; write {str(folder)!r}")

    hub = _hub_id(source)
    if hub is None:
        raise FileNotFoundError(f"no data at {source!r}; accepted: {ACCEPTED_SOURCES}")
    if hub.split is None:
        raise FileNotFoundError(
            f"no data at {source!r}; if it is a hub id, name the split: {source}@train"
        )
    dataset = datasets.load_dataset(hub.name, hub.config, data_dir=hub.folder, split=hub.split)
    return source, _dataset_rows(fields, dataset, source)


def _file_rows(fields: _Fields, path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    match path.suffix:
        case ".jsonl":
            return _jsonl_rows(path, source)
        case ".json":
            return _json_rows(path, source)
        case ".parquet":
            return _parquet_rows(fields, path, source)
        case ".arrow":
            return _arrow_rows(fields, path, source)
    raise ValueError(
        f"{source}: a file ending in {path.suffix!r}; accepted: {', '.join(_FILE_ENDINGS)}"
    )


def _jsonl_rows(path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                # utf-8-sig: some editors put a byte order mark before the first line.
                yield number, json.loads(line.decode("utf-8-sig"))
            except (json.JSONDecodeError, UnicodeDecodeError) as error:
                yield number, Unfit(f"not a line of JSON ({error})")


def _json_rows(path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{source}: not a JSON file ({error}); a file with one object a line ends in .jsonl"
        ) from error
    rows = content.get("data") if isinstance(content, dict) else content
    if not isinstance(rows, list):
        raise ValueError(f'{source}: accepted is a list of rows or {{"data": [rows]}}')
    return enumerate(rows, 1)


def _parquet_rows(fields: _Fields, path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not a Parquet file ({error})") from error
    columns = _needed_columns(fields, file.schema_arrow.names, source)
    batches = file.iter_batches(batch_size=_READ_ROWS, columns=columns)
    return enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _arrow_rows(fields: _Fields, path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    try:
        dataset = datasets.Dataset.from_file(str(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not an Arrow stream file ({error})") from error
    return _dataset_rows(fields, dataset, source)


def _folder_rows(
    fields: _Fields, folder: pathlib.Path, split: str | None, source: str
) -> Iterator[tuple[int, Any]]:
    known = ("dataset_dict.json", "dataset_info.json")
    if not any((folder / name).is_file() for name in known):
        if split is None:
            raise ValueError(
                f"{source}: a folder without {' or '.join(known)}; accepted: a folder written by "
                f"datasets' save_to_disk, or a copy of a hub dataset with its split, {folder}@train"
            )
        try:
            dataset = datasets.load_dataset(str(folder), split=split)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from error
        return _dataset_rows(fields, dataset, source)
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            found = "no split named" if split is None else f"no split {split!r}"
            choices = ", ".join(f"{folder}@{name}" for name in dataset)
            raise ValueError(f"{source}: {found}; accepted: {choices}")
        dataset = dataset[split]
    elif split is not None:
        raise ValueError(f"{source}: this folder has no splits; write {str(folder)!r}")
    return _dataset_rows(fields, dataset, source)


def _dataset_rows(
    fields: _Fields, dataset: datasets.Dataset, source: str
) -> Iterator[tuple[int, Any]]:
    dataset = dataset.select_columns(_needed_columns(fields, dataset.column_names, source))
    tables = dataset.with_format("arrow").iter(batch_size=_READ_ROWS)
    return enumerate(itertools.chain.from_iterable(table.to_pylist() for table in tables), 1)


def _needed_columns(fields: _Fields, columns: Sequence[str], source: str) -> list[str]:
    for needed in ("chosen", "rejected"):
        if needed not in columns:
            raise ValueError(f"{source}: no column `{needed}`; columns found: {', '.join(columns)}")
    return [name for name in columns if fields(name)]


def _with_unique_id(pair: Pair, taken: set[str], last_numbers: dict[str, int]) -> Pair:
    """The pair with an id that is not in `taken`; notes it there."""
    unique = pair.id
    while unique in taken:
        last_numbers[pair.id] += 1
        unique = f"{pair.id}#{last_numbers[pair.id]}"
    taken.add(unique)
    return pair if unique == pair.id else dataclasses.replace(pair, id=unique)
