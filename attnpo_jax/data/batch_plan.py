"""Which pairs are in which batch of a run, and which shape each batch has.

A batch's pairs are had by its number alone (`Order`), and so is how they lie in its microbatches.
Its shape is one of the few that pad least over all batches of the run, so all of them are looked at
beforehand (`plan`): many at a time, and of many none is kept but for the number of its shape.

Pairs find their rows together, those of many microbatches: the more there are, the less is left at
the ends of rows. Then the rows are cut into microbatches of equally many.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator

import numpy as np

from attnpo_jax.data.packing import (
    choose_buckets,
    round_up,
    rows_needed,
    rows_used,
    split_many,
)

# How many row lengths are tried, from what most batches need to twice what the longest pair needs.
_TRIED = 24
# A token of a row of this length costs about twice one of a short row, since it has more to attend
# to: from the FLOPs of a 135M decoder, 6 k; less here, since attention runs below matmul speed.
_ATTENTION_LENGTH = 2048
# Pairs that are packed together, about: more would hardly pad less, and take long.
_PACKED_TOGETHER = 256
# What a microbatch costs beside its rows, in rows.
_MICROBATCH_COST = 0.5
# Pairs that are looked at together: arrays of a few megabytes, and yet many groups of 256 pairs.
_AT_ONCE = 1 << 18
# Pairs whose order is made together: small epochs take least when there are many.
_SHUFFLED_AT_ONCE = 1 << 19
# Pair-visits of a run up to which all orders are kept for the three times that they are looked at,
# rather than made anew: 32 MB.
_KEPT = 1 << 22


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a batch's rows."""

    length: int  # L, tokens a row holds
    scored: int  # M, response tokens a row holds
    response: int  # T, tokens of the longest response
    pairs: int = 1  # G, pairs a row holds
    rows: int = 1  # B, rows of a microbatch
    microbatches: int = 1  # n, of a batch


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Tokens of each pair, int (pairs,)."""

    row: np.ndarray  # prompt and both responses
    scored: np.ndarray  # both responses
    response: np.ndarray  # the longer response


class Order:
    """The pairs of each batch of a run, by the batch's number.

    Each epoch visits every pair once; its last batch may be short.

    Args:
      num_pairs: pairs there are.
      batch_size: pairs a batch.
      total: batches in all.
      epochs: numbers of epochs (n,) -> the order of the pairs in each of them, (n, num_pairs).
    """

    def __init__(
        self,
        num_pairs: int,
        batch_size: int,
        total: int,
        epochs: Callable[[np.ndarray], np.ndarray],
    ):
        self.batch_size = min(batch_size, num_pairs)
        self.steps_per_epoch = -(-num_pairs // batch_size)
        self._num_pairs, self._total, self._epochs = num_pairs, total, epochs
        # Two, since threads that read ahead are at the end of one epoch and in the next.
        self._epoch = functools.lru_cache(maxsize=2)(lambda e: epochs(np.array([e]))[0])

    def __len__(self) -> int:
        return self._total

    def __getitem__(self, step: int) -> np.ndarray:
        """The pairs of batch `step`, (n,)."""
        if not 0 <= step < self._total:
            raise IndexError(f"batch {step} of {self._total}")
        epoch, place = divmod(int(step), self.steps_per_epoch)
        return self._epoch(epoch)[place * self.batch_size :][: self.batch_size]

    def blocks(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """All batches, many of the same size at a time: (their numbers (n,), pairs (n, size))."""
        whole, rest = divmod(self._num_pairs, self.batch_size)
        shuffled = max(1, _SHUFFLED_AT_ONCE // self._num_pairs)
        num_epochs = -(-self._total // self.steps_per_epoch)
        for first in range(0, num_epochs, shuffled):
            epochs = np.arange(first, min(first + shuffled, num_epochs))
            items = self._epochs(epochs)
            steps = epochs[:, None] * self.steps_per_epoch + np.arange(self.steps_per_epoch)
            cut = whole * self.batch_size
            yield from self._parts(steps[:, :whole], items[:, :cut], self.batch_size)
            if rest:
                yield from self._parts(steps[:, whole:], items[:, cut:], rest)

    def _parts(self, steps: np.ndarray, items: np.ndarray, size: int):
        steps, items = steps.reshape(-1), items.reshape(-1, size)
        asked = steps < self._total
        steps, items = steps[asked], items[asked]
        many = max(1, _AT_ONCE // size)
        for start in range(0, len(steps), many):
            yield steps[start : start + many], items[start : start + many]


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """How batches are cut.

    Attributes:
      pairs: about how many are in a microbatch.
      together: microbatches whose pairs are packed together, a group.
      groups: of a batch.
      row_multiple: microbatches have a multiple of this many rows.
    """

    pairs: int
    together: int
    groups: int
    row_multiple: int

    @classmethod
    def of(cls, batch_size: int, pairs: int, row_multiple: int) -> "Microbatches":
        """Those of batches of so many pairs."""
        pairs = min(pairs, batch_size)
        microbatches = -(-batch_size // pairs)
        most = max(1, max(_PACKED_TOGETHER, 2 * row_multiple) // pairs)
        fewest = -(-microbatches // most)
        # Groups of equally many, if a few more than need be come to that.
        even = (g for g in range(fewest, 4 * fewest + 1) if microbatches % g == 0)
        groups = next(even, fewest)
        return cls(pairs, -(-microbatches // groups), groups, row_multiple)

    @property
    def group_size(self) -> int:
        """Pairs of a group, at most."""
        return self.pairs * self.together

    def most_rows(self, length: int, longest: int) -> int:
        """The rows of a length that a microbatch may have, 0 if none.

        They have no more tokens than rows of one pair each, the longest. A microbatch that is
        packed alone has the rows that it needs.
        """
        rows = round_up(self.pairs, self.row_multiple)
        if self.together == 1:
            return rows
        return rows * longest // max(length, longest) // self.row_multiple * self.row_multiple

    def rows_for(self, needed: int, most: int) -> int:
        """The rows of a group that has to have `needed`: those that cost least.

        `most` is how many a microbatch may have.
        """
        if self.together == 1:
            return round_up(needed, self.row_multiple)
        sizes = self._sizes(needed, most)
        costs = {B: -(-needed // B) * (B + _MICROBATCH_COST * self.row_multiple) for B in sizes}
        best = min(sizes, key=costs.__getitem__)
        return -(-needed // best) * best

    def cut(self, of_group: int, most: int) -> tuple[int, int]:
        """A batch's microbatches, and the rows of each, where `rows_for` says those of a group."""
        rows = next(B for B in self._sizes(of_group, most) if of_group % B == 0)
        return self.groups * of_group // rows, rows

    def _sizes(self, of_group: int, most: int) -> range:
        """The rows that a microbatch may have, the most first."""
        even = round_up(-(-of_group // self.together), self.row_multiple)
        return range(min(even, most), 0, -self.row_multiple)


@dataclasses.dataclass(frozen=True)
class Plan:
    """The shapes of a run's batches.

    Attributes:
      shapes: those that batches come in.
      which: the number of each batch's shape, (steps,).
      padding: share of the tokens of all batches that are padding.
    """

    shapes: tuple[RowShape, ...]
    which: np.ndarray
    padding: float


def plan(order: Order, sizes: Sizes, microbatches: Microbatches, num_buckets: int) -> Plan:
    """The at most `num_buckets` shapes that pad the batches least.

    Args:
      order: the pairs of all batches.
      sizes: of each pair.
      microbatches: how batches are cut.
      num_buckets: how many shapes there may be.
    """
    parts = microbatches.groups
    size = min(microbatches.group_size, order.batch_size)
    groups = functools.partial(split_many, lengths=sizes.row, parts=parts, size=size)
    kept = list(order.blocks()) if len(order) * order.batch_size <= _KEPT else None

    def blocks():
        return order.blocks() if kept is None else kept

    longest = np.zeros(len(order), np.int32)
    used = 0
    for steps, items in blocks():
        of_items = sizes.row[items]
        longest[steps] = of_items.max(axis=1)
        used += int(of_items.sum())
    room_of_one = round_up(int(longest.max()))
    tried = {
        L: microbatches.most_rows(L, room_of_one) for L in _lengths_to_try(longest, num_buckets)
    }
    most_rows = {length: most for length, most in tried.items() if most}
    needs, pattern = _needs(blocks, sizes, groups, longest, most_rows, microbatches)
    chosen, which_of = _choose(needs, np.bincount(pattern), list(most_rows), num_buckets)
    which = which_of.astype(np.int32)[pattern]
    shapes = []
    for shape in _shapes(blocks, sizes, groups, chosen, which):
        n, rows = microbatches.cut(shape.rows, most_rows[shape.length])
        shapes.append(dataclasses.replace(shape, rows=rows, microbatches=n))
    counts = np.bincount(which, minlength=len(shapes))
    of_batches = (s.microbatches * s.rows * s.length for s in shapes)
    room = sum(int(n) * tokens for n, tokens in zip(counts, of_batches, strict=True))
    return Plan(tuple(shapes), which, 1 - used / room)


def _lengths_to_try(longest: np.ndarray, num_buckets: int) -> list[int]:
    base = choose_buckets(longest, num_buckets)
    spread = np.linspace(base[0], 2 * base[-1], _TRIED)
    return sorted({*base, *(round_up(math.ceil(length)) for length in spread)})


def _needs(
    blocks, sizes, groups, longest, most_rows, microbatches
) -> tuple[np.ndarray, np.ndarray]:
    """The rows that batches need with each row length of `most_rows`.

    Returns:
      int (patterns, lengths): rows of a group of the batches of a pattern, 0 where their longest
      pair does not fit; and the pattern of each batch, (steps,).
    """
    tried = list(most_rows)
    capacities = np.array(tried)
    # None needs more rows than it has pairs.
    counts = range(1, microbatches.group_size + 1)
    of_most = {
        most: [0, *(microbatches.rows_for(n, most) for n in counts)]
        for most in {*most_rows.values()}
    }
    rows_for = np.array([of_most[most] for most in most_rows.values()])
    pattern = np.zeros(len(longest), np.int32)
    kept: list[np.ndarray] = []
    for steps, items in blocks():
        in_groups = groups(items)
        fits = longest[steps] <= capacities[:, None]
        rows = np.where(fits.T, rows_for[:, 1], 0).astype(np.int32)
        if len(in_groups) > 1:  # one pair takes one row
            lengths = _of_pairs(sizes.row, in_groups)
            most = rows_needed(
                [lengths[:, fit].reshape(len(lengths), -1) for fit in fits], capacities
            )
            for c, (fit, of_rows) in enumerate(zip(fits, most, strict=True)):
                needed = of_rows.reshape(-1, lengths.shape[-1]).max(axis=1)
                rows[fit, c] = rows_for[c, needed]
        # Many batches need the same, and then cost the same.
        numbers: dict[bytes, int] = {}
        by_bytes = np.ascontiguousarray(rows).view(f"V{rows.itemsize * len(tried)}").reshape(-1)
        number = [numbers.setdefault(row, len(numbers)) for row in by_bytes.tolist()]
        pattern[steps] = np.array(number) + sum(map(len, kept))
        kept.append(np.frombuffer(b"".join(numbers), np.int32).reshape(-1, len(tried)))
    return np.concatenate(kept), pattern


def _of_pairs(values: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Each pair's value, 0 where there is none."""
    return np.where(groups >= 0, values[groups], 0)


def _choose(
    needs: np.ndarray, weights: np.ndarray, tried: list[int], num_buckets: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The at most `num_buckets` (row length, rows) that cost least, and each pattern's among them.

    Args:
      needs: see `_needs`.
      weights: how many batches have each pattern.
      tried: the row lengths.
    """
    sizes = sorted({(tried[c], int(r)) for c in range(len(tried)) for r in _distinct(needs[:, c])})
    column = {length: c for c, length in enumerate(tried)}
    # In tokens of a short row, times _ATTENTION_LENGTH: whole numbers, whose sums are exact.
    costs = [length * rows * (_ATTENTION_LENGTH + length) for length, rows in sizes]

    def fitting(k: int) -> np.ndarray:
        length, rows = sizes[k]
        of_length = needs[:, column[length]]
        return (of_length > 0) & (of_length <= rows)

    def cost_of(k: int) -> np.ndarray:
        return np.where(fitting(k), costs[k], np.iinfo(np.int64).max)

    # Greedily: first the cheapest size that fits every batch, then whatever saves most.
    picked = [min((k for k in range(len(sizes)) if fitting(k).all()), key=lambda k: costs[k])]
    best = cost_of(picked[0])
    while len(picked) < num_buckets:
        totals = _totals(needs, weights, best, sizes, costs, column)
        k = int(np.argmin(totals))
        if not totals[k] < int(best @ weights):
            break
        picked.append(k)
        best = np.minimum(best, cost_of(k))
    # In the order of `sizes`, and without those that later picks made useless.
    picked = sorted(picked)
    picked = sorted({picked[k] for k in np.argmin([cost_of(k) for k in picked], axis=0)})
    return [sizes[k] for k in picked], np.argmin([cost_of(k) for k in picked], axis=0)


def _distinct(needs: np.ndarray) -> np.ndarray:
    return np.flatnonzero(np.bincount(needs)[1:]) + 1


def _totals(needs, weights, best, sizes, costs, column) -> np.ndarray:
    """What all batches cost with one more size than those that `best` comes of, by size (k,)."""
    values, of_pattern = np.unique(best, return_inverse=True)
    most = int(needs.max()) + 1
    totals = np.zeros(len(sizes), np.int64)
    # counts[length][r, v]: batches that need at most r rows of a length, and cost values[v] now.
    counts = {}
    for length, c in column.items():
        found = np.bincount(
            needs[:, c] * len(values) + of_pattern, weights, minlength=most * len(values)
        ).reshape(most, -1)
        found[0] = 0  # a longest pair that does not fit
        counts[length] = np.cumsum(found, axis=0).astype(np.int64)
    everywhere = int(best @ weights)
    for k, (length, rows) in enumerate(sizes):
        saved = np.maximum(values - costs[k], 0)
        totals[k] = everywhere - int(counts[length][rows] @ saved)
    return totals


def _shapes(blocks, sizes, groups, chosen, which) -> tuple[RowShape, ...]:
    """The chosen (row length, rows of a group), not yet cut, with room for all that they hold."""
    scored, response, pairs = np.zeros((3, len(chosen)), int)
    capacities = np.array([length for length, _ in chosen])
    for steps, items in blocks():
        in_groups = groups(items)
        np.maximum.at(response, which[steps], sizes.response[items].max(axis=1))
        lengths, of_scored = (
            _of_pairs(x, in_groups).reshape(len(in_groups), -1) for x in (sizes.row, sizes.scored)
        )
        shape = np.repeat(which[steps], in_groups.shape[2])
        most = rows_used(lengths, of_scored, capacities[shape])
        np.maximum.at(scored, shape, most[0])
        np.maximum.at(pairs, shape, most[1])
    return tuple(
        RowShape(
            length=length,
            scored=round_up(int(scored[k])),
            response=round_up(int(response[k])),
            pairs=int(pairs[k]),
            rows=rows,
        )
        for k, (length, rows) in enumerate(chosen)
    )
