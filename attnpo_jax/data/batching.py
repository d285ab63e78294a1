"""Rows `[prompt | chosen | rejected]`, batches of a few fixed shapes, and their order.

A batch is a pytree of NumPy arrays whose first axis counts the microbatches that a step accumulates
over. Short pairs share rows. A batch's shape is one of at most `num_buckets` (`RowShape`), chosen
from the data's own lengths, so that a run compiles its step no more often than that.

Shapes: n microbatches, B rows, L row length, M scored tokens a row, G pairs a row, T response
tokens, S judged layers, K columns that weightings read by name; axes of size 2 are (chosen,
rejected) or the judge's two orders.
"""

import dataclasses
from collections.abc import Callable, Collection, Sequence

import jax
import numpy as np

from attnpo_jax.data.batch_plan import Microbatches, Order, RowShape, Sizes, plan
from attnpo_jax.data.packing import pack, split_evenly
from attnpo_jax.data.pair import SIDES
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.shuffle import shuffled
from attnpo_jax.runtime.errors import UserError

_NO_IDS = np.zeros(0, np.int32)


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
      reference_logps_BG2T: float32 reference log-probs; None where nothing reads them.
      judge_BG22ST: float32 raw judge attention by response, order, layer, token.
      verdict_BG2: float32 log-odds, by order, that the judge prefers the chosen response; NaN
        where that was not asked for.
      ready_BG2KT: float32 scorers' numbers and precomputed weights by response, column, token;
        None without any.
      reference_entropy_BG2T: float32 entropy of the reference's distributions; None as above.
      whole_BG22S4: float32 figures of whole responses by response, order, layer (see `shards`);
        None where they were not asked for.
      weight_BG: float32 weight of the pair's loss, 1 where the data have none; 0 for empty slots.
      margin_BG: float32 margin of the pair's logits; 0 where the data have none.
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
    reference_logps_BG2T: jax.Array | None
    judge_BG22ST: jax.Array
    verdict_BG2: jax.Array
    weight_BG: jax.Array
    margin_BG: jax.Array
    valid_BG: jax.Array
    pair_BG: jax.Array
    ready_BG2KT: jax.Array | None = None
    reference_entropy_BG2T: jax.Array | None = None
    whole_BG22S4: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Example:
    """What a row needs of one pair; what is None is not known, and stays 0 in the row."""

    index: int  # the pair's row in its dataset
    prompt_ids: np.ndarray  # int32 (at least one token), of both responses, or of the chosen one
    response_ids: tuple[np.ndarray, np.ndarray]  # int32 ids of (chosen, rejected)
    text_lengths: tuple[int, int]  # how many leading tokens of each response are text
    judge: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (2, S, text length)
    verdict: np.ndarray | None = None  # float32 (2,)
    reference_logps: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (length,)
    reference_entropy: tuple[np.ndarray, np.ndarray] | None = None  # likewise
    # Per response, what weightings read by name: the first columns float32 (scorers, length), the
    # others (precomputed weights, text length).
    scores: tuple[np.ndarray, np.ndarray] | None = None
    ready: tuple[np.ndarray, np.ndarray] | None = None
    weight: float = 1.0
    margin: float = 0.0
    # int32; the rejected response's prompt, empty where `prompt_ids` is that of both.
    rejected_prompt_ids: np.ndarray = dataclasses.field(default_factory=lambda: _NO_IDS)
    whole: tuple[np.ndarray, np.ndarray] | None = None  # per response float32 (2, S, 4)

    @classmethod
    def from_prepared(cls, dataset: Prepared, index: int) -> "Example":
        row = dataset[index]
        judged = bool(dataset.source_layers)

        def of_sides(column: str) -> tuple[np.ndarray, np.ndarray] | None:
            names = [column.format(side) for side in ("chosen", "rejected")]
            return tuple(row[name] for name in names) if names[0] in row else None

        return cls(
            index=index,
            prompt_ids=row["prompt_ids"],
            response_ids=(row["chosen_ids"], row["rejected_ids"]),
            text_lengths=(row["chosen_text_length"], row["rejected_text_length"]),
            judge=(row["judge_chosen"], row["judge_rejected"]) if judged else None,
            verdict=row.get("judge_verdict") if judged else None,
            reference_logps=of_sides("ref_{}_logps"),
            reference_entropy=of_sides("ref_{}_entropy"),
            scores=of_sides("scores_{}"),
            ready=of_sides("ready_{}"),
            weight=row.get("weight", 1.0),
            margin=row.get("margin", 0.0),
            rejected_prompt_ids=row.get("rejected_prompt_ids", _NO_IDS),
            whole=tuple(row[f"judge_{side}_whole"] for side in SIDES)
            if dataset.whole_responses
            else None,
        )

    @property
    def row_length(self) -> int:
        return len(self.prompt_ids) + len(self.rejected_prompt_ids) + self.scored_length

    @property
    def scored_length(self) -> int:
        return len(self.response_ids[0]) + len(self.response_ids[1])


def fill_rows(
    rows: Sequence[Sequence[Example]],
    shape: RowShape,
    num_sources: int,
    num_columns: int = 0,
    groups: Collection[str] = ("reference_logps",),
    whole_responses: bool = False,
) -> PairBatch:
    """Lays examples out in rows: `rows[b]` are the pairs of row b, one after another.

    The judge's attention has `num_sources` (S) layers, with figures of `whole_responses` or not;
    `num_columns` (K) is how many columns the pairs have, scorers' and precomputed weights;
    `groups`, of `shards.GROUPS`, is what they have of the reference.
    """
    B, L, M, T, G = len(rows), shape.length, shape.scored, shape.response, shape.pairs
    S, K = num_sources, num_columns

    def of_reference(group: str) -> np.ndarray | None:
        return np.zeros((B, G, 2, T), np.float32) if group in groups else None

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
        reference_logps_BG2T=of_reference("reference_logps"),
        reference_entropy_BG2T=of_reference("reference_entropy"),
        judge_BG22ST=np.zeros((B, G, 2, 2, S, T), np.float32),
        verdict_BG2=np.zeros((B, G, 2), np.float32),
        weight_BG=np.zeros((B, G), np.float32),
        margin_BG=np.zeros((B, G), np.float32),
        valid_BG=np.zeros((B, G), bool),
        pair_BG=np.full((B, G), -1, np.int32),
        ready_BG2KT=np.zeros((B, G, 2, K, T), np.float32) if K else None,
        whole_BG22S4=np.zeros((B, G, 2, 2, S, 4), np.float32) if whole_responses else None,
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
    # A prompt of its own is part of a response's branch, which then begins anew.
    own = len(e.rejected_prompt_ids) > 0
    batch.segment_BL[b, start : start + e.row_length] = g + 1
    batch.valid_BG[b, g] = True
    batch.pair_BG[b, g] = e.index
    batch.weight_BG[b, g], batch.margin_BG[b, g] = e.weight, e.margin
    if e.judge is not None:
        batch.verdict_BG2[b, g] = np.nan if e.verdict is None else e.verdict
    place, read = start, read_start
    for r, ids in enumerate(e.response_ids):
        n = len(ids)
        if r == 0 or own:
            prompt_ids = e.rejected_prompt_ids if r else e.prompt_ids
            prompt = len(prompt_ids)
            batch.tokens_BL[b, place : place + prompt] = prompt_ids
            batch.positions_BL[b, place : place + prompt] = np.arange(prompt)
            batch.branch_BL[b, place : place + prompt] = 2 + r if own else 1
            place += prompt
            prompt_end = place
        batch.tokens_BL[b, place : place + n] = ids
        batch.positions_BL[b, place : place + n] = prompt + np.arange(n)
        batch.branch_BL[b, place : place + n] = 2 + r
        # A token is predicted by the one before it in its branch; the first by the prompt's last.
        batch.read_BM[b, read] = prompt_end - 1
        batch.read_BM[b, read + 1 : read + n] = np.arange(place, place + n - 1)
        batch.target_BM[b, read : read + n] = ids
        batch.index_BG2T[b, g, r, :n] = np.arange(read, read + n)
        batch.mask_BG2T[b, g, r, :n] = True
        text = e.text_lengths[r]
        batch.text_mask_BG2T[b, g, r, :text] = True
        if e.judge is not None:
            batch.judge_BG22ST[b, g, r, :, :, :text] = e.judge[r]
        if e.whole is not None:
            batch.whole_BG22S4[b, g, r] = e.whole[r]
        first = 0 if e.scores is None else len(e.scores[r])
        if first:
            batch.ready_BG2KT[b, g, r, :first, :n] = e.scores[r]
        if e.ready is not None:
            batch.ready_BG2KT[b, g, r, first:, :text] = e.ready[r]
        if e.reference_logps is not None and batch.reference_logps_BG2T is not None:
            batch.reference_logps_BG2T[b, g, r, :n] = e.reference_logps[r]
        if e.reference_entropy is not None and batch.reference_entropy_BG2T is not None:
            batch.reference_entropy_BG2T[b, g, r, :n] = e.reference_entropy[r]
        place += n
        read += n


class _Batches:
    """Batches by number. Several pairs share a row where that saves padding.

    A step's pairs are packed into rows, and those cut into microbatches of equally many.
    `batch_plan` has which pairs these are, and the few shapes that pad least.
    """

    def __init__(
        self,
        dataset: Prepared,
        order: Order,
        *,
        microbatch_size: int,
        num_buckets: int,
        row_multiple: int,
        local_rows: Callable[[int], np.ndarray] | None,
    ):
        self._dataset = dataset
        self._order = order
        self._cut = Microbatches.of(order.batch_size, microbatch_size, row_multiple)
        self._local_rows = local_rows
        lengths = dataset.lengths()
        scored = lengths["chosen"] + lengths["rejected"]
        self._lengths = lengths["prompt"] + scored
        self._plan = plan(
            order,
            Sizes(self._lengths, scored, np.maximum(lengths["chosen"], lengths["rejected"])),
            self._cut,
            num_buckets,
        )

    @property
    def shapes(self) -> tuple[RowShape, ...]:
        """The shapes that batches come in: a step is compiled once for each."""
        return self._plan.shapes

    @property
    def padding(self) -> float:
        """Share of the tokens of all batches that are padding."""
        return self._plan.padding

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, step: int) -> PairBatch:
        """Batch number `step`, 0-based: arrays (n, B, ...) over n microbatches of B rows."""
        items = self._order[step]
        shape = self.shapes[self._plan.which[step]]
        mine = np.ones(shape.rows, bool)
        if self._local_rows is not None:
            mine = self._local_rows(shape.rows)
        rows, cut = [], self._cut
        for group in split_evenly(items, self._lengths, cut.groups, cut.group_size):
            packed = pack(self._lengths[group], shape.length)
            owned = np.tile(mine, shape.microbatches // cut.groups)
            packed += [[]] * (len(owned) - len(packed))
            rows += [
                [Example.from_prepared(self._dataset, group[i]) for i in row] if own else []
                for row, own in zip(packed, owned, strict=True)
            ]
        batch = fill_rows(
            rows,
            shape,
            len(self._dataset.source_layers),
            len(self._dataset.columns),
            self._dataset.groups,
            self._dataset.whole_responses,
        )
        # The first axis is spelled out, since a -1 has no meaning for arrays of size 0.
        return jax.tree.map(
            lambda x: x.reshape(len(x) // shape.rows, shape.rows, *x.shape[1:]), batch
        )


# Visits of a pair in a run, and epochs. All are looked at before the first step; a million visits
# take a second on a core of an AMD EPYC, and so do 5,000 epochs of few pairs.
MOST_VISITS = 100_000_000
MOST_EPOCHS = 100_000


class TrainBatches(_Batches):
    """The global batches of a run, by step: a function of (data, seed, sizes) alone.

    Each epoch visits every pair once, in an order of its own; an epoch's last batch may be short:
    empty rows fill it up and count for nothing. Since batch k can be made without the ones before
    it, a resumed run needs no more than the step number.

    Args:
      batch_size: pairs a step.
      microbatch_size: pairs that are in memory at once, about; divides `batch_size`.
      epochs: passes over the data.
      steps: if positive, how many steps instead, for as many epochs as that takes.
      pairs: if positive, how many of the pairs there are epochs of, drawn by the seed; those of a
        smaller number are among those of a larger one.
      num_buckets: how many shapes may be compiled.
      row_multiple: microbatches have a multiple of this many rows.
      local_rows: from the number of rows of a microbatch, which of them this process needs: bool
        (B,); the others are left empty. None for all.

    Raises:
      UserError: there is no pair, or fewer than `pairs`; or there are too many steps.
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
        pairs: int = 0,
        num_buckets: int = 4,
        row_multiple: int = 1,
        local_rows: Callable[[int], np.ndarray] | None = None,
    ):
        if not len(dataset):
            raise UserError("the prepared dataset holds no pair to train on")
        if pairs > len(dataset):
            raise UserError(
                f"config.train.pairs = {pairs}: {len(dataset)} pairs are prepared; accepted: at "
                "most as many, or 0 for all"
            )
        number = pairs or len(dataset)
        self.steps_per_epoch = -(-number // batch_size)
        total = steps or max(1, round(epochs * self.steps_per_epoch))
        visits = total * min(batch_size, number)
        if visits > MOST_VISITS or total > MOST_EPOCHS * self.steps_per_epoch:
            raise UserError(
                f"{total:,} steps over {number:,} pairs are {visits:,} visits of a pair in "
                f"{-(-total // self.steps_per_epoch):,} epochs; accepted: {MOST_VISITS:,} visits "
                f"and {MOST_EPOCHS:,} epochs (train.epochs, or train.steps times train.batch_size)"
            )
        members = _drawn(len(dataset), pairs, seed) if pairs else np.arange(number)
        in_epochs = _epochs(number, seed if shuffle else None)
        super().__init__(
            dataset,
            Order(number, batch_size, total, lambda epochs: members[in_epochs(epochs)]),
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
        steps = -(-len(dataset) // batch_size)
        super().__init__(
            dataset,
            Order(len(dataset), batch_size, steps, lambda _: items[None]),
            microbatch_size=batch_size,
            num_buckets=num_buckets,
            row_multiple=row_multiple,
            local_rows=local_rows,
        )


def _drawn(num_pairs: int, wanted: int, seed: int) -> np.ndarray:
    """The first `wanted` of an order that no epoch has, ascending."""
    (order,) = _epochs(num_pairs, seed)(np.array([-1]))
    return np.sort(order[:wanted])


def _epochs(num_pairs: int, seed: int | None) -> Callable[[np.ndarray], np.ndarray]:
    """The pairs' order by epoch, see `Order`; without a seed, as they come."""
    if seed is None:
        return lambda epochs: np.tile(np.arange(num_pairs), (len(epochs), 1))
    return lambda epochs: shuffled(num_pairs, (seed % 2**32 * 1_000_003 + epochs) % 2**32)
