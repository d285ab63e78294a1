"""A pair's tokens as JSON, for processes that tokenize for each other; arrays as their bytes."""

import base64
import binascii
import dataclasses
import math
from typing import Any

import numpy as np

from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.judge.prompt import JudgePrompt
from attnpo_jax.prepare.pair_forms import PairForms
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.schema import (
    Choice,
    Flag,
    Listed,
    Mapped,
    Maybe,
    Number,
    Row,
    Table,
    Text,
    Whole,
)

_DTYPES = ("int32", "float32")  # 4 bytes each


@dataclasses.dataclass(frozen=True)
class _Array:
    """A form: an array as `_packed` writes it."""

    dtype: str
    ndim: int

    def check(self, value: Any) -> None:
        shape = Row((Whole(),) * self.ndim)
        table = {"dtype": Choice((self.dtype,)), "shape": shape, "bytes": Text()}
        Table(table).check(value)
        try:
            size = len(base64.b64decode(value["bytes"], validate=True))
        except (binascii.Error, ValueError):
            raise schema.SchemaError("is no base64", "bytes") from None
        if size != 4 * math.prod(value["shape"]):
            raise schema.SchemaError(f"has {size} bytes for the shape {value['shape']}")


_IDS, _SPANS = _Array("int32", 1), _Array("int32", 2)
_WEIGHTS = _Array("float32", 2)
_TOKENIZED = {
    "id": Text(),
    "prompt_ids": _IDS,
    "chosen_ids": _IDS,
    "rejected_ids": _IDS,
    "chosen_text_length": Whole(),
    "rejected_text_length": Whole(),
    "chosen_spans": _SPANS,
    "rejected_spans": _SPANS,
    "prompt_truncated": Flag(),
    "chosen_truncated": Flag(),
    "rejected_truncated": Flag(),
    "rejected_prompt_ids": _IDS,
    "chosen_cut_spans": _SPANS,
    "rejected_cut_spans": _SPANS,
    "written": Mapped(Text()),
}
_PROMPT = {
    "ids": Row((_IDS, _IDS)),
    "chosen_tokens": Row((_IDS, _IDS)),
    "chosen_spans": Row((_SPANS, _SPANS)),
    "rejected_tokens": Row((_IDS, _IDS)),
    "rejected_spans": Row((_SPANS, _SPANS)),
    "letter_ids": Row((Whole(), Whole())),
    "prefix_length": Whole(),
    "truncated": Flag(),
}
FORMS = Listed(
    Table(
        {
            "tokenized": Table(_TOKENIZED),
            "prompt": Maybe(Table(_PROMPT)),
            "precomputed": Maybe(Row((_WEIGHTS, _WEIGHTS))),
            "numbers": Mapped(Number()),
            "own": Maybe(Table(_TOKENIZED)),
        }
    )
)


def to_json(forms: PairForms) -> dict[str, Any]:
    """A pair's tokens, as `FORMS` lists them."""
    return _packed(forms)


def from_json(value: dict[str, Any]) -> PairForms:
    """The tokens that `to_json` has written; `value` has been checked."""
    prompt, precomputed, own = (value[name] for name in ("prompt", "precomputed", "own"))
    return PairForms(
        TokenizedPair(**_unpacked(value["tokenized"])),
        None if prompt is None else JudgePrompt(**_unpacked(prompt)),
        None if precomputed is None else _unpacked(precomputed),
        value["numbers"],
        None if own is None else TokenizedPair(**_unpacked(own)),
    )


def _packed(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        names = [field.name for field in dataclasses.fields(value)]
        return {name: _packed(getattr(value, name)) for name in names}
    if isinstance(value, np.ndarray):
        if value.dtype.name not in _DTYPES:
            raise TypeError(f"an array of {value.dtype}; accepted: {', '.join(_DTYPES)}")
        content = base64.b64encode(value.tobytes()).decode()
        return {"dtype": value.dtype.name, "shape": list(value.shape), "bytes": content}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (tuple, list)):
        return [_packed(one) for one in value]
    return dict(value) if isinstance(value, dict) else value


def _unpacked(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_unpacked(one) for one in value)
    if not isinstance(value, dict):
        return value
    if value.keys() == {"dtype", "shape", "bytes"}:
        content = base64.b64decode(value["bytes"])
        return np.frombuffer(content, value["dtype"]).reshape(value["shape"])
    return {name: _unpacked(one) for name, one in value.items()}
