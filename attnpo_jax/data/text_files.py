"""Files of text that hold examples: JSON lines, JSON, CSV and TSV; and what they are packed in."""

import ast
import csv
import gzip
import json
import mmap
import pathlib
import shutil
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv

from attnpo_jax.data.pair import BadExample
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.team import Team, check_alike

PACKED = (".gz", ".zst")
_READ = mmap.ACCESS_READ
_ENDS = schema.Listed(schema.Whole())  # of lines, in bytes
_Select = Callable[[Sequence[str], str], list[str]]  # a table's columns, its name -> those to read


class Unpacked:
    """A compressed file's content in a temporary file, which goes when this object does.

    Attributes:
      path: where the content is.
    """

    def __init__(self, packed: pathlib.Path, source: str):
        kind = packed.suffix.lower()
        if kind == ".zst" and not pa.Codec.is_available("zstd"):
            raise UserError(
                f"{source}: this build of pyarrow can't read zstd; accepted: another build, or the "
                "file unpacked"
            )
        self._file = tempfile.NamedTemporaryFile(prefix="attnpo-")
        self.path = pathlib.Path(self._file.name)
        try:
            if kind == ".gz":
                with gzip.open(packed) as content:
                    shutil.copyfileobj(content, self._file)
            else:
                with packed.open("rb") as raw, pa.CompressedInputStream(raw, "zstd") as content:
                    shutil.copyfileobj(content, self._file)
        # Of pyarrow's errors, those that are no failure of the disk have no number.
        except (gzip.BadGzipFile, EOFError, zlib.error, pa.ArrowInvalid, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise UserError(f"{source}: not a whole {kind} file ({error})") from error
        self._file.flush()


class JsonLines:
    """A file of one object a line; blank lines are no examples."""

    def __init__(self, path: pathlib.Path, source: str, team: Team, unpacked: Unpacked | None):
        self._path, self._unpacked = path, unpacked
        size = path.stat().st_size
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
                file.seek(self._starts[place])
                line = file.readline()
                if not line.strip():
                    continue
                try:
                    # utf-8-sig: some editors put a byte order mark before the first line.
                    yield place + 1, json.loads(line.decode("utf-8-sig"))
                except (json.JSONDecodeError, UnicodeDecodeError) as error:
                    yield place + 1, BadExample(f"not a line of JSON ({error})")


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


def json_list(path: pathlib.Path, source: str) -> Listed:
    """The examples of a file that is one JSON document."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{source}: not a JSON file ({error}); a file with one object a line ends in .jsonl"
        ) from error
    examples = content.get("data") if isinstance(content, dict) else content
    if not isinstance(examples, list):
        raise UserError(f'{source}: accepted is a list of examples or {{"data": [examples]}}')
    return Listed(examples)


def delimited(path: pathlib.Path, source: str, delimiter: str, select: _Select) -> Listed:
    """The examples of a CSV or TSV file with a line of column names.

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
    reading = pa_csv.ReadOptions(use_threads=False)
    parsing = pa_csv.ParseOptions(
        delimiter=delimiter, newlines_in_values=True, invalid_row_handler=refuse
    )
    try:
        names = _names(path, delimiter)
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
        raise UserError(f"{source}: not a file of cells between {delimiter!r} ({error})") from error
    rows: Iterator[dict[str, Any]] = iter(table.to_pylist())
    examples: list[Any] = []
    for place in range(table.num_rows + len(bad)):
        if place in bad:
            examples.append(bad[place])
        else:
            examples.append({name: _cell(text) for name, text in next(rows).items()})
    return Listed(examples)


def _names(path: pathlib.Path, delimiter: str) -> list[str]:
    """The names in the first line."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        return next(csv.reader(file, delimiter=delimiter), [])


def _cell(text: str | None) -> Any:
    """A list of messages that a cell spells, or the cell's text."""
    if text is None or not text.lstrip().startswith(("[", "{")):
        return text
    for parse in (json.loads, ast.literal_eval):
        try:
            value = parse(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        turns = value if isinstance(value, list) else [value]
        keys = ({"role", "content"}, {"from", "value"})
        if turns and all(isinstance(t, dict) and any(k <= {*t} for k in keys) for t in turns):
            return value
    return text
