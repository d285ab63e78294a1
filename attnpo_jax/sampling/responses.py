"""What is asked of the engine, and what comes of it."""

import dataclasses
import functools
import hashlib
from typing import Literal

import numpy as np

from attnpo_jax.sampling.sample import Features
from attnpo_jax.sampling.settings import SamplingSettings

FinishReason = Literal["stop", "length", "error"]
Top = tuple[tuple[int, float], ...]
"""The likeliest tokens with their log-probs, the first one first."""

# Programs tell of so many of the likeliest tokens: one of few.
_TOPS = (0, 5, 20)
MOST_TOP_LOGPROBS = _TOPS[-1]


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """A response that is wanted.

    Attributes:
      id: of the prompt. Draws depend on it.
      tokens: int32, the prompt's, at least one.
      settings: how the response is drawn.
      sample: which of the prompt's responses it is, from 0. Draws depend on it.
      stop_tokens: tokens that end it, beside those of the settings.
      top_logprobs: of how many of the likeliest tokens log-probs are told, `MOST_TOP_LOGPROBS` at
        most. What is sampled does not depend on it.
    """

    id: str
    tokens: np.ndarray
    settings: SamplingSettings
    sample: int = 0
    stop_tokens: tuple[int, ...] = ()
    top_logprobs: int = 0

    @functools.cached_property
    def features(self) -> Features:
        """What a program needs for it."""
        top = next(k for k in _TOPS if k >= self.top_logprobs)
        return dataclasses.replace(self.settings.features, top_logprobs=top)

    @functools.cached_property
    def key(self) -> np.ndarray:
        """uint32 (2,): what all draws of the response begin with."""
        named = f"{self.settings.seed}\0{self.sample}\0{self.id}"
        digest = hashlib.blake2b(named.encode("utf-8", "surrogatepass"), digest_size=8)
        return np.frombuffer(digest.digest(), "<u4")

    @functools.cached_property
    def ends(self) -> tuple[int, ...]:
        """All tokens that end the response."""
        return tuple(dict.fromkeys((*self.stop_tokens, *self.settings.stop_token_ids)))


@dataclasses.dataclass(frozen=True)
class Response:
    """What came of a request.

    Attributes:
      text: without special tokens, and up to the stop text that ended it.
      tokens: what was sampled, the one that ended it included.
      logprobs: their log-probs under the model's own distribution: temperature 1, nothing cut off.
      finish_reason: `stop` at a stop token or text, `length` where there was no more room, `error`
        where the model gave logits that are no numbers.
      prompt_tokens, cached_tokens: of the prompt; of these, what was not read anew.
      top: of each token, the likeliest ones in its place; nothing where none were asked for.
    """

    id: str
    sample: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason
    prompt_tokens: int
    top: tuple[Top, ...] = ()
    cached_tokens: int = 0


@dataclasses.dataclass(frozen=True)
class Update:
    """What has come of a request in one call.

    Attributes:
      text: what was added to the text and is sure to stay.
      tokens, logprobs, top: what was sampled, see `Response`.
      response: all of it, where it is finished.
    """

    request: Request
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    response: Response | None
    top: tuple[Top, ...] = ()
