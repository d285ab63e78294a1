"""What each setting of sampling accepts: a test, and the words for what passes it."""

import math
from collections.abc import Mapping
from typing import Any


def _number(value: Any, least: float, most: float) -> bool:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and math.isfinite(value) and least <= value <= most


def _whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and _number(value, least, most)


_MOST_TOKENS = 2**31 - 1
SETTINGS = {
    "temperature": (
        lambda v: _number(v, 0, 0) or _number(v, 0.01, 100),
        "0 (the likeliest token), or a number from 0.01 to 100",
    ),
    "top_k": (lambda v: _whole(v, 0, _MOST_TOKENS), "a whole number, 0 for all tokens"),
    "top_p": (lambda v: _number(v, 1e-6, 1), "a number above 0 (from 1e-6) up to 1"),
    "min_p": (lambda v: _number(v, 0, 1), "a number from 0 to 1"),
    "repetition_penalty": (lambda v: _number(v, 0.01, 100), "a number from 0.01 to 100"),
    "presence_penalty": (lambda v: _number(v, -100, 100), "a number from -100 to 100"),
    "max_new_tokens": (lambda v: _whole(v, 1, _MOST_TOKENS), "a whole number from 1 up"),
    "min_new_tokens": (lambda v: _whole(v, 0, _MOST_TOKENS), "a whole number from 0 up"),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "texts that are not empty",
    ),
    "stop_token_ids": (
        lambda v: isinstance(v, tuple) and all(_whole(i, 0, _MOST_TOKENS) for i in v),
        "token ids",
    ),
    "logit_bias": (
        lambda v: (
            isinstance(v, Mapping)
            and all(_whole(k, 0, _MOST_TOKENS) and _number(b, -1e4, 1e4) for k, b in v.items())
        ),
        "numbers from -10000 to 10000 by token id",
    ),
    "seed": (lambda v: _whole(v, -(2**63), 2**63 - 1), "a whole number of 64 bits"),
}
