"""The columns of a prepared dataset, and rows to Arrow shards and back.

One row a pair:

- `id`: string;
- `prompt_ids`, `chosen_ids`, `rejected_ids`: int32, as trained on;
- `chosen_text_length`, `rejected_text_length`: int32, how many leading tokens of the response are
  text; the rest are template tokens;
- `judge_chosen`, `judge_rejected`: float32 (2, S, T), raw attention by order, layer and text
  token;
- `judge_verdict`, where it was asked for: float32 (2,), by order, log p(letter of the chosen
  response) minus log p(the other letter);
- `ref_chosen_logps`, `ref_rejected_logps`: float32, reference log-probs of every response token;
- `ref_chosen_entropy`, `ref_rejected_entropy`: float32, entropy in nats of the reference's
  distribution of every response token;
- `score_chosen`, `score_rejected`: float32, what a scorer of the config says of every response
  token.

- `judge_chosen_whole`, `judge_rejected_whole`, where they were asked for: float32 (2, S, 4), of the
  response as the judge read it, whatever training cuts off: the sum of its attention, that of its
  first token, how many tokens it has, and the place of its first one among those trained on, below
  0 where that is cut off;
- `rejected_prompt_ids`, where responses may have prompts of their own: int32, the rejected one's,
  empty where `prompt_ids` is the prompt of both.

Of the judge's columns, the reference's and a scorer's (`GROUPS`), a dataset has those that
something reads.
Where weights came with the data, there are

- `ready_chosen`, `ready_rejected`: float32 (K, T), these weights by column and text token.

Where `data.fields` names them, there are

- `weight`, `margin`: float32, the pair's.

A shard is an Arrow stream. Its schema's metadata has `sha256`, of the file's bytes with 64 zeros in
the sum's own place: damage to it shows before there is a `prepared.json`, which has each shard's
sum too.

A shard is read without a Python object per element: columns are kept as flat values and offsets.
"""

import hashlib
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from attnpo_jax.data.pair import NUMBERS
from attnpo_jax.runtime.errors import UserError

_RESPONSES = ("chosen", "rejected")
_INT_LISTS = ("prompt_ids", "chosen_ids", "rejected_ids")
_OWN_PROMPT = "rejected_prompt_ids"
_JUDGE = ("judge_chosen", "judge_rejected")
_WHOLE = ("judge_chosen_whole", "judge_rejected_whole")
_READY = ("ready_chosen", "ready_rejected")
_TEXT_LENGTHS = ("chosen_text_length", "rejected_text_length")

GROUPS = {
    "judge": (*_JUDGE, *_WHOLE, "judge_verdict"),
    "reference_logps": ("ref_chosen_logps", "ref_rejected_logps"),
    "reference_entropy": ("ref_chosen_entropy", "ref_rejected_entropy"),
    "scorer": ("score_chosen", "score_rejected"),
}
"""The columns that are computed where something reads them, by what has to be asked for."""

_SUM, _NO_SUM = b"sha256", b"0" * 64

_OF_TOKENS = ("reference_logps", "reference_entropy", "scorer")
_FLOAT_LISTS = tuple(name for group in _OF_TOKENS for name in GROUPS[group])


def features(
    num_sources: int,
    num_columns: int = 0,
    verdict: bool = True,
    numbers: Sequence[str] = (),
    groups: Sequence[str] = ("judge", "reference_logps"),
    alone: bool = False,
    whole_responses: bool = False,
    own_prompts: bool = False,
) -> datasets.Features:
    """The columns of a prepared dataset with `num_sources` (S) judged layers and `num_columns` (K)
    columns of precomputed weights; of the judge's, `verdict` and figures of `whole_responses` or
    none; of `pair.NUMBERS`, `numbers`; of `GROUPS`, `groups`; `own_prompts`, or one prompt for both
    responses always. `alone`: nothing but the ids and these groups.
    """
    int_list = datasets.List(datasets.Value("int32"))
    float_list = datasets.List(datasets.Value("float32"))
    columns = {"id": datasets.Value("string")}
    if alone:
        num_columns, numbers = 0, ()
    else:
        columns |= dict.fromkeys((*_INT_LISTS, *([_OWN_PROMPT] if own_prompts else [])), int_list)
        columns |= dict.fromkeys(_TEXT_LENGTHS, datasets.Value("int32"))
    if num_sources and "judge" in groups:
        by_source = datasets.List(float_list, length=num_sources)
        judge = (*_JUDGE, *(_WHOLE if whole_responses else ()))
        columns |= dict.fromkeys(judge, datasets.List(by_source, length=2))
        if verdict:
            columns["judge_verdict"] = datasets.List(datasets.Value("float32"), length=2)
    for group in _OF_TOKENS:
        if group in groups:
            columns |= dict.fromkeys(GROUPS[group], float_list)
    if num_columns:
        columns |= dict.fromkeys(_READY, datasets.List(float_list, length=num_columns))
    columns |= dict.fromkeys(numbers, datasets.Value("float32"))
    return datasets.Features(columns)


def _matrix_shapes(columns: datasets.Features) -> dict[str, tuple[int, ...]]:
    """The leading axes of the columns that hold more than a list: (2, S) or (K,)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name in (*_JUDGE, *_WHOLE, *_READY):
        if name in columns:
            inner = columns[name].feature
            nested = isinstance(inner.feature, datasets.List)
            shapes[name] = (columns[name].length, *((inner.length,) if nested else ()))
    return shapes


def to_table(rows: Sequence[Mapping[str, Any]], columns: datasets.Features) -> pa.Table:
    """Rows as a table with exactly `columns`; ValueError names the row and column that is wrong."""
    schema, shapes = columns.arrow_schema, _matrix_shapes(columns)
    checked = [_checked_row(row, columns, shapes) for row in rows]
    arrays = []
    for field in schema:
        values = [row[field.name] for row in checked]
        if (size := sum(map(np.size, values))) > np.iinfo(np.int32).max:
            raise UserError(f"{size} values in a column of one shard; lower rows_per_shard")
        arrays.append(pa.array(map(_lists, values), field.type))
    return pa.Table.from_arrays(arrays, schema=schema)


def _lists(value: Any) -> Any:
    """An array as lists of its last axis's arrays, which Arrow copies as they are."""
    return [_lists(part) for part in value] if np.ndim(value) > 1 else value


def _checked_row(
    row: Mapping[str, Any], columns: datasets.Features, leading: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The row with arrays of the columns' types, every shape checked against the others."""
    if set(row) != set(columns):
        lacking, surplus = sorted(set(columns) - set(row)), sorted(set(row) - set(columns))
        raise ValueError(f"row {row.get('id')!r}: lacks {lacking}, has unknown {surplus}")
    if not isinstance(row["id"], str):
        raise ValueError(f"row {row['id']!r}: `id` is no string")

    checked: dict[str, Any] = {"id": row["id"]}
    alone = "prompt_ids" not in columns  # then, the lengths are not known here
    for name in () if alone else _INT_LISTS:
        checked[name] = _checked_ids(row, name)
    for name in () if alone else _TEXT_LENGTHS:
        checked[name] = int(_checked_array(row, name, "iu", ()))
    if _OWN_PROMPT in columns:
        own = np.asarray(row[_OWN_PROMPT], np.int32)
        checked[_OWN_PROMPT] = own if own.size == 0 else _checked_ids(row, _OWN_PROMPT)
    for response in _RESPONSES:
        tokens = None if alone else len(checked[f"{response}_ids"])
        text_length = None if alone else checked[f"{response}_text_length"]
        if not alone and not 1 <= text_length <= tokens:
            raise ValueError(
                f"row {row['id']!r}: `{response}_text_length` is {text_length}; accepted: 1 to "
                f"{tokens}, the number of `{response}_ids`"
            )
        shapes = {
            name: (*leading[name], length)
            for name, length in (
                (f"judge_{response}", text_length),
                (f"judge_{response}_whole", 4),
                (f"ready_{response}", text_length),
            )
            if name in leading
        }
        of_tokens = (f"ref_{response}_logps", f"ref_{response}_entropy", f"score_{response}")
        shapes |= {name: (tokens,) for name in of_tokens if name in columns}
        for name, shape in shapes.items():
            checked[name] = _checked_array(row, name, "f", shape).astype(np.float32)
    if "judge_verdict" in columns:
        verdict = _checked_array(row, "judge_verdict", "f", (2,))
        checked["judge_verdict"] = verdict.astype(np.float32)
    for name in NUMBERS:
        if name in columns:
            checked[name] = float(_checked_array(row, name, "f", ()))
    return checked


def _checked_ids(row: Mapping[str, Any], name: str) -> np.ndarray:
    return _checked_array(row, name, "iu", (None,)).astype(np.int32)


def _checked_array(
    row: Mapping[str, Any], name: str, kinds: str, shape: tuple[int | None, ...]
) -> np.ndarray:
    value = np.asarray(row[name])
    fits = value.ndim == len(shape) and all(
        wanted in (None, found) for wanted, found in zip(shape, value.shape, strict=True)
    )
    # ml_dtypes' bfloat16 has kind "V"; it is refused too: float32 is what the columns promise.
    if not fits or value.dtype.kind not in kinds or value.size == 0:
        shape_text = "at least one" if shape == (None,) else f"shape {shape}"
        accepted = f"{'integers' if 'i' in kinds else 'floats'}, {shape_text}"
        raise ValueError(
            f"row {row['id']!r}: `{name}` is {value.dtype} of shape {value.shape}; accepted: "
            f"{accepted}"
        )
    if not np.isfinite(value).all():
        raise UserError(f"row {row['id']!r}: `{name}` holds a value that is not finite")
    return value


def to_bytes(table: pa.Table) -> bytes:
    """The file of a shard with this table, its own sum in it."""
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), _SUM: _NO_SUM})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    content = sink.getvalue().to_pybytes()
    return content.replace(_NO_SUM, hashlib.sha256(content).hexdigest().encode(), 1)


def check_sum(file: pathlib.Path, table: pa.Table) -> None:
    """ValueError if the file has a sum, as `table` says, and it is not that of the file's bytes."""
    if (found := (table.schema.metadata or {}).get(_SUM)) is None:
        return
    content = file.read_bytes().replace(found, _NO_SUM, 1)
    if hashlib.sha256(content).hexdigest().encode() != found:
        raise ValueError("not the bytes that were written")


def read_table(file: pathlib.Path) -> pa.Table:
    """The table of a shard file, memory-mapped; pa.ArrowInvalid if it is no whole stream."""
    with pa.memory_map(str(file)) as source:
        return pa.ipc.open_stream(source).read_all()


def check_table(table: pa.Table, expected: datasets.Features, num_rows: int) -> None:
    """ValueError unless the table has these columns, this many rows, and sound offsets."""
    if not table.schema.equals(expected.arrow_schema):
        raise ValueError(f"columns {table.schema.names} of other types than a prepared dataset's")
    if table.num_rows != num_rows or table.column("id").num_chunks > 1:
        raise ValueError(f"{table.num_rows} rows, expected {num_rows} in one batch")
    table.validate(full=True)


def check_ids(table: pa.Table, ids: Sequence[str]) -> None:
    """ValueError unless the table's `id` column is `ids`."""
    for place, (found, wanted) in enumerate(zip(table.column("id").to_pylist(), ids, strict=True)):
        if found != wanted:
            raise ValueError(f"row {place} of the shard has id {found!r}, expected {wanted!r}")


class Shard:
    """One shard's columns as flat values and row offsets, views of the mapped file."""

    def __init__(self, table: pa.Table):
        columns = {name: table.column(name).combine_chunks() for name in table.column_names}
        self._ids = columns["id"]
        self._text_lengths = {
            name: columns[name].to_numpy() for name in _TEXT_LENGTHS if name in columns
        }
        self._lists = {
            name: (columns[name].offsets.to_numpy(), columns[name].values.to_numpy())
            for name in (*_INT_LISTS, _OWN_PROMPT, *_FLOAT_LISTS)
            if name in columns
        }
        self._verdicts = None
        if "judge_verdict" in columns:
            self._verdicts = columns["judge_verdict"].values.to_numpy().reshape(-1, 2)
        self._numbers = {name: columns[name].to_numpy() for name in NUMBERS if name in columns}
        self._matrices = {}
        for name in (*_JUDGE, *_WHOLE, *_READY):
            if name in columns:
                array, shape = columns[name], []
                while pa.types.is_fixed_size_list(array.type):
                    shape.append(array.type.list_size)
                    array = array.values
                # A row's lists are neighbours of one length: its values are one block.
                starts = array.offsets.to_numpy()[:: math.prod(shape)]
                self._matrices[name] = (shape, starts, array.values.to_numpy())

    def row(self, row: int) -> dict[str, Any]:
        """Row `row` of the shard; arrays are views."""
        content: dict[str, Any] = {"id": self._ids[row].as_py()}
        for name, (offsets, values) in self._lists.items():
            content[name] = values[offsets[row] : offsets[row + 1]]
        for name, lengths in self._text_lengths.items():
            content[name] = int(lengths[row])
        for name, (shape, starts, values) in self._matrices.items():
            block = values[starts[row] : starts[row + 1]]
            content[name] = block.reshape(*shape, -1)
        if self._verdicts is not None:
            content["judge_verdict"] = self._verdicts[row]
        for name, values in self._numbers.items():
            content[name] = float(values[row])
        return content

    def lengths(self, name: str) -> np.ndarray:
        """Length of every row's last axis in column `name`, int32 (rows,)."""
        if name in self._text_lengths:
            return self._text_lengths[name]
        if name in self._matrices:
            shape, starts, _ = self._matrices[name]
            return np.diff(starts) // math.prod(shape)
        return np.diff(self._lists[name][0])

    def ids(self) -> list[str]:
        """The rows' ids."""
        return self._ids.to_pylist()
