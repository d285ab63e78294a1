"""Rows by hand, buckets against all others, and batches that visit each pair once an epoch."""

import itertools

import jax
import numpy as np
import pytest

from attnpo_jax.data.batching import EvalBatches, Example, RowShape, TrainBatches, fill_rows
from attnpo_jax.data.packing import choose_buckets, pack, plan_batches
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.runtime.errors import UserError

NUM_SOURCES = 2


def example(index, prompt, chosen, rejected, text_lengths):
    """An example of the given ids, its judge and reference numbers counted up from `index`."""
    responses = tuple(np.array(ids, np.int32) for ids in (chosen, rejected))
    judge = tuple(
        index + np.arange(2 * NUM_SOURCES * n, dtype=np.float32).reshape(2, NUM_SOURCES, n)
        for n in text_lengths
    )
    return Example(
        index=index,
        prompt_ids=np.array(prompt, np.int32),
        response_ids=responses,
        text_lengths=text_lengths,
        judge=judge,
        verdict=np.array([index, -index], np.float32),
        reference_logps=tuple(-index - np.arange(len(ids), dtype=np.float32) for ids in responses),
    )


FIRST = example(7, [11, 12, 13], [21, 22], [31, 32, 33], (1, 3))
SECOND = example(4, [41], [51, 52, 53, 54], [61], (3, 1))


def test_row_of_two_pairs_by_hand():
    batch = fill_rows([[FIRST, SECOND], []], RowShape(16, 12, 5, pairs=2), NUM_SOURCES)
    row = jax.tree.map(lambda x: x[0], batch)
    #        prompt      chosen  rejected    | prompt  chosen        rejected  padding
    assert row.tokens_BL.tolist() == [11, 12, 13, 21, 22, 31, 32, 33, 41, 51, 52, 53, 54, 61, 0, 0]
    assert row.positions_BL.tolist() == [0, 1, 2, 3, 4, 3, 4, 5, 0, 1, 2, 3, 4, 1, 0, 0]
    assert row.branch_BL.tolist() == [1, 1, 1, 2, 2, 3, 3, 3, 1, 2, 2, 2, 2, 3, 0, 0]
    assert row.segment_BL.tolist() == [1] * 8 + [2] * 6 + [0] * 2
    # A response's first token is read at the prompt's last, the others at the one before them.
    assert row.read_BM.tolist() == [2, 3, 2, 5, 6, 8, 9, 10, 11, 8, 0, 0]
    assert row.target_BM.tolist() == [21, 22, 31, 32, 33, 51, 52, 53, 54, 61, 0, 0]
    assert row.index_BG2T.tolist() == [
        [[0, 1, 0, 0, 0], [2, 3, 4, 0, 0]],
        [[5, 6, 7, 8, 0], [9, 0, 0, 0, 0]],
    ]
    assert row.mask_BG2T.sum(-1).tolist() == [[2, 3], [4, 1]]
    assert row.mask_BG2T[1, 0].tolist() == [True] * 4 + [False]
    assert row.text_mask_BG2T.sum(-1).tolist() == [[1, 3], [3, 1]]
    assert row.text_mask_BG2T[1, 0].tolist() == [True] * 3 + [False] * 2
    assert row.reference_logps_BG2T[0].tolist() == [[-7, -8, 0, 0, 0], [-7, -8, -9, 0, 0]]
    assert row.judge_BG22ST.shape == (2, 2, 2, NUM_SOURCES, 5)
    # Response 0 of pair 1: order, source and token count through 4, 5, 6, ...
    assert row.judge_BG22ST[1, 0, 0].tolist() == [[4, 5, 6, 0, 0], [7, 8, 9, 0, 0]]
    assert row.judge_BG22ST[1, 0, 1].tolist() == [[10, 11, 12, 0, 0], [13, 14, 15, 0, 0]]
    assert row.judge_BG22ST[0, 1, 1, 1].tolist() == [16, 17, 18, 0, 0]
    assert row.verdict_BG2.tolist() == [[7, -7], [4, -4]]
    assert row.valid_BG.tolist() == [True, True]
    assert row.pair_BG.tolist() == [7, 4]


def test_an_empty_row_is_all_padding():
    batch = fill_rows([[FIRST], []], RowShape(8, 5, 3, pairs=2), NUM_SOURCES)
    assert batch.valid_BG.tolist() == [[True, False], [False, False]]
    assert batch.pair_BG.tolist() == [[7, -1], [-1, -1]]
    empty = jax.tree.map(lambda x: x[1], batch)
    assert not any(
        np.any(value) for name, value in vars(empty).items() if name not in ("pair_BG", "valid_BG")
    )


def test_rows_may_be_filled_before_judge_and_reference_ran():
    bare = Example(0, FIRST.prompt_ids, FIRST.response_ids, FIRST.text_lengths)
    batch = fill_rows([[bare]], RowShape(8, 5, 3), num_sources=0)
    assert batch.judge_BG22ST.shape == (1, 1, 2, 2, 0, 3)
    assert not batch.reference_logps_BG2T.any() and not batch.verdict_BG2.any()
    assert batch.mask_BG2T.sum() == 5


@pytest.mark.parametrize(
    "shape",
    [
        RowShape(13, 10, 4, pairs=2),  # 14 tokens
        RowShape(14, 9, 4, pairs=2),  # 10 scored
        RowShape(14, 10, 3, pairs=2),  # longest response 4
        RowShape(14, 10, 4, pairs=1),  # 2 pairs
    ],
)
def test_pairs_that_do_not_fit_are_refused(shape):
    fill_rows([[FIRST, SECOND]], RowShape(14, 10, 4, pairs=2), NUM_SOURCES)
    with pytest.raises(
        ValueError, match=r"2 pairs of 14 tokens \(10 scored, longest response 4\) do not fit into"
    ):
        fill_rows([[FIRST, SECOND]], shape, NUM_SOURCES)


@pytest.mark.parametrize(
    ("needed", "num_buckets", "buckets"),
    [
        ([1], 4, (32,)),
        ([32, 33], 4, (32, 64)),
        ([5, 9, 31], 4, (32,)),
        ([10, 40, 70], 1, (96,)),
        # 32 at 64 pads 32 tokens; 64 at 320 would pad 256.
        ([30, 60, 310], 2, (64, 320)),
        # Nine short ones are worth a bucket of their own.
        ([30] * 9 + [60, 90], 2, (32, 96)),
    ],
)
def test_buckets_by_hand(needed, num_buckets, buckets):
    assert choose_buckets(np.array(needed), num_buckets) == buckets


def test_no_other_buckets_pad_less():
    def padded(needed, buckets):
        return sum(min(b for b in buckets if b >= n) for n in needed)

    rng = np.random.default_rng(0)
    for _ in range(40):
        needed = rng.integers(1, 300, rng.integers(1, 12))
        num_buckets = int(rng.integers(1, 5))
        chosen = choose_buckets(needed, num_buckets)
        assert list(chosen) == sorted(set(chosen)) and len(chosen) <= num_buckets
        assert all(b % 32 == 0 for b in chosen) and chosen[-1] - 32 < needed.max() <= chosen[-1]
        sizes = range(32, 321, 32)
        best = min(
            padded(needed, buckets)
            for k in range(1, num_buckets + 1)
            for buckets in itertools.combinations(sizes, k)
            if buckets[-1] >= needed.max()
        )
        assert padded(needed, chosen) == best


def test_batches_cover_every_row_once_in_few_shapes():
    rng = np.random.default_rng(1)
    lengths = np.concatenate([rng.integers(1, 200, 60), [300, 700, 513]])
    buckets = (64, 128, 224)
    plans = list(plan_batches(lengths, buckets, batch_size=8, token_budget=640))
    covered = np.concatenate([items for items, _, _ in plans])
    assert sorted(covered) == list(range(len(lengths)))
    for items, length, size in plans:
        assert lengths[items].max() <= length
        assert len(items) <= size <= 8
        assert size * length <= 640 or size == 1
    shapes = {(length, size) for _, length, size in plans}
    # The rows longer than all buckets: 1024 for 700 and 513, 512 for 300.
    assert {shape for shape in shapes if shape[0] > 224} == {(1024, 1), (512, 1)}
    # Quarters of what the budget or the batch size allows.
    assert {size for length, size in shapes if length == 128} <= {5, 4, 3, 2}
    assert {size for length, size in shapes if length == 64} <= {8, 6, 4, 2}


def test_batches_take_no_more_than_any_other_cuts():
    lengths = np.array([600, 410, 400, 390, 370, 300, 290, 280, 100])
    buckets = (128, 320, 416, 608)

    def cost(cuts):
        """Of cuts after these many rows: tokens, and what each batch costs beside them."""
        total = 0
        for start, stop in itertools.pairwise((0, *cuts, len(lengths))):
            length = min(b for b in buckets if b >= lengths[start])
            full = min(4, 2048 // length)
            rows = stop - start
            total += length * rows + 256 if rows <= full else np.inf
        return total

    every = itertools.chain.from_iterable(itertools.combinations(range(1, 9), k) for k in range(9))
    plans = list(plan_batches(lengths, buckets, batch_size=4, token_budget=2048))
    assert sum(length * size + 256 for _, length, size in plans) == min(map(cost, every))


def test_a_last_row_is_not_padded_to_a_full_batch():
    lengths = np.array([300] * 9)
    assert [len(items) for items, _, _ in plan_batches(lengths, (320,), 8, 4096)] in (
        [2, 7],
        [1, 8],
    )
    for row_multiple, sizes in ((1, [2, 8]), (4, [4, 8])):
        plans = plan_batches(lengths, (320,), 8, 4096, row_multiple=row_multiple)
        assert sorted(size for _, _, size in plans) == sizes


def test_rows_are_batched_longest_first():
    plans = list(plan_batches(np.array([10, 60, 20, 64]), (32, 64), 2, 10_000))
    assert [(items.tolist(), length, size) for items, length, size in plans] == [
        ([3, 1], 64, 2),
        ([2, 0], 32, 2),
    ]
    # A few rows make no more room than they need.
    assert [size for _, _, size in plan_batches(np.array([5, 6]), (32,), 8, 10_000)] == [2]
    assert list(plan_batches(np.array([], int), (32,), 8, 100)) == []


# --- Batches of a prepared dataset --------------------------------------------------------------

NUM_PAIRS = 11


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    rng = np.random.default_rng(0)

    def row(index):
        lengths = {"prompt": 5 + 9 * index, "chosen": 3 + index, "rejected": 14 - index}
        content = {
            f"{name}_ids": rng.integers(1, 99, length, np.int32) for name, length in lengths.items()
        }
        content |= {"id": f"pair-{index}", "judge_verdict": rng.normal(size=2).astype(np.float32)}
        for side in ("chosen", "rejected"):
            n = lengths[side]
            content[f"{side}_text_length"] = n - 1
            content[f"judge_{side}"] = rng.random((2, NUM_SOURCES, n - 1), np.float32)
            content[f"ref_{side}_logps"] = -rng.random(n, np.float32)
        return content

    path = tmp_path_factory.mktemp("prepared") / "train"
    writer = PreparedWriter(path, {"source_layers": [0, 3], "num_layers": 4}, NUM_PAIRS, 4)
    for shard, start, stop in writer.pending():
        writer.write(shard, [row(i) for i in range(start, stop)])
    writer.finish({})
    return Prepared.open(path)


def batches_of(dataset, **changes):
    settings = {"batch_size": 4, "microbatch_size": 2, "shuffle": True, "seed": 3, "epochs": 2}
    return TrainBatches(dataset, **settings | changes)


def pairs_of(batch):
    pairs = batch.pair_BG.reshape(-1)
    return sorted(pairs[pairs >= 0].tolist())


def test_an_epoch_visits_each_pair_once_in_an_order_of_its_own(dataset):
    batches = batches_of(dataset, epochs=3)
    assert (batches.steps_per_epoch, len(batches)) == (3, 9)
    steps = [pairs_of(batches[i]) for i in range(len(batches))]
    assert [len(pairs) for pairs in steps] == [4, 4, 3] * 3
    epochs = [sum(steps[i : i + 3], []) for i in (0, 3, 6)]
    assert all(sorted(epoch) == list(range(NUM_PAIRS)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_the_order_is_a_function_of_the_seed(dataset):
    first, again, other = (
        [pairs_of(b) for b in (batches[i] for i in range(6))]
        for batches in (
            batches_of(dataset),
            batches_of(dataset, num_buckets=1, microbatch_size=4),
            batches_of(dataset, seed=4),
        )
    )
    assert first == again
    assert first != other
    # Recorded once: a library that shuffled otherwise would change every run that is resumed.
    assert first[0] == [2, 3, 5, 9]


def test_a_subset_is_drawn_by_the_seed_and_holds_smaller_ones(dataset):
    def members(pairs, **changes):
        batches = batches_of(dataset, pairs=pairs, **changes)
        assert batches.steps_per_epoch == -(-pairs // 4)
        epochs = [batches[i] for i in range(len(batches))]
        half = len(epochs) // 2
        first, second = (sum(map(pairs_of, part), []) for part in (epochs[:half], epochs[half:]))
        assert sorted(first) == sorted(second) and len(set(first)) == len(first) == pairs
        return set(first)

    assert members(3) < members(5) < members(9)
    assert members(5) == members(5, shuffle=False) != members(5, seed=4)
    with pytest.raises(UserError, match=r"train.pairs = 12: 11 pairs are prepared"):
        batches_of(dataset, pairs=12)


def test_without_shuffling_pairs_come_in_order(dataset):
    batches = batches_of(dataset, shuffle=False)
    assert [pairs_of(batches[i]) for i in range(4)] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
        [0, 1, 2, 3],
    ]


def test_any_batch_can_be_made_without_those_before_it(dataset):
    forwards = [batches_of(dataset)[i] for i in range(6)]
    fresh = batches_of(dataset)
    for i in (5, 0, 3):
        jax.tree.map(np.testing.assert_array_equal, fresh[i], forwards[i])
    with pytest.raises(IndexError):
        fresh[6]


def test_a_short_last_batch_is_filled_up_with_empty_rows(dataset):
    batch = batches_of(dataset, shuffle=False, row_multiple=4)[2]
    assert pairs_of(batch) == [8, 9, 10]
    assert batch.valid_BG.sum() == 3
    empty = ~batch.valid_BG
    assert empty.any()
    assert (batch.pair_BG[empty] == -1).all() and not batch.mask_BG2T[empty].any()


def test_batches_hold_the_rows_of_the_dataset(dataset):
    batch = batches_of(dataset, shuffle=False, microbatch_size=4)[1]
    row = dataset[6]
    n = row["chosen_text_length"]
    _, b, g = (int(axis[0]) for axis in np.nonzero(batch.pair_BG == 6))
    inside = batch.segment_BL[0, b] == g + 1
    ids = np.concatenate([row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")])
    assert batch.tokens_BL[0, b, inside].tolist() == ids.tolist()
    np.testing.assert_array_equal(batch.judge_BG22ST[0, b, g, 0, ..., :n], row["judge_chosen"])
    assert not batch.judge_BG22ST[0, b, g, 0, ..., n:].any()
    np.testing.assert_array_equal(batch.verdict_BG2[0, b, g], row["judge_verdict"])
    length = len(row["rejected_ids"])
    np.testing.assert_array_equal(
        batch.reference_logps_BG2T[0, b, g, 1, :length], row["ref_rejected_logps"]
    )
    assert batch.mask_BG2T[0, b, g].sum(-1).tolist() == [n + 1, length]


def test_shapes_are_few_and_hold_every_batch(dataset):
    for num_buckets in (1, 2, 4):
        batches = batches_of(dataset, batch_size=2, microbatch_size=1, num_buckets=num_buckets)
        found = {
            (*b.tokens_BL.shape, b.read_BM.shape[-1], *b.mask_BG2T.shape[2::2])
            for b in (batches[i] for i in range(len(batches)))
        }
        listed = {
            (s.microbatches, s.rows, s.length, s.scored, s.pairs, s.response)
            for s in batches.shapes
        }
        assert found == listed and 1 <= len(listed) <= num_buckets
    # The longest row has 95 + 17 tokens, and every pair 17 that are scored. To spare memory, rows
    # for a pair at a time are no longer than the longest.
    assert batches.shapes[-1] == RowShape(128, 32, 32, microbatches=2)


def test_packing_first_fit_decreasing_by_hand():
    # 6 | 5+3 | 4+4: 6 leaves room 2, 5 takes the first 3 into its row, the 4s share one.
    assert pack([4, 3, 6, 5, 4], 8) == [[2], [3, 1], [0, 4]]
    assert pack([], 8) == []


def test_short_pairs_share_rows_and_padding_falls(dataset):
    together = batches_of(dataset, batch_size=8, microbatch_size=8, num_buckets=1)
    assert max(shape.pairs for shape in together.shapes) > 1
    lengths = dataset.lengths()
    tokens = lengths["prompt"] + lengths["chosen"] + lengths["rejected"]
    one_a_row = 1 - tokens.sum() / (len(tokens) * 128)
    assert together.padding < one_a_row


def test_rows_come_in_multiples(dataset):
    batches = batches_of(dataset, batch_size=6, microbatch_size=6, row_multiple=4)
    assert {shape.rows % 4 for shape in batches.shapes} == {0}
    assert sum(int(batches[i].valid_BG.sum()) for i in range(len(batches))) == 2 * NUM_PAIRS


def test_number_of_steps(dataset):
    assert len(batches_of(dataset, epochs=0.5)) == 2
    assert len(batches_of(dataset, epochs=0.01)) == 1
    assert len(batches_of(dataset, epochs=5, steps=7)) == 7
    few = batches_of(dataset, batch_size=16, microbatch_size=4, steps=2)
    assert few.steps_per_epoch == 1
    assert [sorted(pairs_of(few[i])) for i in (0, 1)] == [list(range(NUM_PAIRS))] * 2


def test_a_batch_has_no_more_microbatches_than_pairs(dataset):
    batch = batches_of(dataset, batch_size=1_000_000, microbatch_size=1, epochs=1)[0]
    n, rows = batch.tokens_BL.shape[:2]
    assert n < NUM_PAIRS and rows == 1  # some share a row
    assert pairs_of(batch) == list(range(NUM_PAIRS))


def test_a_run_that_no_plan_could_hold_is_refused(dataset):
    message = (
        r"9,999,999 steps over 11 pairs are 109,999,989 visits of a pair in 9,999,999 epochs; "
        r"accepted: 100,000,000 visits and 100,000 epochs \(train.epochs, or train.steps times "
    )
    with pytest.raises(UserError, match=message):
        batches_of(dataset, batch_size=32, microbatch_size=32, steps=9_999_999)


def test_evaluation_visits_each_pair_once_short_ones_first(dataset):
    batches = EvalBatches(dataset, batch_size=4)
    assert [pairs_of(batches[i]) for i in range(len(batches))] == [
        [0, 1, 2, 3],
        [4, 5, 6, 7],
        [8, 9, 10],
    ]
    sizes = [int((batches[i].branch_BL > 0).sum()) for i in range(3)]
    assert sizes[0] < sizes[1]


def test_a_dataset_without_pairs_is_refused():
    class Empty:
        def __len__(self):
            return 0

    with pytest.raises(ValueError, match="no pair to train on"):
        batches_of(Empty())
    with pytest.raises(ValueError, match="no pair to evaluate on"):
        EvalBatches(Empty(), batch_size=2)
