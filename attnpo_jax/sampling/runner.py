"""What the engine has on the devices: parameters, the KV cache, and the programs that use both.

Shapes: B slots, R rows of prompts, S slots that a row goes to, L row length.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.models import placement
from attnpo_jax.models.attention.core import Past
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.models.decoder import Params
from attnpo_jax.models.kv_cache import CacheShape
from attnpo_jax.parallel import backend as backends
from attnpo_jax.sampling import programs
from attnpo_jax.sampling.programs import SPLIT, State
from attnpo_jax.sampling.sample import Features

_SHORTEST_ROW = 32
# Of what is read behind a slot's own, so many tokens a call: their scores are held whole.
_MOST_BEHIND = 512


@dataclasses.dataclass(eq=False)
class Row:
    """A prompt that is read once, for all of its samples that get a slot at the same time.

    Attributes:
      tokens: int32, all of the prompt's; all but the last are read.
      held: how many of them the first slot holds already.
    """

    tokens: np.ndarray
    slots: list[int] = dataclasses.field(default_factory=list)
    held: int = 0


class Runner:
    """Runs a model's programs on slots.

    Args:
      shape: of the cache, with as many slots as there are at most.
      dtype: what activations are computed in.
      attention: of prompts; one of `models.attention.implementations.IMPLEMENTATIONS`.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        shape: CacheShape,
        *,
        dtype,
        attention: str,
        backend: backends.Sharded,
    ):
        self.slots = shape.slots
        self._params, self._most, self._backend = params, shape, backend
        self._vocab_size, self._attention = config.vocab_size, attention
        self._static = {"config": config, "dtype": jnp.dtype(dtype)}
        self._state: State | None = None
        self._programs: dict[Any, Any] = {}
        self.shared = np.zeros(0, np.int32)
        self._past: Past | None = None

    def set_params(self, params: Params) -> None:
        """Other parameters of the same shapes; what slots hold means nothing any more."""
        self._params, self._past = params, None

    def share(self, tokens: np.ndarray) -> None:
        """What prompts to come may begin with is read once, when it is wanted."""
        if not np.array_equal(tokens, self.shared):
            self.shared, self._past = tokens.astype(np.int32), None

    def release(self) -> None:
        """Gives the cache's memory back until the next call; what slots hold is lost."""
        self._state = self._past = None

    def make_state(self, *, seen: bool) -> None:
        """Allocates the cache, and what is `seen` if that is wanted, where they are not there."""
        if self._state is None:
            self._state = self._backend.zeros(State(self._shape.abstract(), None), SPLIT)
        if seen and self._state.seen_BV is None:
            shape = jax.ShapeDtypeStruct((self.slots, self._vocab_size), jnp.uint8)
            self._state = State(self._state.cache, self._backend.zeros(shape, placement.BY_ROWS))

    def resize(self, slots: int, kept: Sequence[int]) -> None:
        """Has so many slots, half or twice as many as before; the first hold what others did."""
        smaller, old = min(slots, self.slots), self._state
        self.slots, self._state = slots, None
        if old is not None and kept:
            self.make_state(seen=old.seen_BV is not None)
            source_B = np.array([*kept, *[0] * (smaller - len(kept))], np.int32)
            self._run(programs.move, old, source_B, before=old.cache.keys_CBKHb.shape[1])

    def decode(self, arrays: Any, features: Features, steps: int) -> Any:
        """A few steps in all slots, see `programs.decode_steps`: what they came to, on the host."""
        static = {"features": features, "steps": steps}
        return jax.device_get(self._run(programs.decode_steps, self._params, arrays, **static))

    def clear(self, slots_B: np.ndarray) -> None:
        """Has some slots, bool (B,), hold nothing; what is no number would reach later requests."""
        self._run(programs.clear, None, slots_B)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Has slots hold what others do: (other, slot), one after the other."""
        pairs_2S = np.full((2, self.slots), self.slots, np.int32)
        pairs_2S[:, : len(pairs)] = np.array(pairs, np.int32).T
        self._run(programs.copy, None, tuple(pairs_2S))

    def prefill(self, rows: Sequence[Row], size: int, length: int, *, shares: bool) -> None:
        """Reads prompts into their slots.

        Args:
          size, length: of the array of them; rows and tokens.
          shares: whether all of them begin with what is shared.
        """
        if shares and self._past is None:
            options = {"attention": self._attention, **self._static}
            make_past = self._backend.whole_pass(programs.shared_past, **options)
            self._past = make_past(self._params, self.shared)
        own = [row.tokens[len(self.shared) if shares else 0 : -1] for row in rows]
        arrays = _rows_of(own, size, length, 0), _lengths(own, size), self._slots_of(rows, size)
        both = self._params, self._past if shares else None
        self._run(programs.prefill, both, arrays, attention=self._attention)
        self._mark(rows, size)

    def extend(self, rows: Sequence[Row], size: int) -> None:
        """Reads what the first slots of prompts do not hold yet, then copies it to the others."""
        start_R = np.array([row.held for row in rows] + [0] * (size - len(rows)), np.int32)
        slot_R = np.array([row.slots[0] for row in rows], np.int32)
        slot_R = np.append(slot_R, np.full(size - len(rows), self.slots, np.int32))
        rest = [row.tokens[row.held : -1] for row in rows]
        while any(map(len, rest)):
            now = [tokens[:_MOST_BEHIND] for tokens in rest]
            length_R = _lengths(now, size)
            tokens_RL = _rows_of(now, size, row_length(max(length_R)), 0)
            self._run(programs.extend, self._params, (tokens_RL, length_R, start_R, slot_R))
            start_R = start_R + length_R
            rest = [tokens[_MOST_BEHIND:] for tokens in rest]
        copies = [(row.slots[0], b) for row in rows for b in row.slots[1:]]
        if copies:
            self.copy(copies)
        self._mark(rows, size)

    def _mark(self, rows: Sequence[Row], size: int) -> None:
        """Notes what prompts hold, where that is wanted."""
        if self._state.seen_BV is not None:
            longest = row_length(max(len(row.tokens) for row in rows))
            whole_RL = _rows_of([row.tokens for row in rows], size, longest, -1)
            self._run(programs.mark_prompts, None, (whole_RL, self._slots_of(rows, size)))

    def _slots_of(self, rows: Sequence[Row], size: int) -> np.ndarray:
        """Where rows go, int32 (R, S), see `kv_cache.insert`."""
        slot_RS = np.full((size, self.slots), self.slots, np.int32)
        for slot_S, row in zip(slot_RS, rows, strict=False):
            slot_S[: len(row.slots)] = row.slots
        return slot_RS

    @property
    def _shape(self) -> CacheShape:
        """Of the cache as it is now."""
        return dataclasses.replace(self._most, slots=self.slots)

    def _run(self, function: Any, first: Any, arrays: Any, **static: Any) -> Any:
        """Runs a function of `programs`, compiled once for each set of static arguments.

        Args:
          first: what it takes before the state.
        """
        key = function, tuple(static.items()), self.slots, self._state.seen_BV is None
        if key not in self._programs:
            fixed = dict(static, shape=self._shape, **self._static)
            self._programs[key] = self._backend.state_pass(function, self._state, **fixed)
        arrays = self._backend.replicate(arrays)
        self._state, output = self._programs[key](first, self._state, arrays)
        return output


def _rows_of(lists: Sequence[np.ndarray], size: int, length: int, fill: int) -> np.ndarray:
    """Lists of tokens as int32 (R, L), filled up."""
    tokens_RL = np.full((size, length), fill, np.int32)
    for row, tokens in zip(tokens_RL, lists, strict=False):
        row[: len(tokens)] = tokens
    return tokens_RL


def _lengths(lists: Sequence[np.ndarray], size: int) -> np.ndarray:
    """How long lists are, int32 (R,); 0 where there is none."""
    length_R = np.zeros(size, np.int32)
    length_R[: len(lists)] = [len(tokens) for tokens in lists]
    return length_R


def row_length(tokens: int) -> int:
    """A row length that holds so many tokens: one of few, at most half as much again."""
    length = _SHORTEST_ROW
    while length < tokens:
        step = length // 2 if length & (length - 1) == 0 else length // 3
        length += step
    return length
