"""How large and how deep an example may be: files of others may hold anything."""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from attnpo_jax.data.pair import BadExample

MAX_EXAMPLE_BYTES = 1 << 24
"""Default of `data.max_example_bytes`."""
# What is read at once of a table, or unpacked of a file, may take so many times an example's limit.
AT_ONCE = 64
# What walks through a value calls itself for every level, and Python allows a thousand calls.
_DEEPEST = 64
# No float is larger; Python refuses to write integers of more than 4300 digits.
_LARGEST_BITS = 1023


def too_large(size: int, limit: int) -> BadExample:
    """What becomes of an example of more bytes than the limit."""
    return BadExample(
        f"the example has {size} bytes; accepted: up to data.max_example_bytes = {limit}"
    )


def parse_json(text: str | bytes) -> Any:
    """A value from JSON in UTF-8, a byte order mark before it or not.

    Raises:
      BadExample: it is not JSON, nested too deeply, or holds an integer of too many digits.
    """
    try:
        # utf-8-sig: some editors put a byte order mark before the first line.
        value = json.loads(text.decode("utf-8-sig") if isinstance(text, bytes) else text)
    except RecursionError:
        raise BadExample(f"nested more than {_DEEPEST} levels deep") from None
    except ValueError as error:  # of JSON, of UTF-8, or of integers
        raise BadExample(f"not JSON ({str(error).partition(';')[0]})") from None
    check(value)
    return value


def check(value: Any) -> None:
    """Raises BadExample where a value is nested too deeply or holds too large an integer."""
    level = [value]
    for _ in range(_DEEPEST):
        below: list[Any] = []
        for one in level:
            if isinstance(one, Mapping):
                below += one.values()
            elif isinstance(one, (list, tuple)):
                below += one
            elif isinstance(one, int) and one.bit_length() > _LARGEST_BITS:
                digits = int(one.bit_length() * 0.30103) + 1
                raise BadExample(f"an integer of about {digits} digits; accepted: up to 308")
        if not below:
            return
        level = below
    raise BadExample(f"nested more than {_DEEPEST} levels deep")


def sizes(table: pa.Table) -> np.ndarray:
    """How many bytes each row of a table takes as texts and numbers, int64 (rows,).

    Raises:
      BadExample: a column is of a type that is not known here.
    """
    total = np.zeros(len(table), np.int64)
    for column in table.columns:
        of_chunks = [_sizes(chunk) for chunk in column.chunks]
        total += np.concatenate([np.zeros(0, np.int64), *of_chunks])
    return total


def _sizes(array: pa.Array) -> np.ndarray:
    kind = array.type
    if pa.types.is_dictionary(kind):
        of_entries = np.append(_sizes(array.dictionary), 0)
        return of_entries[pc.fill_null(array.indices, len(of_entries) - 1).to_numpy()]
    if isinstance(array, pa.ExtensionArray):
        return _sizes(array.storage)
    if pa.types.is_map(kind):
        return _summed(array.offsets, _sizes(array.keys) + _sizes(array.items))
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return _summed(array.offsets, _sizes(array.values))
    if pa.types.is_fixed_size_list(kind):
        each = _sizes(pc.fill_null(array, [None] * kind.list_size).flatten())
        return each.reshape(len(array), kind.list_size).sum(axis=1)
    if pa.types.is_struct(kind):
        return sum(map(_sizes, array.flatten()), np.zeros(len(array), np.int64))
    texts = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary)
    if any(is_text(kind) for is_text in (*texts, pa.types.is_large_binary)):
        return pc.fill_null(pc.binary_length(array), 0).to_numpy().astype(np.int64)
    if pa.types.is_null(kind):
        return np.zeros(len(array), np.int64)
    try:
        return np.full(len(array), max(kind.bit_width // 8, 1), np.int64)
    except ValueError:  # of no fixed width
        raise BadExample(f"a column of Arrow's type {kind} is not supported") from None


def _summed(offsets: pa.Array, of_values: np.ndarray) -> np.ndarray:
    ends = np.concatenate([[0], np.cumsum(of_values)])
    return np.diff(ends[offsets.to_numpy()])


def runs_of(of_rows: np.ndarray, limit: int) -> list[slice]:
    """Rows in runs of at most 64 that take no more than `limit` bytes together, or of one."""
    runs, start, taken = [], 0, 0
    for i, size in enumerate(of_rows.tolist()):
        if i > start and (taken + size > limit or i - start == 64):
            runs.append(slice(start, i))
            start, taken = i, 0
        taken += size
    return [*runs, slice(start, len(of_rows))] if len(of_rows) else []
