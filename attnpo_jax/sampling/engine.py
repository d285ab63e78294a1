"""Continuous batching: a fixed set of slots, each of which takes the next request when it is free.

The host decides which request goes to which slot; the device reads prompts into the KV cache and
then takes a few steps a call in all slots at once. What a response is depends on its seed, its id
and its number alone, whatever else is under way.

Shapes: B slots, R rows of prompts, L row length, n steps a call.
"""

import collections
import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.models import decode, decoder, kv_cache, placement
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.attention.core import Past
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Params
from attnpo_jax.models.kv_cache import Cache, CacheShape
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import sample
from attnpo_jax.sampling.sample import Features, SlotSettings
from attnpo_jax.sampling.settings import SamplingSettings
from attnpo_jax.sampling.text import ResponseText

_LOG = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "error"]
Top = tuple[tuple[int, float], ...]
"""The likeliest tokens with their log-probs, the first one first."""

# Rows of prompts that are read at once are so many, for each of the parts that rows are split in.
_ROWS = (16, 4, 1)
# Of that many tokens at most, where it is more than one row.
_PREFILL_TOKENS = 4096
_FEWEST_TOKENS = 32
# Programs tell of so many of the likeliest tokens: one of few.
_TOPS = (0, 5, 20)
MOST_TOP_LOGPROBS = _TOPS[-1]
# A beginning that requests share is worth a program of its own from so many tokens on.
_FEWEST_SHARED = 16


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

    @property
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


@dataclasses.dataclass(eq=False)
class _Slot:
    """A request under way."""

    request: Request
    text: ResponseText
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[Top] = dataclasses.field(default_factory=list)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _State:
    """What stays on the devices between calls."""

    cache: Cache
    seen_BV: jax.Array | None  # see `sample.next_tokens`


class Engine:
    """Samples responses from one model.

    Args:
      config, params: the model; parameters lie as the backend says. Others of the same shapes may
        be put into `params` while no request is under way.
      tokenizer: for texts.
      length: tokens that a slot has room for, prompt and response together.
      slots: responses under way at a time, at most; rounded up to the parts that rows are in.
      dtype: what activations are computed in, and the cache is held in.
      quantized_cache: whether the cache is held as int8.
      steps: tokens a call, at most: what a finished response's slot may wait for.
      backend: where to run; None for one device.
      attention: of prompts; `auto`, or one of `models.attention.implementations.IMPLEMENTATIONS`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        tokenizer: ChatTokenizer,
        *,
        length: int,
        slots: int = 64,
        dtype=jnp.float32,
        quantized_cache: bool = False,
        steps: int = 8,
        backend: backends.Sharded | None = None,
        attention: str = "auto",
    ):
        self.params = params
        self._config, self._tokenizer, self._steps = config, tokenizer, steps
        self._backend = backend or backends.one_device(config)
        shards = self._backend.row_shards
        slots = -(-slots // shards) * shards
        self.cache_shape = CacheShape.of(config, slots, length, dtype, quantized=quantized_cache)
        choice = implementations.choose(attention, config, dtype, self._backend.devices)
        self._static = {"config": config, "dtype": jnp.dtype(dtype)}
        self._attention = choice.implementation
        self._state: _State | None = None
        self._programs: dict[Any, Any] = {}
        self._shared = np.zeros(0, np.int32)
        self._past: Past | None = None
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[_Slot | None] = [None] * slots

    # --- Requests ---------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests that have a slot."""
        return sum(slot is not None for slot in self._slots)

    @property
    def waiting(self) -> int:
        """Requests that have none yet."""
        return len(self._waiting)

    def add(self, request: Request) -> None:
        """Puts a request at the end of the queue.

        Raises:
          UserError: its prompt is empty, leaves no room for a response, or holds a token, as its
            settings may, that the model does not have.
        """
        self.check(request)
        self._waiting.append(request)

    def check(self, request: Request) -> None:
        """Raises UserError where a request can't be served; see `add`."""
        name, size = f"prompt {request.id}", len(request.tokens)
        if size == 0:
            raise UserError(f"{name}: empty; accepted: at least one token")
        if size >= self.cache_shape.length:
            raise UserError(
                f"{name}: {size} tokens, and there is room for {self.cache_shape.length} with the "
                "response; accepted: a shorter prompt, or a larger length"
            )
        if not 0 <= request.top_logprobs <= MOST_TOP_LOGPROBS:
            raise UserError(
                f"{name}: top_logprobs = {request.top_logprobs}; accepted: 0 to {MOST_TOP_LOGPROBS}"
            )
        given = {
            "a token": request.tokens,
            "a stop token": request.ends,
            "a token of logit_bias": tuple(request.settings.logit_bias),
        }
        for what, ids in given.items():
            ids = np.asarray(ids, np.int64)
            outside = ids[(ids < 0) | (ids >= self._config.vocab_size)]
            if len(outside):
                raise UserError(
                    f"{name}: {what} is {outside[0]}; accepted: 0 to {self._config.vocab_size - 1}"
                )

    def cancel(self, request: Request) -> None:
        """Forgets a request, whether it waits or is under way; nothing where it is finished."""
        if request in self._waiting:
            self._waiting.remove(request)
        self._slots = [
            None if slot is not None and slot.request is request else slot for slot in self._slots
        ]

    def share(self, prompts: Iterable[np.ndarray]) -> None:
        """Reads what all of these prompts begin with once, for the requests to come.

        What they share is copied to the slots; responses do not depend on it beyond rounding.
        """
        prompts = list(prompts)
        # The last token of each is read in its slot.
        common = functools.reduce(_common_beginning, (tokens[:-1] for tokens in prompts))
        if len(prompts) < 2 or len(common) < _FEWEST_SHARED:
            common = common[:0]
        if np.array_equal(common, self._shared):
            return
        self._shared, self._past = common.astype(np.int32), None

    def submit(self, requests: Sequence[Request]) -> None:
        """Puts many requests into the queue, those of long prompts first, and has them `share`.

        Raises:
          UserError: one can't be served, see `add`; none was put there.
        """
        for request in requests:
            self.check(request)
        if requests:
            self.share([request.tokens for request in requests])
        self._waiting.extend(sorted(requests, key=lambda r: (-len(r.tokens), r.id, r.sample)))

    def run(self, requests: Sequence[Request]) -> Iterator[Response]:
        """Yields the responses as they finish; see `submit`."""
        self.submit(requests)
        while self.running or self.waiting:
            for update in self.step():
                if update.response is not None:
                    yield update.response

    # --- Calls ------------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Gives free slots to waiting requests, and takes a few steps in all of them."""
        self._fill_slots()
        active = [b for b, slot in enumerate(self._slots) if slot is not None]
        if not active:
            return []
        features = functools.reduce(
            Features.__or__, (self._slots[b].request.features for b in active)
        )
        arrays = self._arrays()
        program = self._program(_decode_steps, features=features, steps=self._steps)
        self._state, output = program(self.params, self._state, self._backend.replicate(arrays))
        tokens_nB, logprobs_nB, top, failed_B = jax.device_get(output)
        updates = []
        for b in active:
            top_n = _tops(*(x_nBk[:, b] for x_nBk in top), self._slots[b].request.top_logprobs)
            updates.append(
                self._take(b, tokens_nB[:, b], logprobs_nB[:, b], top_n, bool(failed_B[b]))
            )
        return updates

    def _take(self, b: int, tokens_n, logprobs_n, top_n: Sequence[Top], failed: bool) -> Update:
        """Adds what a call has sampled in a slot; frees it where the response is finished."""
        slot = self._slots[b]
        request, before = slot.request, len(slot.tokens)
        reason: FinishReason | None = None
        room = self.cache_shape.length - len(request.tokens)
        most = min(request.settings.max_new_tokens, room)
        sampled = tokens_n.tolist(), logprobs_n.tolist(), top_n
        for token, logprob, likeliest in zip(*sampled, strict=True):
            if token < 0:
                break
            slot.tokens.append(token)
            slot.logprobs.append(logprob)
            if request.top_logprobs:
                slot.top.append(likeliest)
            if token in request.ends:
                reason = "stop"
            elif slot.text.add(token):
                reason = "stop"
            elif len(slot.tokens) >= most:
                reason = "length"
            if reason:
                break
        if failed and reason is None:
            reason = "error"
        response = None
        if reason is not None:
            self._slots[b] = None
            response = Response(
                request.id,
                request.sample,
                slot.text.finish(),
                tuple(slot.tokens),
                tuple(slot.logprobs),
                reason,
                len(request.tokens),
                tuple(slot.top),
            )
        news = slot.text.news(last=response is not None)
        new = tuple(slot.tokens[before:]), tuple(slot.logprobs[before:])
        return Update(request, news, *new, response, tuple(slot.top[before:]))

    def _arrays(self) -> tuple[Any, ...]:
        """What a call is told of the slots: last tokens, lengths, counts, who is active, settings.

        A slot's last token is not in the cache yet: it is what the next step reads.
        """
        B = len(self._slots)
        token_B, length_B, count_B = (np.zeros(B, np.int32) for _ in range(3))
        active_B = np.zeros(B, bool)
        for b, slot in enumerate(self._slots):
            if slot is not None:
                last = slot.tokens or slot.request.tokens
                token_B[b], count_B[b], active_B[b] = last[-1], len(slot.tokens), True
                length_B[b] = len(slot.request.tokens) + len(slot.tokens) - 1
        requests = [None if slot is None else slot.request for slot in self._slots]
        room = self.cache_shape.length
        return token_B, length_B, count_B, active_B, _settings_of(requests, room)

    def _fill_slots(self) -> None:
        free = [b for b, slot in enumerate(self._slots) if slot is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        self._make_state(taken)
        groups: dict[tuple[int, bool], list[tuple[int, Request]]] = {}
        for b, request in zip(free, taken, strict=False):
            text = ResponseText(self._tokenizer.tokenizer.backend_tokenizer, request.settings.stop)
            self._slots[b] = _Slot(request, text)
            shares = self._begins_shared(request)
            # All but the last token, which the first step reads.
            rest = len(request.tokens) - 1 - (len(self._shared) if shares else 0)
            groups.setdefault((row_length(rest), shares), []).append((b, request))
        for (length, shares), members in sorted(groups.items(), reverse=True):
            while members:
                size = self._rows_at_once(length, len(members))
                self._prefill(length, size, shares, members[:size])
                members = members[size:]

    def _rows_at_once(self, length: int, wanted: int) -> int:
        shards = self._backend.row_shards
        for rows in _ROWS:
            fits = rows * shards * length <= _PREFILL_TOKENS * shards or rows == 1
            if fits and (rows * shards <= wanted or rows == 1):
                return rows * shards
        raise AssertionError("one row always fits")

    def _prefill(
        self, length: int, size: int, shares: bool, members: Sequence[tuple[int, Request]]
    ) -> None:
        start = len(self._shared) if shares else 0
        if shares and self._past is None:
            make_past = self._backend.whole_pass(
                _shared_past, attention=self._attention, **self._static
            )
            self._past = make_past(self.params, self._shared)
        tokens_RL, length_R = np.zeros((size, length), np.int32), np.zeros(size, np.int32)
        slot_R = np.full(size, len(self._slots), np.int32)
        for r, (b, request) in enumerate(members):
            own = request.tokens[start:-1]
            tokens_RL[r, : len(own)], length_R[r], slot_R[r] = own, len(own), b
        arrays = tokens_RL, length_R, slot_R
        program = self._program(_prefill, attention=self._attention)
        shared = self.params, self._past if shares else None
        self._state, _ = program(shared, self._state, self._backend.replicate(arrays))
        if self._state.seen_BV is not None:
            self._mark_seen(members, size)

    def _mark_seen(self, members: Sequence[tuple[int, Request]], size: int) -> None:
        longest = max(len(request.tokens) for _, request in members)
        tokens_RL = np.full((size, row_length(longest)), -1, np.int32)
        slot_R = np.full(size, len(self._slots), np.int32)
        for r, (b, request) in enumerate(members):
            tokens_RL[r, : len(request.tokens)], slot_R[r] = request.tokens, b
        program = self._program(_mark_prompts)
        arrays = self._backend.replicate((tokens_RL, slot_R))
        self._state, _ = program(None, self._state, arrays)

    def _begins_shared(self, request: Request) -> bool:
        n = len(self._shared)
        return 0 < n < len(request.tokens) and np.array_equal(request.tokens[:n], self._shared)

    # --- On the devices ---------------------------------------------------------------------------

    def _make_state(self, requests: Sequence[Request]) -> None:
        """Allocates what the requests need and is not there yet."""
        penalties = any(request.settings.features.penalties for request in requests)
        if self._state is None:
            self._state = self._backend.zeros(_State(self.cache_shape.abstract(), None), _SPLIT)
        if penalties and self._state.seen_BV is None:
            seen = jax.ShapeDtypeStruct((len(self._slots), self._config.vocab_size), jnp.uint8)
            self._state = _State(self._state.cache, self._backend.zeros(seen, placement.BY_ROWS))

    def _program(self, function: Any, **static: Any) -> Any:
        """The compiled function, made once for each set of static arguments."""
        key = function, tuple(static.items()), self._state.seen_BV is None
        if key not in self._programs:
            fixed = dict(static, shape=self.cache_shape, **self._static)
            self._programs[key] = self._backend.state_pass(function, self._state, **fixed)
        return self._programs[key]


_SPLIT = _State(kv_cache.SPLIT, None)


def row_length(tokens: int) -> int:
    """A row length that holds so many tokens: one of few, at most half as much again."""
    length = _FEWEST_TOKENS
    while length < tokens:
        step = length // 2 if length & (length - 1) == 0 else length // 3
        length += step
    return length


def _common_beginning(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    n = min(len(first), len(second))
    differs = np.flatnonzero(first[:n] != second[:n])
    return first[: int(differs[0]) if len(differs) else n]


def _settings_of(requests: Sequence[Request | None], room: int) -> SlotSettings:
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


def _tops(token_nk: np.ndarray, logprob_nk: np.ndarray, k: int) -> list[Top]:
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


def _shared_past(params, tokens_P, *, config, dtype, attention):
    return decoder.make_past(config, params, tokens_P, dtype=dtype, attention=attention)


def _prefill(shared, state: _State, arrays, *, config, shape, dtype, attention):
    params, past = shared
    options = {"past": past, "dtype": dtype, "attention": attention}
    cache = decode.prefill(config, params, state.cache, shape, *arrays, **options)
    return dataclasses.replace(state, cache=cache), ()


def _mark_prompts(_, state: _State, arrays, *, config, shape, dtype):
    """Notes which tokens the prompts of some slots hold."""
    del config, shape, dtype
    tokens_RL, slot_R = arrays
    seen_BV = state.seen_BV.at[slot_R].set(0, mode="drop")
    tokens_RL = jnp.where(tokens_RL < 0, seen_BV.shape[1], tokens_RL)
    seen_BV = seen_BV.at[slot_R[:, None], tokens_RL].set(sample.PROMPT, mode="drop")
    return dataclasses.replace(state, seen_BV=seen_BV), ()


def _decode_steps(params, state: _State, arrays, *, config, shape, dtype, features, steps):
    """Up to `steps` tokens in every slot that is active.

    Returns:
      The state; tokens, -1 where a slot has none, and log-probs (n, B), the likeliest tokens and
      their log-probs (n, B, k), and which slots failed (B,).
    """
    token_B, length_B, count_B, active_B, settings = arrays
    rows = jnp.arange(token_B.shape[0])
    k = min(features.top_logprobs, config.vocab_size)

    def one(carry):
        i, state, token_B, length_B, count_B, active_B, failed_B, sampled = carry
        logits_BV, cache = decode.step(
            config, params, state.cache, shape, token_B, length_B, dtype=dtype
        )
        logits_BV = placement.by_rows(logits_BV)
        fine_B = jnp.all(jnp.isfinite(logits_BV), axis=-1)
        new_B, logprob_B = sample.next_tokens(logits_BV, settings, count_B, state.seen_BV, features)
        failed_B |= active_B & ~fine_B
        active_B &= fine_B
        new = jnp.where(active_B, new_B, -1), logprob_B, sample.likeliest(logits_BV, k)
        sampled = jax.tree.map(lambda so_far, x: so_far.at[i].set(x), sampled, new)
        seen_BV = state.seen_BV
        if features.penalties:
            seen_BV = seen_BV.at[rows, new_B].set(sample.PROMPT | sample.SAMPLED)
        token_B = jnp.where(active_B, new_B, token_B)
        length_B += active_B
        count_B += active_B
        ended_B = jnp.any(new_B[:, None] == settings.stop_BE, axis=-1)
        active_B &= ~ended_B & (count_B < settings.max_new_tokens_B)
        state = _State(cache, seen_BV)
        return i + 1, state, token_B, length_B, count_B, active_B, failed_B, sampled

    def goes_on(carry):
        i, active_B = carry[0], carry[5]
        return (i < steps) & jnp.any(active_B)

    tokens_nB = jnp.full((steps, token_B.shape[0]), -1, jnp.int32)
    top = tuple(jnp.zeros((*tokens_nB.shape, k), kind) for kind in (jnp.int32, jnp.float32))
    sampled = tokens_nB, jnp.zeros(tokens_nB.shape, jnp.float32), top
    slots = token_B, length_B, count_B, active_B, jnp.zeros_like(active_B)
    carry = (jnp.int32(0), state, *slots, sampled)
    _, state, *_, failed_B, sampled = jax.lax.while_loop(goes_on, one, carry)
    return state, (*sampled, failed_B)
