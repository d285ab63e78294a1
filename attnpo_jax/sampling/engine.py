"""Continuous batching: a fixed set of slots, each of which takes the next request when it is free.

The host decides which request goes to which slot; the device reads prompts into the KV cache and
then takes a few steps a call in all slots at once. What a response is depends on its seed, its id
and its number alone, whatever else is under way.

Shapes: B slots, R rows of prompts, S slots that a row goes to, L row length, n steps a
call.
"""

import collections
import dataclasses
import functools
import logging
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import common_beginning
from attnpo_jax.models import placement
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.attention.core import Past
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Params
from attnpo_jax.models.kv_cache import CacheShape
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import programs
from attnpo_jax.sampling.programs import SPLIT, State
from attnpo_jax.sampling.responses import (
    MOST_TOP_LOGPROBS,
    FinishReason,
    Request,
    Response,
    Top,
    Update,
)
from attnpo_jax.sampling.sample import Features
from attnpo_jax.sampling.slots import settings_of, tops_of
from attnpo_jax.sampling.text import ResponseText

_LOG = logging.getLogger(__name__)

# Rows of prompts that are read at once are so many, for each of the parts that rows are split in.
_ROWS = (16, 4, 1)
# Of that many tokens at most, where it is more than one row.
_PREFILL_TOKENS = 4096
_FEWEST_TOKENS = 32
# A beginning that requests share is worth a program of its own from so many tokens on.
_FEWEST_SHARED = 16


@dataclasses.dataclass(eq=False)
class _Slot:
    """A request under way."""

    request: Request
    text: ResponseText
    tokens: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)
    top: list[Top] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False)
class _Row:
    """A prompt that is read once, for all of its samples that get a slot at the same time."""

    tokens: np.ndarray
    slots: list[int] = dataclasses.field(default_factory=list)


class Engine:
    """Samples responses from one model.

    Args:
      config, params: the model; parameters lie as the backend says.
      tokenizer: for texts.
      length: tokens that a slot has room for, prompt and response together.
      slots: responses under way at a time, at most; rounded up to the parts that rows are in.
      dtype: what activations are computed in, and the cache is held in.
      quantized_cache: whether the cache is held as int8.
      steps: tokens a call, at most: what a finished response's slot may wait for.
      steady: whether everything is computed in arrays of the same shapes whatever is under way, so
        that a response is the same to the last bit of its log-probs, and not up to rounding only.
        It costs time where few requests are under way, or many prompts are read at once.
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
        steady: bool = False,
        backend: backends.Sharded | None = None,
        attention: str = "auto",
    ):
        self._params = params
        self._config, self._tokenizer, self._steps = config, tokenizer, steps
        self._backend = backend or backends.one_device(config)
        shards = self._backend.row_shards
        slots = -(-slots // shards) * shards
        # On a CPU, a step takes the longer the more slots there are; elsewhere it waits for memory.
        self._resizes = not steady and shards == 1 and self._backend.devices[0].platform == "cpu"
        self._rows = _ROWS[-1:] if steady else _ROWS
        self.cache_shape = CacheShape.of(config, slots, length, dtype, quantized=quantized_cache)
        choice = implementations.choose(attention, config, dtype, self._backend.devices)
        self._static = {"config": config, "dtype": jnp.dtype(dtype)}
        self._attention = choice.implementation
        self._state: State | None = None
        self._programs: dict[Any, Any] = {}
        self._shared = np.zeros(0, np.int32)
        self._past: Past | None = None
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[_Slot | None] = [None] * slots

    def set_params(self, params: Params) -> None:
        """Samples from other parameters of the same shapes from now on; no request is under way."""
        if self.running:
            raise ValueError(f"{self.running} requests are under way")
        self._params, self._past = params, None

    def release(self) -> None:
        """Gives the memory of the cache back until the next request; none is under way."""
        if self.running:
            raise ValueError(f"{self.running} requests are under way")
        self._state = self._past = None

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
        common = functools.reduce(common_beginning, (tokens[:-1] for tokens in prompts))
        if len(prompts) < 2 or len(common) < _FEWEST_SHARED:
            common = common[:0]
        if np.array_equal(common, self._shared):
            return
        self._shared, self._past = common.astype(np.int32), None

    def submit(self, requests: Sequence[Request], sharing: Sequence[Request] | None = None) -> None:
        """Puts many requests into the queue, those of long prompts first, and has them `share`.

        Args:
          sharing: the requests of which these are some: what all of those begin with is shared.

        Raises:
          UserError: one can't be served, see `add`; none was put there.
        """
        for request in requests:
            self.check(request)
        if requests:
            self.share([request.tokens for request in sharing or requests])
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
        self._resize()
        self._fill_slots()
        active = [b for b, slot in enumerate(self._slots) if slot is not None]
        if not active:
            return []
        features = functools.reduce(
            Features.__or__, {self._slots[b].request.features for b in active}
        )
        arrays = self._arrays()
        program = self._program(programs.decode_steps, features=features, steps=self._steps)
        self._state, output = program(self._params, self._state, self._backend.replicate(arrays))
        *sampled, failed_B = jax.device_get(output)
        return [self._take(b, *sampled, failed_B[b]) for b in active]

    def _take(self, b: int, tokens_nB, logprobs_nB, top, failed: bool) -> Update:
        """Adds what a call has sampled in a slot; frees it where the response is finished."""
        slot = self._slots[b]
        request, before = slot.request, len(slot.tokens)
        reason: FinishReason | None = None
        room = self.cache_shape.length - len(request.tokens)
        most = min(request.settings.max_new_tokens, room)
        sampled = tokens_nB[:, b].tolist(), logprobs_nB[:, b].tolist()
        top_n = tops_of(*(x_nBk[:, b] for x_nBk in top), request.top_logprobs)
        for token, logprob, likeliest in zip(*sampled, top_n, strict=True):
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
        return token_B, length_B, count_B, active_B, settings_of(requests, room)

    def _resize(self) -> None:
        """Has half as many slots where no more are wanted, or twice as many until there are enough.

        By twos, so that there are few programs that move what slots hold.
        """
        wanted = min(self.running + self.waiting, self.cache_shape.slots)
        if not self._resizes or not wanted:
            return
        size = len(self._slots)
        if wanted > size:
            while size < wanted:
                size *= 2
                self._move(size)
        elif size % 2 == 0 and size // 2 >= wanted:
            self._move(size // 2)

    def _move(self, size: int) -> None:
        """Has so many slots, half or twice as many as before."""
        kept = [b for b, slot in enumerate(self._slots) if slot is not None]
        smaller, old = min(size, len(self._slots)), self._state
        self._slots = [self._slots[b] for b in kept] + [None] * (size - len(kept))
        self._state = None
        if old is not None and kept:
            self._make_state(seen=old.seen_BV is not None)
            source = np.array(kept + [0] * (smaller - len(kept)), np.int32)
            program = self._program(programs.move, before=old.cache.keys_CBKHb.shape[1])
            self._state, _ = program(old, self._state, self._backend.replicate(source))

    def _fill_slots(self) -> None:
        free = [b for b, slot in enumerate(self._slots) if slot is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        self._make_state(any(request.settings.features.penalties for request in taken))
        same: dict[bytes, _Row] = {}
        for b, request in zip(free, taken, strict=False):
            text = ResponseText(self._tokenizer.tokenizer.backend_tokenizer, request.settings.stop)
            self._slots[b] = _Slot(request, text)
            tokens = np.asarray(request.tokens, np.int32)
            same.setdefault(tokens.tobytes(), _Row(tokens)).slots.append(b)
        groups: dict[tuple[int, bool], list[_Row]] = {}
        for row in same.values():
            shares = self._begins_shared(row.tokens)
            # All but the last token, which the first step reads.
            rest = len(row.tokens) - 1 - (len(self._shared) if shares else 0)
            groups.setdefault((row_length(rest), shares), []).append(row)
        for (length, shares), rows in sorted(groups.items(), key=lambda g: g[0], reverse=True):
            while rows:
                size = self._rows_at_once(length, len(rows))
                self._prefill(length, size, shares, rows[:size])
                rows = rows[size:]

    def _rows_at_once(self, length: int, wanted: int) -> int:
        shards = self._backend.row_shards
        for rows in self._rows:
            fits = rows * shards * length <= _PREFILL_TOKENS * shards or rows == 1
            if fits and (rows * shards <= wanted or rows == 1):
                return rows * shards
        raise AssertionError("one row always fits")

    def _prefill(self, length: int, size: int, shares: bool, rows: Sequence[_Row]) -> None:
        start = len(self._shared) if shares else 0
        if shares and self._past is None:
            make_past = self._backend.whole_pass(
                programs.shared_past, attention=self._attention, **self._static
            )
            self._past = make_past(self._params, self._shared)
        own = [row.tokens[start:-1] for row in rows]
        length_R = np.zeros(size, np.int32)
        length_R[: len(own)] = [len(tokens) for tokens in own]
        slot_RS = self._slots_of(rows, size)
        arrays = _rows_of(own, size, length, 0), length_R, slot_RS
        program = self._program(programs.prefill, attention=self._attention)
        shared = self._params, self._past if shares else None
        self._state, _ = program(shared, self._state, self._backend.replicate(arrays))
        if self._state.seen_BV is not None:
            longest = row_length(max(len(row.tokens) for row in rows))
            whole_RL = _rows_of([row.tokens for row in rows], size, longest, -1)
            program = self._program(programs.mark_prompts)
            arrays = self._backend.replicate((whole_RL, slot_RS))
            self._state, _ = program(None, self._state, arrays)

    def _slots_of(self, rows: Sequence[_Row], size: int) -> np.ndarray:
        """Where rows go, int32 (R, S), see `kv_cache.insert`."""
        slot_RS = np.full((size, len(self._slots)), len(self._slots), np.int32)
        for slot_S, row in zip(slot_RS, rows, strict=False):
            slot_S[: len(row.slots)] = row.slots
        return slot_RS

    def _begins_shared(self, tokens: np.ndarray) -> bool:
        n = len(self._shared)
        return 0 < n < len(tokens) and np.array_equal(tokens[:n], self._shared)

    # --- On the devices ---------------------------------------------------------------------------

    @property
    def _shape(self) -> CacheShape:
        """Of the cache as it is now."""
        return dataclasses.replace(self.cache_shape, slots=len(self._slots))

    def _make_state(self, seen: bool) -> None:
        """Allocates the cache, and what is `seen` if that is wanted, where they are not there."""
        if self._state is None:
            self._state = self._backend.zeros(State(self._shape.abstract(), None), SPLIT)
        if seen and self._state.seen_BV is None:
            of_words = len(self._slots), self._config.vocab_size
            shape = jax.ShapeDtypeStruct(of_words, jnp.uint8)
            self._state = State(self._state.cache, self._backend.zeros(shape, placement.BY_ROWS))

    def _program(self, function: Any, **static: Any) -> Any:
        """The compiled function, made once for each set of static arguments."""
        key = function, tuple(static.items()), len(self._slots), self._state.seen_BV is None
        if key not in self._programs:
            fixed = dict(static, shape=self._shape, **self._static)
            self._programs[key] = self._backend.state_pass(function, self._state, **fixed)
        return self._programs[key]


def _rows_of(lists: Sequence[np.ndarray], size: int, length: int, fill: int) -> np.ndarray:
    """Lists of tokens as int32 (R, L), filled up."""
    tokens_RL = np.full((size, length), fill, np.int32)
    for row, tokens in zip(tokens_RL, lists, strict=False):
        row[: len(tokens)] = tokens
    return tokens_RL


def row_length(tokens: int) -> int:
    """A row length that holds so many tokens: one of few, at most half as much again."""
    length = _FEWEST_TOKENS
    while length < tokens:
        step = length // 2 if length & (length - 1) == 0 else length // 3
        length += step
    return length
