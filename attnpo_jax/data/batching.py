"""Rows `[prompt | chosen | rejected]`, batches of a few fixed shapes, and their order.

A batch is a pytree of NumPy arrays whose first axis counts the microbatches that a step accumulates
over. Short pairs share rows. A batch's shape is one of at most `num_buckets` (`RowShape`), chosen
from the data's own lengths, so that a run compiles its step no more often than that.

Shapes: n microbatches, B rows, L row length, M scored tokens a row, G pairs a row, T response
tokens, S judged layers, K columns of precomputed weights; axes of size 2 are (chosen, rejected) or
the judge's two orders.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import grain
import jax
import numpy as np

from attnpo_jax.data.packing import choose_buckets, pack, round_up, split_evenly
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.runtime.errors import UserError


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PairBatch:
    """Preference pairs laid out in rows. Every array may carry leading microbatch axes.

    Attributes:
      tokens_BL: int32 token ids; 0 where padded.
      positions_BL: int32 rotary positions; both branches continue the prompt's.
      branch_BL: int32; 0 padding, 1 prompt, 2 chosen, 3 rejected.
      segment_BL: int32; 1 + the place among the row's pairs, 0 where padded.
      read_BM: int32 place in the row of the hidden state that predicts a response token.
      target_BM: int32 id of that token.
      index_BG2T: int32 place on the M axis of each response token.
      mask_BG2T: bool, real response tokens, closing template tokens included.
      text_mask_BG2T: bool, those that carry the response's text.
      reference_logps_BG2T: float32 reference log-probs.
      judge_BG22ST: float32 raw judge attention by response, order, layer, token.
      verdict_BG2: float32 log-odds, by order, that the judge prefers the chosen response; NaN
        where that was not asked for.
      ready_BG2KT: float32 precomputed weights by response, column, token; None without any.
      valid_BG: bool, slots that hold a pair.
      pair_BG: int32 row of the prepared dataset, -1 for empty slots.
    """

    tokens_BL: jax.Array
    positions_BL: jax.Array
    branch_BL: jax.Array
    segment_BL: jax.Array
    read_BM: jax.Array
    target_BM: jax.Array
    index_BG2T: jax.Array
    mask_BG2T: jax.Array
    text_mask_BG2T: jax.Array
    reference_logps_BG2T: jax.Array
    judge_BG22ST: jax.Array
    verdict_BG2: jax.Array
    valid_BG: jax.Array
    pair_BG: jax.Array
    ready_BG2KT: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class RowShape:
    """Static sizes of a batch's rows."""

    length: int  # L, tokens a row holds
    scored: int  # M, response tokens a row holds
    response: int  # T, tokens of the longest response
    pairs: int = 1  # G, pairs a row holds
    rows: int = 1  # B, rows of a microbatch


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row needs of one pair; what is None is not known, and stays 0 in the row."""

    index: int  # the pair's row in its dataset
    prompt_ids: np.ndarray  # int32 (at least one token)
    response_ids: tuple[np.ndarray, np.ndarray]  # int32 ids of (chosen, rejected)
    text_lengths: tuple[int, int]  # how many leading tokens of each response are text
    judge: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (2, S, text length)
    verdict: np.ndarray | None = None  # float32 (2,)
    reference_logps: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (length,)
    ready: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (K, text length)

    @classmethod
    def from_prepared(cls, dataset: Prepared, index: int) -> "Example":
        row = dataset[index]
        judged, ready = bool(dataset.source_layers), bool(dataset.weight_columns)
        return cls(
            index=index,
            prompt_ids=row["prompt_ids"],
            response_ids=(row["chosen_ids"], row["rejected_ids"]),
            text_lengths=(row["chosen_text_length"], row["rejected_text_length"]),
            judge=(row["judge_chosen"], row["judge_rejected"]) if judged else None,
            verdict=row.get("judge_verdict") if judged else None,
            reference_logps=(row["ref_chosen_logps"], row["ref_rejected_logps"]),
            ready=(row["ready_chosen"], row["ready_rejected"]) if ready else None,
        )

    @property
    def row_length(self) -> int:
        return len(self.prompt_ids) + self.scored_length

    @property
    def scored_length(self) -> int:
        return len(self.response_ids[0]) + len(self.response_ids[1])


def fill_rows(
    rows: Sequence[Sequence[Example]], shape: RowShape, num_sources: int, num_columns: int = 0
) -> PairBatch:
    """Lays examples out in rows: `rows[b]` are the pairs of row b, one after another.

    The judge's attention has `num_sources` (S) layers; `num_columns` (K) is how many columns of
    precomputed weights the pairs have.
    """
    B, L, M, T, G = len(rows), shape.length, shape.scored, shape.response, shape.pairs
    S, K = num_sources, num_columns
    batch = PairBatch(
        tokens_BL=np.zeros((B, L), np.int32),
        positions_BL=np.zeros((B, L), np.int32),
        branch_BL=np.zeros((B, L), np.int32),
        segment_BL=np.zeros((B, L), np.int32),
        read_BM=np.zeros((B, M), np.int32),
        target_BM=np.zeros((B, M), np.int32),
        index_BG2T=np.zeros((B, G, 2, T), np.int32),
        mask_BG2T=np.zeros((B, G, 2, T), bool),
        text_mask_BG2T=np.zeros((B, G, 2, T), bool),
        reference_logps_BG2T=np.zeros((B, G, 2, T), np.float32),
        judge_BG22ST=np.zeros((B, G, 2, 2, S, T), np.float32),
        verdict_BG2=np.zeros((B, G, 2), np.float32),
        valid_BG=np.zeros((B, G), bool),
        pair_BG=np.full((B, G), -1, np.int32),
        ready_BG2KT=np.zeros((B, G, 2, K, T), np.float32) if K else None,
    )
    for b, examples in enumerate(rows):
        length = sum(e.row_length for e in examples)
        scored = sum(e.scored_length for e in examples)
        longest = max((len(ids) for e in examples for ids in e.response_ids), default=0)
        if length > L or scored > M or longest > T or len(examples) > G:
            raise ValueError(
                f"{len(examples)} pairs of {length} tokens ({scored} scored, longest response "
                f"{longest}) do not fit into a row of {shape}"
            )
        start = read_start = 0
        for g, example in enumerate(examples):
            _fill_pair(batch, b, g, start, read_start, example)
            start += example.row_length
            read_start += example.scored_length
    return batch


def _fill_pair(batch: PairBatch, b: int, g: int, start: int, read_start: int, e: Example) -> None:
    prompt = len(e.prompt_ids)
    row = slice(start, start + e.row_length)
    batch.tokens_BL[b, row] = np.concatenate([e.prompt_ids, *e.response_ids])
    batch.segment_BL[b, row] = g + 1
    batch.positions_BL[b, start : start + prompt] = np.arange(prompt)
    batch.branch_BL[b, start : start + prompt] = 1
    batch.valid_BG[b, g] = True
    batch.pair_BG[b, g] = e.index
    if e.judge is not None:
        batch.verdict_BG2[b, g] = np.nan if e.verdict is None else e.verdict
    place, read = start + prompt, read_start
    for r, ids in enumerate(e.response_ids):
        n = len(ids)
        batch.positions_BL[b, place : place + n] = prompt + np.arange(n)
        batch.branch_BL[b, place : place + n] = 2 + r
        # A token is predicted by the one before it in its branch; the first by the prompt's last.
        batch.read_BM[b, read] = start + prompt - 1
        batch.read_BM[b, read + 1 : read + n] = np.arange(place, place + n - 1)
        batch.target_BM[b, read : read + n] = ids
        batch.index_BG2T[b, g, r, :n] = np.arange(read, read + n)
        batch.mask_BG2T[b, g, r, :n] = True
        text = e.text_lengths[r]
        batch.text_mask_BG2T[b, g, r, :text] = True
        if e.judge is not None:
            batch.judge_BG22ST[b, g, r, :, :, :text] = e.judge[r]
        if e.ready is not None:
            batch.ready_BG2KT[b, g, r, :, :text] = e.ready[r]
        if e.reference_logps is not None:
            batch.reference_logps_BG2T[b, g, r, :n] = e.reference_logps[r]
        place += n
        read += n


# How many row lengths are tried, from what most batches need to twice what the longest pair needs.
_TRIED = 24
# A token of a row of this length costs about twice one of a short row, since it has more to attend
# to: from the FLOPs of a 135M decoder, 6 k; less here, since attention runs below matmul speed.
_ATTENTION_LENGTH = 2048


class _Batches:
    """Batches by number. Several pairs share a row where that saves padding.

    A step's pairs are spread over its microbatches so that each has about as many tokens, and
    packed into rows. Which row lengths and numbers of rows are used is decided here, over all
    batches, so that at most `num_buckets` shapes pad least.
    """

    def __init__(
        self,
        dataset: Prepared,
        order: Sequence[np.ndarray],
        *,
        batch_size: int,
        microbatch_size: int,
        num_buckets: int,
        row_multiple: int,
        local_rows: Callable[[int], np.ndarray] | None,
    ):
        self._dataset = dataset
        self._local_rows = local_rows
        lengths = dataset.lengths()
        self._lengths = lengths["prompt"] + lengths["chosen"] + lengths["rejected"]
        self._responses = np.maximum(lengths["chosen"], lengths["rejected"])
        self._scored = lengths["chosen"] + lengths["rejected"]
        parts = -(-batch_size // microbatch_size)
        self._groups = [
            split_evenly(items, self._lengths, parts, microbatch_size) for items in order
        ]
        longest = np.array([self._lengths[items].max() for items in order])
        chosen = self._choose(longest, num_buckets, row_multiple)
        self._shape_of = [self._shape(chosen == k, *size) for k, size in enumerate(self._sizes)]
        self._which = chosen

    def _choose(self, longest: np.ndarray, num_buckets: int, row_multiple: int) -> np.ndarray:
        """Sets `_sizes`, (length, rows) pairs, and returns which of them each batch uses."""
        base = choose_buckets(longest, num_buckets)
        spread = np.linspace(base[0], 2 * base[-1], _TRIED)
        tried = sorted({*base, *(round_up(math.ceil(length)) for length in spread)})
        # rows[s, c]: rows that batch s needs with the c-th length.
        rows = np.zeros((len(longest), len(tried)), int)
        for c, length in enumerate(tried):
            for s in np.flatnonzero(longest <= length):
                needed = max(len(pack(self._lengths[g], length)) for g in self._groups[s])
                rows[s, c] = round_up(max(needed, 1), row_multiple)
        sizes = sorted({(tried[c], int(r)) for c in range(len(tried)) for r in rows[:, c] if r})
        cost = np.full((len(sizes), len(longest)), np.inf)
        for k, (length, count) in enumerate(sizes):
            c = tried.index(length)
            fits = (rows[:, c] > 0) & (rows[:, c] <= count)
            cost[k, fits] = length * count * (1 + length / _ATTENTION_LENGTH)
        # Greedily: first the cheapest size that fits every batch, then whatever saves most.
        picked: list[int] = []
        best = np.full(len(longest), np.inf)
        for _ in range(num_buckets):
            totals = np.minimum(cost, best).sum(axis=1)
            k = int(np.argmin(totals))
            if not totals[k] < best.sum():
                break
            picked.append(k)
            best = np.minimum(best, cost[k])
        # In the order of `sizes`, and without those that later picks made useless.
        picked = sorted({sorted(picked)[k] for k in np.argmin(cost[sorted(picked)], axis=0)})
        self._sizes = [sizes[k] for k in picked]
        return np.argmin(cost[picked], axis=0)

    def _shape(self, uses: np.ndarray, length: int, rows: int) -> RowShape:
        """The shape for the batches that use a (length, rows) pair: room for all that they hold."""
        packed = [
            [group[i] for i in row]
            for s in np.flatnonzero(uses)
            for group in self._groups[s]
            for row in pack(self._lengths[group], length)
        ]
        return RowShape(
            length=length,
            scored=round_up(max(int(self._scored[row].sum()) for row in packed)),
            response=round_up(max(int(self._responses[row].max()) for row in packed)),
            pairs=max(len(row) for row in packed),
            rows=rows,
        )

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        """The shapes that batches come in: a step is compiled once for each."""
        return tuple(self._shape_of)

    @property
    def padding(self) -> float:
        """Share of the tokens of all batches that are padding."""
        used = sum(int(self._lengths[group].sum()) for step in self._groups for group in step)
        room = sum(
            len(step) * self._shape_of[k].rows * self._shape_of[k].length
            for step, k in zip(self._groups, self._which, strict=True)
        )
        return 1 - used / room

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, step: int) -> PairBatch:
        """Batch number `step`, 0-based: arrays (n, B, ...) over n microbatches of B rows."""
        shape = self._shape_of[self._which[step]]
        mine = np.ones(shape.rows, bool)
        if self._local_rows is not None:
            mine = self._local_rows(shape.rows)
        rows = []
        for group in self._groups[step]:
            packed = pack(self._lengths[group], shape.length)
            packed += [[]] * (shape.rows - len(packed))
            rows += [
                [Example.from_prepared(self._dataset, group[i]) for i in row] if own else []
                for row, own in zip(packed, mine, strict=True)
            ]
        batch = fill_rows(
            rows, shape, len(self._dataset.source_layers), len(self._dataset.weight_columns)
        )
        # The first axis is spelled out, since a -1 has no meaning for arrays of size 0.
        return jax.tree.map(
            lambda x: x.reshape(len(x) // shape.rows, shape.rows, *x.shape[1:]), batch
        )


class TrainBatches(_Batches):
    """The global batches of a run, by step: a function of (data, seed, sizes) alone.

    Each epoch visits every pair once, in an order of its own; an epoch's last batch may be short:
    empty rows fill it up and count for nothing. Since batch k can be made without the ones before
    it, a resumed run needs no more than the step number.

    Args:
      batch_size: pairs a step.
      microbatch_size: pairs that are in memory at once; divides `batch_size`.
      epochs: passes over the data.
      steps: if positive, how many steps instead, for as many epochs as that takes.
      num_buckets: how many shapes may be compiled.
      row_multiple: microbatches have a multiple of this many rows.
      local_rows: from the number of rows of a microbatch, which of them this process needs: bool
        (B,); the others are left empty. None for all.
    """

    def __init__(
        self,
        dataset: Prepared,
        *,
        batch_size: int,
        microbatch_size: int,
        shuffle: bool,
        seed: int,
        epochs: float = 1,
        steps: int = 0,
        num_buckets: int = 4,
        row_multiple: int = 1,
        local_rows: Callable[[int], np.ndarray] | None = None,
    ):
        if not len(dataset):
            raise UserError("the prepared dataset holds no pair to train on")
        self.steps_per_epoch = -(-len(dataset) // batch_size)
        total = steps or max(1, round(epochs * self.steps_per_epoch))
        order: list[np.ndarray] = []
        for epoch in range(-(-total // self.steps_per_epoch)):
            items = _epoch_order(len(dataset), seed, epoch, shuffle)
            order += np.split(items, range(batch_size, len(items), batch_size))
        super().__init__(
            dataset,
            order[:total],
            batch_size=batch_size,
            microbatch_size=microbatch_size,
            num_buckets=num_buckets,
            row_multiple=row_multiple,
            local_rows=local_rows,
        )


class EvalBatches(_Batches):
    """One pass over a dataset, its pairs sorted by length so that little is padded."""

    def __init__(
        self,
        dataset: Prepared,
        *,
        batch_size: int,
        num_buckets: int = 4,
        row_multiple: int = 1,
        local_rows: Callable[[int], np.ndarray] | None = None,
    ):
        if not len(dataset):
            raise UserError("the prepared dataset holds no pair to evaluate on")
        lengths = dataset.lengths()
        items = np.argsort(
            lengths["prompt"] + lengths["chosen"] + lengths["rejected"], kind="stable"
        )
        super().__init__(
            dataset,
            np.split(items, range(batch_size, len(items), batch_size)),
            batch_size=batch_size,
            microbatch_size=batch_size,
            num_buckets=num_buckets,
            row_multiple=row_multiple,
            local_rows=local_rows,
        )


def _epoch_order(num_items: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    if not shuffle:
        return np.arange(num_items)
    # Grain's index shuffle is stable across library versions, which NumPy's generators are not.
    shuffled = grain.MapDataset.range(num_items).shuffle(seed=(seed * 1_000_003 + epoch) % 2**32)
    return np.array([shuffled[i] for i in range(num_items)])
