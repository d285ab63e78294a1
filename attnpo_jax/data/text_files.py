"""Files of text that hold examples: JSON lines, JSON, CSV and TSV; and what they are packed in."""

import ast
import csv
import gzip
import mmap
import pathlib
import re
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from attnpo_jax.data import limits
from attnpo_jax.data.pair import BadExample
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.team import Team, check_alike

PACKED = (".gz", ".zst")
_READ = mmap.ACCESS_READ
_ENDS = schema.Listed(schema.Whole())  # of lines, in bytes
_Select = Callable[[Sequence[str], str], list[str]]  # a table's columns, its name -> those to read
# Strings, whole, and the signs between values; a quote alone opens a string that never ends.
_SIGNS = re.compile(rb'"(?:[^"\\]++|\\.)*+"|[][{},"]', re.DOTALL)
_SPACE = re.compile(rb"\s*")
# What no file of texts is packed to.
_RATIO = 200
_BLOCK = 1 << 20


class Unpacked:
    """A compressed file's content in a temporary file, which goes when this object does.

    Args:
      limit: bytes of an example. A file that unpacks to `limits.AT_ONCE` times as much and more is
        refused where no file of texts is packed so small.

    Attributes:
      path: where the content is.
    """

    def __init__(self, packed: pathlib.Path, source: str, limit: int):
        kind = packed.suffix.lower()
        if kind == ".zst" and not pa.Codec.is_available("zstd"):
            raise UserError(
                f"{source}: this build of pyarrow can't read zstd; accepted: another build, or the "
                "file unpacked"
            )
        self._file = tempfile.NamedTemporaryFile(prefix="attnpo-")
        self.path = pathlib.Path(self._file.name)
        most = max(limits.AT_ONCE * limit, _RATIO * packed.stat().st_size)
        try:
            if kind == ".gz":
                with gzip.open(packed) as content:
                    self._copy(content, source, most)
            else:
                with packed.open("rb") as raw, pa.CompressedInputStream(raw, "zstd") as content:
                    self._copy(content, source, most)
        # Of pyarrow's errors, those that are no failure of the disk have no number.
        except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{source}: not a whole {kind} file ({error})") from error
        self._file.flush()

    def _copy(self, content: Any, source: str, most: int) -> None:
        done = 0
        while block := content.read(_BLOCK):
            done += len(block)
            if done > most:
                raise UserError(
                    f"{source}: unpacks to more than {most} bytes; accepted: up to {_RATIO} times "
                    f"its size, or {limits.AT_ONCE} times data.max_example_bytes"
                )
            self._file.write(block)


class JsonLines:
    """A file of one object a line; blank lines are no examples.

    Args:
      limit: bytes of a line; a longer one is not read.
    """

    def __init__(
        self,
        path: pathlib.Path,
        source: str,
        team: Team,
        unpacked: Unpacked | None,
        limit: int,
    ):
        self._path, self._unpacked, self._limit = path, unpacked, limit
        self._size = size = path.stat().st_size
        check_alike(team, source, "bytes", size)
        part = team.part(size)
        ends: list[int] = []
        if part:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=_READ) as content:
                start = part.start
                while (end := content.find(b"\n", start, part.stop)) >= 0:
                    ends.append(start := end + 1)
        self._starts = np.concatenate([[0], *team.exchange(ends, _ENDS)]).astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        with self._path.open("rb") as file:
            for place in places:
                start = int(self._starts[place])
                end = int(self._starts[place + 1]) if place + 1 < len(self._starts) else self._size
                if end - start > self._limit:
                    yield place + 1, limits.too_large(end - start, self._limit)
                    continue
                file.seek(start)
                line = file.read(end - start)
                if line.strip():
                    yield place + 1, _parsed(line)


def _parsed(text: bytes) -> Any:
    try:
        return limits.parse_json(text)
    except BadExample as bad:
        return bad


class JsonList:
    """A file that is one JSON document: a list of examples, or an object with one in `data`.

    Where its examples lie is looked up once; each is read when it is asked for.

    Args:
      limit: bytes of an example; a longer one is not read.
    """

    def __init__(self, path: pathlib.Path, source: str, unpacked: Unpacked | None, limit: int):
        self._path, self._unpacked, self._limit = path, unpacked, limit
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=_READ) as content:
                self._places = _listed(content, limit)
        except (BadExample, ValueError) as error:  # a ValueError: the file is empty
            raise UserError(
                f"{source}: not a JSON file ({error}); a file with one object a line ends in .jsonl"
            ) from error
        if self._places is None:
            raise UserError(f'{source}: accepted is a list of examples or {{"data": [examples]}}')

    def __len__(self) -> int:
        return len(self._places)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        with self._path.open("rb") as file:
            for place in places:
                start, end = self._places[place].tolist()
                if end - start > self._limit:
                    yield place + 1, limits.too_large(end - start, self._limit)
                    continue
                file.seek(start)
                yield place + 1, _parsed(file.read(end - start))


def _listed(content: mmap.mmap, limit: int) -> np.ndarray | None:
    """[start, end) bytes (n, 2) of the examples of a JSON document; None where it lists none.

    Only brackets, commas and strings are looked at here. What is around the list is checked, what
    is in it when it is read.

    Raises:
      BadExample: it is no JSON document.
    """
    begin = 3 if content[:3] == b"\xef\xbb\xbf" else 0
    depth, list_depth = 0, 1
    found: list[tuple[int, int]] = []
    opened = start = closed = None  # where the list begins, an element does, the list ends
    key = b""
    for sign in _SIGNS.finditer(content, begin):
        at, end = sign.span()
        match content[at : at + 1]:
            case b"[" | b"{":
                depth += 1
                is_list = content[at : at + 1] == b"["
                if depth == 1:
                    list_depth = 1 if is_list else 2
                if depth == list_depth and is_list and (depth == 1 or key == b'"data"'):
                    found, opened, closed, start = [], at, None, end
            case b"]" | b"}":
                if depth == list_depth and opened is not None and closed is None:
                    if found or _SPACE.match(content, start).end() < at:
                        found.append((start, at))
                    closed = end
                depth -= 1
            case b"," if depth == list_depth and opened is not None and closed is None:
                found.append((start, at))
                start = end
            case b'"' if depth == 1:
                key = content[at:end] if end - at == 6 else b""
    if opened is not None and closed is None:
        raise BadExample("a list that does not end")
    first, last = (opened, closed) if opened is not None else (len(content), len(content))
    if first + len(content) - last > limit:
        raise limits.too_large(first + len(content) - last, limit)
    around = limits.parse_json(content[:first] + (b"[]" if last > first else b"") + content[last:])
    listed = around.get("data") if isinstance(around, dict) else around
    return np.array(found, np.int64).reshape(-1, 2) if listed == [] and opened is not None else None


class Listed:
    """A file that every process has to read all of.

    Args:
      examples: what it holds; BadExample in place of what is none.
    """

    def __init__(self, examples: Sequence[Any]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def read(self, places: Sequence[int]) -> Iterator[tuple[int, Any]]:
        return ((place + 1, self._examples[place]) for place in places)


def delimited(
    path: pathlib.Path, source: str, delimiter: str, select: _Select, limit: int
) -> Listed:
    """The examples of a CSV or TSV file with a line of column names; none of more bytes than the
    limit.

    Cells are texts: an empty one is null, and one that is quoted (`""`) is an empty text. A list of
    messages in a cell, as JSON or as Python writes it, is read as one.
    """
    bad: dict[int, BadExample] = {}

    def refuse(row: pa_csv.InvalidRow) -> str:
        # Rows are numbered from 1, that of the names included.
        found = f"{row.actual_columns} cells where {row.expected_columns} are due"
        bad[row.number - 2] = BadExample(f"{found}: {row.text[:60]!r}")
        return "skip"

    # The number of a row that is refused is known to a single thread alone.
    reading = pa_csv.ReadOptions(use_threads=False, block_size=min(limit, 2**31 - 1))
    parsing = pa_csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
    )
    try:
        names = _names(path, delimiter, limit)
        table = pa_csv.read_csv(
            path,
            read_options=reading,
            parse_options=parsing,
            convert_options=pa_csv.ConvertOptions(
                column_types=dict.fromkeys(names, pa.string()),
                include_columns=select(names, source),
                null_values=[""],
                strings_can_be_null=True,
                quoted_strings_can_be_null=False,
            ),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError, csv.Error) as error:
        if "straddling" in str(error):
            raise UserError(
                f"{source}: a row has more bytes than data.max_example_bytes = {limit}"
            ) from error
        raise UserError(f"{source}: not a file of cells between {delimiter!r} ({error})") from error
    rows: Iterator[dict[str, Any]] = iter(table.to_pylist())
    examples: list[Any] = []
    for place in range(table.num_rows + len(bad)):
        if place in bad:
            examples.append(bad[place])
        else:
            examples.append({name: _cell(text) for name, text in next(rows).items()})
    return Listed(examples)


def _names(path: pathlib.Path, delimiter: str, limit: int) -> list[str]:
    """The names in the first line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = iter(lambda: file.readline(limit), "")
        return next(csv.reader(lines, delimiter=delimiter), [])


def _cell(text: str | None) -> Any:
    """A list of messages that a cell spells, or the cell's text."""
    if text is None or not text.lstrip().startswith(("[", "{")):
        return text
    for parse in (limits.parse_json, ast.literal_eval):
        try:
            value = parse(text)
            limits.check(value)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
        turns = value if isinstance(value, list) else [value]
        keys = ({"role", "content"}, {"from", "value"})
        if turns and all(isinstance(t, dict) and any(k <= {*t} for k in keys) for t in turns):
            return value
    return text
