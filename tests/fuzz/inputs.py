"""Odd values, and whole things with something odd in them."""

import copy
import json
from typing import Any

from hypothesis import strategies as st

odd_texts = st.sampled_from(
    [
        "", " ", "\0", "\ud800", "\x1b]0;x\x07", "[/red]", "[link=x]y[/link]", "../../etc/passwd",
        "/dev/zero", "nan", "-1", "1e999", "9" * 5000, "[" * 3000, "{", "'", "a" * 3000, "None",
        "\u202e", "🙂", "\n", "{{", "None,", "a*1e999",
    ]
) | st.text(max_size=8)  # fmt: skip

_numbers = st.sampled_from(
    [0, 1, -1, 2, 2**31, 2**63, 2**64, -(2**70), 10**400, 1e12, 0.5, 1e308, -0.0]
    + [float("nan"), float("inf")]
)

json_values = st.recursive(
    st.none() | st.booleans() | _numbers | st.integers() | st.floats() | odd_texts,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(odd_texts, inner, max_size=3)
        | inner.map(lambda value: [[[[value]]]])
    ),
    max_leaves=5,
)


def _places(value: dict | list) -> list[tuple]:
    """The keys that lead to each part of a value; none, to all of it."""
    found: list[tuple] = [()]
    for key, part in value.items() if isinstance(value, dict) else enumerate(value):
        inner = _places(part) if isinstance(part, (dict, list)) else [()]
        found += [(key, *path) for path in inner]
    return found


@st.composite
def mutated_json(draw, whole: Any) -> bytes:
    """JSON of a whole value, of which up to two parts are gone, or something else."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(0, 2))):
        if not isinstance(value, (dict, list)):
            break
        *parents, last = draw(st.sampled_from(_places(value))) or (None,)
        if last is None:
            value = draw(json_values)
            continue
        inside = value
        for key in parents:
            inside = inside[key]
        change = draw(st.sampled_from(["replace", "remove", "rename"]))
        if change == "replace":
            inside[last] = draw(json_values)
        else:
            old = inside.pop(last)
            if change == "rename" and isinstance(inside, dict):
                inside[draw(odd_texts)] = old
    return _dumps(value)


def _dumps(value: Any) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    except ValueError:  # an integer of more digits than Python writes
        return b"1" + b"0" * 5000


_DEEP = b"[" * 100_000


@st.composite
def damaged(draw, whole: bytes) -> bytes:
    """Bytes of which some may be others, more or fewer; half the time they are as they were."""
    kind = draw(st.sampled_from([None, None, None, "flip", "cut", "insert"]))
    if kind is None or not whole:
        return whole
    # Headers are at the beginning, and most of a file of weights is beyond all reading.
    at = draw(st.integers(0, min(len(whole) - 1, 2000)) | st.integers(0, len(whole) - 1))
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]
    if kind == "cut":
        return whole[:at]
    new = draw(
        st.binary(min_size=1, max_size=8) | st.sampled_from([_DEEP, b"\xff" * 8, b"\0" * 16])
    )
    return whole[:at] + new + whole[at:]
