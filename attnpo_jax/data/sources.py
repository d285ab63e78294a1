"""From preference files to validated pairs.

A source is named by one string:

- `builtin:train`, `builtin:eval`: the pairs that come with the package;
- a `.jsonl` file (one object a line), a `.json` file (a list, or `{"data": [...]}`), a `.parquet`
  or an `.arrow` file;
- a folder written by datasets' `save_to_disk`; `FOLDER@split` for one split of a DatasetDict;
- a Hugging Face hub id, `owner/name[:config]@split`.

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
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from attnpo_jax.data import atomic

Message = dict[str, str]

ACCEPTED_SOURCES = (
    "builtin:train, builtin:eval, a .json, .jsonl, .parquet or .arrow file, a folder saved by "
    "datasets (FOLDER or FOLDER@split), or a hub id owner/name[:config]@split"
)

_BUILTIN = pathlib.Path(__file__).parent / "builtin"
_FILE_ENDINGS = (".json", ".jsonl", ".parquet", ".arrow")
_FIELDS = ("id", "prompt_id", "prompt", "chosen", "rejected")
_HUB_ID = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(?::(?P<config>[^@:]+))?(?:@(?P<split>[^@]+))?")
_TRANSCRIPT_START = "\n\nHuman:"
_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")
_TRANSCRIPT_ROLES = {"Human": "user", "Assistant": "assistant"}
_READ_ROWS = 1024  # rows turned into Python objects at once, so that a big file is never held twice


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair.

    Attributes:
        id: unique among the pairs that were loaded together.
        prompt: chat messages `{"role", "content"}`, the last one the user's.
        chosen: the preferred response, as in the source (white space kept).
        rejected: the other response, likewise.
        origin: the source, as the user named it, and the row's number there, for `BadRow`.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: tuple[str, int] | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True)
class LoadedPairs:
    """Pairs in source order, and the skipped rows: `{"file", "row", "reason"}`, `"id"` if any."""

    pairs: list[Pair]
    bad_rows: list[dict[str, Any]]


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


class _Unfit(ValueError):
    """Why a row is no pair; becomes a BadRow where file and row number are known."""


def load_pairs(
    sources: str | Sequence[str],
    *,
    on_bad_row: str = "error",
    bad_rows_path: str | os.PathLike | None = None,
) -> LoadedPairs:
    """Read and validate the preference pairs of one or several sources, in order.

    A pair's id is the row's `id`, else its `prompt_id`, else `NAME:ROW` with the source's short
    name and the row number. An id that was seen before gets `#2`, `#3`, ... in order of appearance.

    Args:
        sources: one source or several, each as the module's docstring says.
        on_bad_row: `error` raises at the first bad row; `skip` leaves bad rows out and lists them.
        bad_rows_path: where `skip` writes the bad rows, as JSON lines; an old file there is
            replaced, or removed when no row is bad.

    Raises:
        BadRow: a row is no preference pair and `on_bad_row` is `error`.
        FileNotFoundError: a source is neither a file, a folder nor a hub id.
        ValueError: a file can't be parsed as what its ending says, a split or column is missing,
            or no pair is left.
    """
    if on_bad_row not in ("error", "skip"):
        raise ValueError(f"on_bad_row is {on_bad_row!r}; accepted: 'error', 'skip'")
    sources = [sources] if isinstance(sources, str) else list(sources)
    if not sources:
        raise ValueError(f"no data source given; accepted: {ACCEPTED_SOURCES}")

    pairs: list[Pair] = []
    bad_rows: list[dict[str, Any]] = []
    taken_ids: set[str] = set()
    last_numbers: dict[str, int] = collections.defaultdict(lambda: 1)
    for source in sources:
        short_name, rows = _open(source)
        for number, row in rows:
            try:
                pair = _pair(row, f"{short_name}:{number}", origin=(source, number))
            except _Unfit as unfit:
                bad_row = BadRow(source, number, str(unfit), _own_id(row))
                if on_bad_row == "error":
                    raise bad_row from None
                bad_rows.append(bad_row.as_record())
                continue
            pairs.append(_with_unique_id(pair, taken_ids, last_numbers))

    if bad_rows_path is not None and on_bad_row == "skip":
        atomic.write_json_lines(bad_rows_path, bad_rows)
    if not pairs:
        found = f"all {len(bad_rows)} rows are bad" if bad_rows else "no rows"
        first = f", the first one: {bad_rows[0]['reason']}" if bad_rows else ""
        raise ValueError(f"{', '.join(sources)}: no preference pair found ({found}{first})")
    return LoadedPairs(pairs, bad_rows)


def pairs_digest(pairs: Iterable[Pair]) -> str:
    """sha256 (hex) of the pairs' ids and texts, in order; it changes when any of them does."""
    digest = hashlib.sha256()
    for pair in pairs:
        turns = [[message["role"], message["content"]] for message in pair.prompt]
        line = json.dumps([pair.id, turns, pair.chosen, pair.rejected])
        digest.update(line.encode() + b"\n")
    return digest.hexdigest()


# Opening sources: each reader yields (1-based row number, row), a row being whatever was found.


def _open(source: str) -> tuple[str, Iterator[tuple[int, Any]]]:
    """A source's short name (for fallback ids) and its rows."""
    if not isinstance(source, str):
        raise ValueError(f"data source {source!r} is no string; accepted: {ACCEPTED_SOURCES}")
    if source.startswith("builtin:"):
        split = source.removeprefix("builtin:")
        if split not in ("train", "eval"):
            raise ValueError(f"no builtin data {source!r}; accepted: builtin:train, builtin:eval")
        return f"builtin-{split}", _jsonl_rows(_BUILTIN / f"{split}.jsonl", source)

    path = pathlib.Path(source).expanduser()
    if path.is_file():
        return path.stem, _file_rows(path, source)
    if path.is_dir():
        return path.name, _folder_rows(path, None, source)
    folder, at, split = source.rpartition("@")
    folder = pathlib.Path(folder).expanduser()
    if at and folder.is_dir():
        return f"{folder.name}@{split}", _folder_rows(folder, split, source)
    if at and folder.is_file():
        raise ValueError(f"{source}: a single file has no splits; write {str(folder)!r}")

    hub = _HUB_ID.fullmatch(source)
    if hub is None or hub["name"].endswith(_FILE_ENDINGS):
        raise FileNotFoundError(f"no data at {source!r}; accepted: {ACCEPTED_SOURCES}")
    if hub["split"] is None:
        raise FileNotFoundError(
            f"no data at {source!r}; if it is a hub id, name the split: {source}@train"
        )
    dataset = datasets.load_dataset(hub["name"], hub["config"], split=hub["split"])
    return source, _dataset_rows(dataset, source)


def _file_rows(path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    match path.suffix:
        case ".jsonl":
            return _jsonl_rows(path, source)
        case ".json":
            return _json_rows(path, source)
        case ".parquet":
            return _parquet_rows(path, source)
        case ".arrow":
            return _arrow_rows(path, source)
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
                yield number, _Unfit(f"not a line of JSON ({error})")


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


def _parquet_rows(path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    try:
        file = pq.ParquetFile(path)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not a Parquet file ({error})") from error
    columns = _needed_columns(file.schema_arrow.names, source)
    batches = file.iter_batches(batch_size=_READ_ROWS, columns=columns)
    return enumerate(itertools.chain.from_iterable(batch.to_pylist() for batch in batches), 1)


def _arrow_rows(path: pathlib.Path, source: str) -> Iterator[tuple[int, Any]]:
    try:
        dataset = datasets.Dataset.from_file(str(path))
    except pa.ArrowInvalid as error:
        raise ValueError(f"{source}: not an Arrow stream file ({error})") from error
    return _dataset_rows(dataset, source)


def _folder_rows(folder: pathlib.Path, split: str | None, source: str) -> Iterator[tuple[int, Any]]:
    known = ("dataset_dict.json", "dataset_info.json")
    if not any((folder / name).is_file() for name in known):
        raise ValueError(
            f"{source}: a folder without {' or '.join(known)}; accepted are folders written by "
            "datasets' save_to_disk"
        )
    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, datasets.DatasetDict):
        if split not in dataset:
            found = "no split named" if split is None else f"no split {split!r}"
            choices = ", ".join(f"{folder}@{name}" for name in dataset)
            raise ValueError(f"{source}: {found}; accepted: {choices}")
        dataset = dataset[split]
    elif split is not None:
        raise ValueError(f"{source}: this folder has no splits; write {str(folder)!r}")
    return _dataset_rows(dataset, source)


def _dataset_rows(dataset: datasets.Dataset, source: str) -> Iterator[tuple[int, Any]]:
    dataset = dataset.select_columns(_needed_columns(dataset.column_names, source))
    tables = dataset.with_format("arrow").iter(batch_size=_READ_ROWS)
    return enumerate(itertools.chain.from_iterable(table.to_pylist() for table in tables), 1)


def _needed_columns(columns: Sequence[str], source: str) -> list[str]:
    for needed in ("chosen", "rejected"):
        if needed not in columns:
            raise ValueError(f"{source}: no column `{needed}`; columns found: {', '.join(columns)}")
    return [name for name in _FIELDS if name in columns]


# Rows to pairs.


def _pair(row: Any, fallback_id: str, origin: tuple[str, int]) -> Pair:
    if isinstance(row, _Unfit):
        raise row
    if not isinstance(row, dict):
        raise _Unfit(f"{_kind(row)}; a row is an object with `chosen` and `rejected`")
    for field in ("chosen", "rejected"):
        if row.get(field) is None:
            raise _Unfit(f"no `{field}`; fields found: {', '.join(map(str, row)) or 'none'}")
    for field in ("id", "prompt_id"):
        if not isinstance(row.get(field), str | int | None) or isinstance(row.get(field), bool):
            raise _Unfit(f"`{field}` is {_kind(row[field])}; accepted: a string or an integer")

    chosen_prefix, chosen = _response(row["chosen"], "chosen")
    rejected_prefix, rejected = _response(row["rejected"], "rejected")
    prompt = _prompt(row.get("prompt"), chosen_prefix, rejected_prefix)
    for number, message in enumerate(prompt, 1):
        # An empty system message means something: it silences the template's default one.
        if message["role"] != "system" and not message["content"].strip():
            raise _Unfit(f"message {number} of the prompt ({message['role']}) is empty")
    for field, text in (("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise _Unfit(f"`{field}` is empty or white space only")
    if chosen.strip() == rejected.strip():
        raise _Unfit("`chosen` equals `rejected`")

    pair = Pair(_own_id(row) or fallback_id, prompt, chosen, rejected, origin)
    try:
        for text in (pair.id, chosen, rejected, *(message["content"] for message in prompt)):
            text.encode()
    except UnicodeEncodeError as error:
        raise _Unfit(f"text that is not Unicode ({error.reason})") from None
    return pair


def _own_id(row: Any) -> str | None:
    if not isinstance(row, dict):
        return None
    for field in ("id", "prompt_id"):
        value = row.get(field)
        if isinstance(value, str | int) and not isinstance(value, bool) and str(value).strip():
            return str(value)
    return None


def _with_unique_id(pair: Pair, taken: set[str], last_numbers: dict[str, int]) -> Pair:
    """The pair with an id that is not in `taken`; notes it there."""
    unique = pair.id
    while unique in taken:
        last_numbers[pair.id] += 1
        unique = f"{pair.id}#{last_numbers[pair.id]}"
    taken.add(unique)
    return pair if unique == pair.id else dataclasses.replace(pair, id=unique)


def _response(value: Any, field: str) -> tuple[tuple[Message, ...] | None, str]:
    """The turns before the response (None if the value holds the response alone), and its text."""
    if isinstance(value, str):
        if not value.startswith(_TRANSCRIPT_START):
            return None, value
        messages = _parse_transcript(value)
    else:
        messages = _messages(value, field)
    if messages[-1]["role"] != "assistant":
        raise _Unfit(f"the last turn of `{field}` is {messages[-1]['role']}, not assistant")
    if len(messages) == 1:
        return None, messages[0]["content"]
    _check_turns(messages, field)
    return tuple(messages[:-1]), messages[-1]["content"]


def _prompt(
    given: Any,
    chosen_prefix: tuple[Message, ...] | None,
    rejected_prefix: tuple[Message, ...] | None,
) -> tuple[Message, ...]:
    if (chosen_prefix is None) != (rejected_prefix is None):
        whole, alone = "chosen", "rejected"
        if chosen_prefix is None:
            whole, alone = alone, whole
        raise _Unfit(f"`{whole}` is a whole conversation, `{alone}` a response alone")
    if chosen_prefix is not None and chosen_prefix != rejected_prefix:
        raise _Unfit("the conversations in `chosen` and `rejected` differ before their last turn")

    if given is None:
        if chosen_prefix is None:
            raise _Unfit("no `prompt`, and `chosen` and `rejected` are responses alone")
        return chosen_prefix
    if isinstance(given, str) and not given.startswith(_TRANSCRIPT_START):
        if chosen_prefix is None:
            return ({"role": "user", "content": given},)
        first_user = next(turn["content"] for turn in chosen_prefix if turn["role"] == "user")
        if first_user.strip() != given.strip():
            raise _Unfit("`prompt` is not the first user turn of the conversation in `chosen`")
        return chosen_prefix

    if isinstance(given, str):
        turns = _parse_transcript(given)
        if turns[-1]["role"] != "assistant" or turns[-1]["content"].strip():
            raise _Unfit("`prompt` is a transcript that does not end in '\\n\\nAssistant:'")
        turns.pop()
    else:
        turns = _messages(given, "prompt")
    if turns[-1]["role"] != "user":
        raise _Unfit(f"the last turn of `prompt` is {turns[-1]['role']}, not user")
    _check_turns(turns, "prompt")
    if chosen_prefix is not None and tuple(turns) != chosen_prefix:
        raise _Unfit("`prompt` differs from the turns before the last one in `chosen`")
    return tuple(turns)


def _messages(value: Any, field: str) -> list[Message]:
    if not isinstance(value, list):
        raise _Unfit(f"`{field}` is {_kind(value)}; accepted: a string or a list of messages")
    if not value:
        raise _Unfit(f"`{field}` is an empty list")
    messages = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict):
            raise _Unfit(
                f"message {number} of `{field}` is {_kind(message)}; accepted: an object with "
                "`role` and `content`"
            )
        for key in ("role", "content"):
            if not isinstance(message.get(key), str):
                found = _kind(message[key]) if key in message else "missing"
                raise _Unfit(f"`{key}` of message {number} of `{field}` is {found}, not a string")
        messages.append({"role": message["role"], "content": message["content"]})
    return messages


def _check_turns(messages: Sequence[Message], field: str) -> None:
    """Turns after an optional system message are user, assistant, user, ..."""
    start = 1 if messages[0]["role"] == "system" else 0
    for place, message in enumerate(messages[start:]):
        wanted = ("user", "assistant")[place % 2]
        if message["role"] != wanted:
            raise _Unfit(
                f"message {start + place + 1} of `{field}` has role {message['role']!r} where "
                f"{wanted!r} is due; turns alternate user, assistant after an optional system"
            )


def _parse_transcript(text: str) -> list[Message]:
    """The turns of an hh-rlhf transcript; the one space after a colon belongs to the marker."""
    _, *parts = _TRANSCRIPT_TURN.split(text)
    names, contents = parts[::2], [content.removeprefix(" ") for content in parts[1::2]]
    return [
        {"role": _TRANSCRIPT_ROLES[name], "content": content}
        for name, content in zip(names, contents, strict=True)
    ]


def _kind(value: Any) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    return names.get(type(value), f"a value of type {type(value).__name__}")
