"""Prefix caching: a prompt is read from where it differs from what a slot holds already.

Slots hold what they had last until others take them: the turns of a chat before this one, or what
many prompts begin with.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from attnpo_jax.judge.prompt import common_beginning

# Fewer tokens than that are read with the rest in as much time; and of long prompts, what is read
# in one piece takes less time a token.
_FEWEST_CACHED = 32
_LEAST_SHARE = 0.25


@dataclasses.dataclass(eq=False)
class Placed:
    """Where a prompt goes.

    Attributes:
      slots: one for each of its samples.
      source: the slot that holds what it begins with, or None; it may be the first of its own.
      length: how many tokens of it that are.
      waits: whether the source is to hold them only when prompts that do not wait are read.
    """

    slots: list[int]
    source: int | None = None
    length: int = 0
    waits: bool = False


def place(
    prompts: Sequence[np.ndarray],
    counts: Sequence[int],
    free: Sequence[int],
    held: Mapping[int, np.ndarray],
) -> list[Placed]:
    """Where prompts go, and what they begin as.

    A source still holds its tokens if copies are made in the order of prompts: those of prompts
    that do not wait before anything is read, the others when what does not wait is read.

    Args:
      prompts: int32 tokens, without the last one, which a step reads.
      counts: slots that each wants; no more than there are, together.
      free: slots that may be taken, the one to lose first first.
      held: tokens of slots that hold any, free ones or not.
    """
    begun = [_longest(prompt, held) for prompt in prompts]
    left = dict.fromkeys(free)
    placed = [Placed([]) for _ in prompts]
    for one, (source, length) in zip(placed, begun, strict=True):
        # Where it is, if that loses little.
        if source in left and len(held[source]) - length < _FEWEST_CACHED:
            one.slots.append(source)
            del left[source]
    sources = {source for source, _ in begun}
    order = sorted(left, key=lambda b: b in sources)
    lost: set[int] = set()
    for one, count, (source, length) in zip(placed, counts, begun, strict=True):
        while len(one.slots) < count:
            one.slots.append(order.pop(0))
        if source is not None and source not in lost:
            one.source, one.length = source, length
            if one.slots[0] != source:
                lost.add(one.slots[0])
    _follow(prompts, placed)
    return placed


def _follow(prompts: Sequence[np.ndarray], placed: Sequence[Placed]) -> None:
    """Has prompts begin as others of them, which are read first, where these have more of them."""
    read: dict[int, np.ndarray] = {}
    for prompt, one in zip(prompts, placed, strict=True):
        source, length = _longest(prompt, read)
        if source is not None and length >= one.length + _FEWEST_CACHED:
            one.source, one.length, one.waits = source, length, True
        else:
            read[one.slots[0]] = prompt


def _longest(prompt: np.ndarray, held: Mapping[int, np.ndarray]) -> tuple[int | None, int]:
    """The slot that holds most of what a prompt begins with, if it is worth it, and how much."""
    best, most = None, max(_FEWEST_CACHED, int(len(prompt) * _LEAST_SHARE)) - 1
    for b, tokens in held.items():
        if len(tokens) > most and np.array_equal(tokens[: most + 1], prompt[: most + 1]):
            best, most = b, len(common_beginning(tokens, prompt))
    return best, most if best is not None else 0
