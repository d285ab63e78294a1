"""The settings of all slots, as arrays.

Shapes: B slots, E entries of a list, padded.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from attnpo_jax.sampling.responses import Request, Top
from attnpo_jax.sampling.sample import SlotSettings
from attnpo_jax.sampling.settings import SamplingSettings


def settings_of(requests: Sequence[Request | None], room: int) -> SlotSettings:
    """The settings of all slots; `room` is what a slot holds in all."""
    blank = SamplingSettings()
    settings = [blank if request is None else request.settings for request in requests]
    ends = [() if request is None else request.ends for request in requests]
    left = [room if request is None else room - len(request.tokens) for request in requests]
    bias = [tuple(s.logit_bias.items()) for s in settings]
    zeros = np.zeros(2, np.uint32)

    def column(name: str, dtype: Any) -> np.ndarray:
        return np.array([getattr(s, name) for s in settings], dtype)

    return SlotSettings(
        key_B2=np.stack([zeros if request is None else request.key for request in requests]),
        temperature_B=column("temperature", np.float32),
        top_k_B=column("top_k", np.int32),
        top_p_B=column("top_p", np.float32),
        min_p_B=column("min_p", np.float32),
        repetition_penalty_B=column("repetition_penalty", np.float32),
        presence_penalty_B=column("presence_penalty", np.float32),
        min_new_tokens_B=column("min_new_tokens", np.int32),
        max_new_tokens_B=np.minimum(column("max_new_tokens", np.int32), left).astype(np.int32),
        stop_BE=_padded(ends, -1, np.int32),
        bias_tokens_BE=_padded([[token for token, _ in b] for b in bias], -1, np.int32),
        bias_BE=_padded([[value for _, value in b] for b in bias], 0.0, np.float32),
    )


def tops_of(token_nk: np.ndarray, logprob_nk: np.ndarray, k: int) -> list[Top]:
    """The first k of the likeliest tokens of each step, with their log-probs."""
    both = zip(token_nk[:, :k].tolist(), logprob_nk[:, :k].tolist(), strict=True)
    return [tuple(zip(tokens, logprobs, strict=True)) for tokens, logprobs in both]


def _padded(rows: Sequence[Sequence[Any]], fill: Any, dtype: Any) -> np.ndarray:
    """Lists of different lengths as one array, whose width is a power of two: one of few."""
    longest = max(map(len, rows))
    padded = np.full((len(rows), 1 << max(longest - 1, 0).bit_length()), fill, dtype)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
