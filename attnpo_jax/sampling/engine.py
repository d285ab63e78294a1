"""Continuous batching: a fixed set of slots, each of which takes the next request when it is free.

The host decides which request goes to which slot; the device reads prompts into the KV cache and
then takes a few steps a call in all slots at once. What a response is depends on its seed, its id
and its number alone, whatever else is under way.

Shapes: B slots, n steps a call.
"""

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import common_beginning
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Params
from attnpo_jax.models.kv_cache import CacheShape
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import prefix_cache
from attnpo_jax.sampling.responses import (
    MOST_TOP_LOGPROBS,
    FinishReason,
    Request,
    Response,
    Top,
    Update,
)
from attnpo_jax.sampling.runner import Row, Runner, row_length
from attnpo_jax.sampling.sample import Features
from attnpo_jax.sampling.slots import settings_of, tops_of
from attnpo_jax.sampling.text import ResponseText

# Rows of prompts that are read at once are so many, for each of the parts that rows are split in.
_ROWS = (16, 4, 1)
# Of that many tokens at most, where it is more than one row.
_PREFILL_TOKENS = 4096
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
    cached: int = 0

    def held(self) -> np.ndarray:
        """What the cache holds of it once a token is sampled: all but the last one."""
        return np.concatenate([self.request.tokens, self.tokens[:-1]]).astype(np.int32)


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
      prefix_caching: whether a prompt is read from where it differs from what a slot holds already,
        of requests before it too: for those that come one by one, as a chat's turns. Where slots
        are split over devices, and behind what a layer's window has lost, all of it is read. Not
        together with `steady`.
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
        prefix_caching: bool = False,
        backend: backends.Sharded | None = None,
        attention: str = "auto",
    ):
        if steady and prefix_caching:
            raise ValueError("steady: what slots hold already would change the last bits")
        self._config, self._tokenizer, self._steps = config, tokenizer, steps
        backend = backend or backends.one_device(config)
        self._shards = backend.row_shards
        slots = -(-slots // self._shards) * self._shards
        # On a CPU, a step takes the longer the more slots there are; elsewhere it waits for memory.
        self._resizes = not steady and self._shards == 1 and backend.devices[0].platform == "cpu"
        self._rows = _ROWS[-1:] if steady else _ROWS
        self.cache_shape = CacheShape.of(config, slots, length, dtype, quantized=quantized_cache)
        choice = implementations.choose(attention, config, dtype, backend.devices)
        options = {"dtype": dtype, "attention": choice.implementation, "backend": backend}
        self._runner = Runner(config, params, self.cache_shape, **options)
        self._waiting: collections.deque[Request] = collections.deque()
        self._slots: list[_Slot | None] = [None] * slots
        # Of free slots, the tokens that the cache holds, the newest last. Where a ring has come
        # round, it has lost the first ones.
        self._held: dict[int, np.ndarray] = {}
        self._most_held = 0
        self._read_anew: set[Request] = set()  # waiting ones, of which nothing held may be taken
        if prefix_caching and self._shards == 1:
            self._most_held = min(self.cache_shape.blocks) * self.cache_shape.block - steps

    def set_params(self, params: Params) -> None:
        """Samples from other parameters of the same shapes from now on; no request is under way."""
        if self.running:
            raise ValueError(f"{self.running} requests are under way")
        self._runner.set_params(params)
        self._held.clear()

    def release(self) -> None:
        """Gives the memory of the cache back until the next request; none is under way."""
        if self.running:
            raise ValueError(f"{self.running} requests are under way")
        self._runner.release()
        self._held.clear()

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
        self._read_anew.discard(request)
        for b, slot in enumerate(self._slots):
            if slot is not None and slot.request is request:
                self._free(b)

    def share(self, prompts: Iterable[np.ndarray]) -> None:
        """Reads what all of these prompts begin with once, for the requests to come.

        What they share is copied to the slots; responses do not depend on it beyond rounding.
        """
        prompts = list(prompts)
        # The last token of each is read in its slot.
        common = functools.reduce(common_beginning, (tokens[:-1] for tokens in prompts))
        if len(prompts) < 2 or len(common) < _FEWEST_SHARED:
            common = common[:0]
        self._runner.share(common)

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
        *sampled, failed_B = self._runner.decode(self._arrays(), features, self._steps)
        if failed_B.any():
            self._runner.clear(failed_B)
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
            if slot.cached and not slot.tokens:
                # Logits that are no numbers may be those of the prompt that it began as.
                self._free(b, holds=False)
                self._waiting.appendleft(request)
                self._read_anew.add(request)
                return Update(request, "", (), (), None)
            reason = "error"
        response = None
        if reason is not None:
            self._free(b, holds=not failed)
            response = Response(
                request.id,
                request.sample,
                slot.text.finish(),
                tuple(slot.tokens),
                tuple(slot.logprobs),
                reason,
                len(request.tokens),
                tuple(slot.top),
                slot.cached,
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
        for b, tokens in self._held.items():
            length_B[b] = len(tokens)  # steps put what they read behind it
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
        """Has so many slots, half or twice as many as before; of free ones, the newest stay."""
        kept = [b for b, slot in enumerate(self._slots) if slot is not None]
        kept = (kept + list(self._held)[::-1])[:size]
        held = [self._held.get(b) for b in kept]
        self._slots = [self._slots[b] for b in kept] + [None] * (size - len(kept))
        self._runner.resize(size, kept)
        newest_last = reversed(list(enumerate(held)))
        self._held = {b: tokens for b, tokens in newest_last if tokens is not None}

    def _free(self, b: int, *, holds: bool = True) -> None:
        """Has the slot be free; what it holds stays until another takes it."""
        slot, self._slots[b] = self._slots[b], None
        if holds and self._may_be_held(slot):
            self._held[b] = slot.held()

    def _may_be_held(self, slot: _Slot) -> bool:
        """Whether the cache holds all of it: its prompt is read, and no ring has come round."""
        total = len(slot.request.tokens) + len(slot.tokens)
        return bool(slot.tokens) and total <= self._most_held

    # --- Prompts ----------------------------------------------------------------------------------

    def _fill_slots(self) -> None:
        free = [b for b, slot in enumerate(self._slots) if slot is None]
        taken = [self._waiting.popleft() for _ in range(min(len(free), len(self._waiting)))]
        if not taken:
            return
        self._runner.make_state(seen=any(request.settings.features.penalties for request in taken))
        same: dict[bytes, list[Request]] = {}
        for request in taken:
            same.setdefault(np.asarray(request.tokens, np.int32).tobytes(), []).append(request)
        rows = [Row(np.frombuffer(tokens, np.int32)) for tokens in same]
        places = self._place(rows, list(same.values()), free)
        self._read_anew.difference_update(taken)
        for row, placed, requests in zip(rows, places, same.values(), strict=True):
            row.slots, row.held = placed.slots, placed.length
            for b, request in zip(row.slots, requests, strict=True):
                self._held.pop(b, None)
                stop = request.settings.stop
                text = ResponseText(self._tokenizer.tokenizer.backend_tokenizer, stop)
                self._slots[b] = _Slot(request, text, cached=row.held)
        self._read(rows, places)

    def _place(
        self, rows: Sequence[Row], requests: Sequence[Sequence[Request]], free: Sequence[int]
    ) -> list[prefix_cache.Placed]:
        """Slots for rows, and what they begin as."""
        counts = [len(of_row) for of_row in requests]
        may_begin = [
            len(row.tokens) <= self._most_held and self._read_anew.isdisjoint(of_row)
            for row, of_row in zip(rows, requests, strict=True)
        ]
        held = dict(self._held)
        for b, slot in enumerate(self._slots):
            if slot is not None and self._may_be_held(slot):
                held[b] = slot.held()
        oldest_first = [b for b in free if b not in self._held] + list(self._held)
        prompts = [row.tokens[: -1 if ok else 0] for row, ok in zip(rows, may_begin, strict=True)]
        places = prefix_cache.place(prompts, counts, oldest_first, held)
        for placed in places:
            if placed.source in self._held:
                self._held[placed.source] = self._held.pop(placed.source)  # the newest
        return places

    def _read(self, rows: Sequence[Row], places: Sequence[prefix_cache.Placed]) -> None:
        """Reads prompts; those that wait for others, after them."""
        for waits in (False, True):
            now = [pair for pair in zip(rows, places, strict=True) if pair[1].waits == waits]
            copies = [
                (placed.source, placed.slots[0])
                for _, placed in now
                if placed.source not in (None, placed.slots[0])
            ]
            if copies:
                self._runner.copy(copies)
            whole: dict[tuple[int, bool], list[Row]] = {}
            behind: dict[int, list[Row]] = {}
            for row, _ in now:
                # All but the last token, which the first step reads.
                rest = len(row.tokens) - 1 - row.held
                if row.held:
                    behind.setdefault(row_length(rest), []).append(row)
                else:
                    shares = self._begins_shared(row.tokens)
                    rest -= len(self._runner.shared) if shares else 0
                    whole.setdefault((row_length(rest), shares), []).append(row)
            for (length, shares), group in sorted(whole.items(), key=itemgetter(0), reverse=True):
                for size, some in self._at_once(length, group):
                    self._runner.prefill(some, size, length, shares=shares)
            for length, group in sorted(behind.items(), key=itemgetter(0), reverse=True):
                for size, some in self._at_once(length, group):
                    self._runner.extend(some, size)

    def _at_once(self, length: int, rows: Sequence[Row]) -> Iterator[tuple[int, Sequence[Row]]]:
        """Rows in groups that are read at once, each with the rows that its array has."""
        while rows:
            size = next(
                few * self._shards
                for few in self._rows
                if few == 1 or (few * length <= _PREFILL_TOKENS and few * self._shards <= len(rows))
            )
            yield size, rows[:size]
            rows = rows[size:]

    def _begins_shared(self, tokens: np.ndarray) -> bool:
        shared = self._runner.shared
        return 0 < len(shared) < len(tokens) and np.array_equal(tokens[: len(shared)], shared)
