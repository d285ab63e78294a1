"""Plans made many batches at a time are those made one by one; epochs are shuffled as by Grain."""

import dataclasses
import time

import grain
import numpy as np
import pytest

from attnpo_jax.data import batch_plan, packing
from attnpo_jax.data.batch_plan import Microbatches, Order, Sizes, plan
from attnpo_jax.data.packing import pack, rows_needed, split_evenly, split_many
from attnpo_jax.data.shuffle import shuffled
from tests.data import plain_plan


def sizes_of(num_pairs, seed, longest=900):
    """Log-normal lengths, as real pairs have."""
    rng = np.random.default_rng(seed)
    prompt, chosen, rejected = (
        np.clip(np.exp(rng.normal(4, 1, num_pairs)), 1, longest).astype(np.int32) for _ in range(3)
    )
    return Sizes(prompt + chosen + rejected, chosen + rejected, np.maximum(chosen, rejected))


def order_of(num_pairs, batch_size, total, seed=3):
    return Order(num_pairs, batch_size, total, lambda epochs: shuffled(num_pairs, epochs + seed))


@pytest.mark.parametrize("seed", [0, 5, 2**32 - 1])
@pytest.mark.parametrize("num_items", [1, 2, 3, 64, 257, 65536, 65538, 262144])
def test_an_epoch_is_in_grains_order(num_items, seed):
    theirs = grain.MapDataset.range(num_items).shuffle(seed=seed)
    order = shuffled(num_items, np.array([7, seed]))[1]
    some = [*range(0, num_items, -(-num_items // 64)), num_items - 1]
    assert order[some].tolist() == [theirs[i] for i in some]
    assert sorted(order) == list(range(num_items))


def test_a_few_epochs_are_those_of_many():
    many = shuffled(100, np.arange(200))  # more items than are walked one by one
    for epochs in ((0,), (5, 199)):
        assert shuffled(100, np.array(epochs)).tolist() == many[list(epochs)].tolist()


def test_where_grain_repeats_an_item_each_comes_once():
    theirs = grain.MapDataset.range(65537).shuffle(seed=1)
    assert len({theirs[i] for i in range(65537)}) == 65536
    order = shuffled(65537, np.array([1]))[0]
    assert sorted(order.tolist()) == list(range(65537))


@pytest.mark.parametrize(
    ("num_pairs", "batch_size", "part_size", "total", "num_buckets", "row_multiple"),
    [
        (1, 1, 1, 3, 1, 1),
        (11, 16, 4, 2, 4, 1),  # a batch that all pairs do not fill
        (300, 32, 4, 25, 6, 1),
        (300, 32, 32, 14, 3, 2),  # not to the end of an epoch
        (300, 7, 7, 60, 6, 4),
        (300, 3, 1, 150, 8, 1),
        (300, 32, 1, 20, 6, 1),
        (300, 24, 2, 20, 4, 2),
        (400, 390, 3, 3, 6, 1),  # more microbatches than batches, in groups
        (700, 600, 200, 3, 6, 1),
    ],
)
def test_batches_planned_together_are_those_planned_one_by_one(
    monkeypatch, num_pairs, batch_size, part_size, total, num_buckets, row_multiple
):
    monkeypatch.setattr(batch_plan, "_AT_ONCE", 1000)  # several blocks
    sizes, order = sizes_of(num_pairs, seed=total), order_of(num_pairs, batch_size, total)
    cut = Microbatches.of(order.batch_size, part_size, row_multiple)
    found = plan(order, sizes, cut, num_buckets)

    epochs = [
        shuffled(num_pairs, np.array([3 + e]))[0]
        for e in range(-(-total * batch_size // num_pairs))
    ]
    cuts = [np.split(e, range(batch_size, num_pairs, batch_size)) for e in epochs]
    plain_order = sum(cuts, [])[:total]
    assert [order[s].tolist() for s in range(total)] == [items.tolist() for items in plain_order]
    groups, shapes, which, padding = plain_plan.plan(
        plain_order,
        sizes,
        batch_size=order.batch_size,
        pairs=part_size,
        num_buckets=num_buckets,
        row_multiple=row_multiple,
    )
    assert [dataclasses.astuple(s) for s in found.shapes] == shapes
    assert found.which.tolist() == which.tolist()
    assert found.padding == pytest.approx(padding, abs=1e-12)
    for s in range(total):
        assert split_evenly(order[s], sizes.row, cut.groups, cut.group_size) == groups[s]


@pytest.mark.parametrize("few_rows", [0, 7])  # together, or one after the other
def test_groups_of_many_batches_are_those_of_each(monkeypatch, few_rows):
    monkeypatch.setattr(packing, "_FEW_ROWS", few_rows)
    rng = np.random.default_rng(0)
    lengths = rng.integers(1, 40, 500)
    for n, parts, size in ((12, 3, 4), (9, 4, 4), (2, 3, 4), (5, 5, 1), (8, 1, 8)):
        items = rng.permuted(np.tile(np.arange(500), (6, 1)), axis=1)[:, :n]
        together = split_many(items, lengths, parts, size)
        assert together.shape == (size, 6, parts)
        for b in range(6):
            each = [[i for i in together[:, b, p] if i >= 0] for p in range(parts)]
            assert each == plain_plan.split_evenly(items[b], lengths, parts, size)


def test_rows_of_many_groups_are_those_of_each():
    rng = np.random.default_rng(1)
    lengths = -np.sort(-rng.integers(0, 60, (7, 200)), axis=0)
    for capacities in ((60, 64, 100), (60, 40_000)):  # of two sizes of integers
        found = rows_needed([lengths] * len(capacities), np.array(capacities))
        for of_capacity, capacity in zip(found, capacities, strict=True):
            plain = [len(pack([n for n in group if n], capacity)) for group in lengths.T]
            assert of_capacity.tolist() == plain


@pytest.mark.parametrize(
    ("num_pairs", "batch_size", "part_size", "epochs"),
    [(50_000, 32, 4, 1), (50_000, 512, 256, 1), (1000, 8, 8, 50), (50_000, 5_000, 4, 1)],
)
def test_a_million_visits_are_planned_in_seconds(num_pairs, batch_size, part_size, epochs):
    # A twentieth of them, each in less than 0.1 s; the first took 1.7 s batch by batch.
    sizes = sizes_of(num_pairs, seed=0, longest=1800)
    total = epochs * -(-num_pairs // batch_size)
    order = order_of(num_pairs, batch_size, total)
    start = time.process_time()
    found = plan(order, sizes, Microbatches.of(batch_size, part_size, 1), 6)
    assert time.process_time() - start < 1
    assert len(found.which) == total


def test_whether_orders_are_kept_changes_no_plan(monkeypatch):
    sizes, order = sizes_of(300, seed=1), order_of(300, 32, 25)
    cut = Microbatches.of(32, 4, 1)
    wanted = plan(order, sizes, cut, 6)
    monkeypatch.setattr(batch_plan, "_KEPT", 0)
    monkeypatch.setattr(batch_plan, "_SHUFFLED_AT_ONCE", 500)
    found = plan(order, sizes, cut, 6)
    assert found.which.tolist() == wanted.which.tolist() and found.shapes == wanted.shapes


def test_a_batch_beyond_the_last_is_an_index_error():
    order = order_of(10, 4, 5)
    assert len(order[2]) == 2
    for step in (5, -1):
        with pytest.raises(IndexError, match=f"batch {step} of 5"):
            order[step]


def test_microbatches_by_hand():
    cut = Microbatches.of(32, 4, 1)
    assert (cut.groups, cut.group_size) == (1, 32)
    # Eight microbatches of four pairs. 21 rows: seven of three have none to spare, six of four have
    # three. 17 rows: one each would be as many steps; six of three have one to spare.
    totals = {n: cut.rows_for(n, 4) for n in (1, 8, 17, 21, 32)}
    assert totals == {1: 1, 8: 8, 17: 18, 21: 21, 32: 32}
    cuts = [cut.cut(n, 4) for n in totals.values()]
    assert cuts == [(1, 1), (8, 1), (6, 3), (7, 3), (8, 4)]
    # Rows that are longer than the longest pair: three have as many tokens as four of one pair.
    assert [cut.most_rows(n, 96) for n in (64, 96, 128, 192, 416)] == [4, 4, 3, 2, 0]
    on_two = Microbatches.of(32, 4, 2)
    assert (on_two.rows_for(17, 4), on_two.cut(20, 4)) == (20, (5, 4))
    assert [on_two.most_rows(n, 96) for n in (96, 128, 192, 224)] == [4, 2, 2, 0]
    # A microbatch alone has all the rows that its pairs need.
    alone = Microbatches.of(8, 8, 4)
    assert (alone.rows_for(5, alone.most_rows(128, 96)), alone.cut(8, 8)) == (8, (1, 8))


@pytest.mark.parametrize(
    ("batch_size", "pairs", "row_multiple", "groups", "together"),
    [
        (256, 4, 1, 1, 64),
        (260, 4, 1, 5, 13),  # of 65 microbatches: two groups would not be alike
        (288, 16, 1, 2, 9),
        (320, 64, 64, 5, 1),
        (268, 4, 1, 2, 34),  # of 67, there are none alike
        (1024, 2, 512, 1, 512),  # no fewer pairs than rows
        (5000, 5000, 8, 1, 1),
    ],
)
def test_groups_are_alike(batch_size, pairs, row_multiple, groups, together):
    cut = Microbatches.of(batch_size, pairs, row_multiple)
    assert (cut.groups, cut.together) == (groups, together)


@pytest.mark.parametrize(
    ("batch_size", "pairs", "row_multiple"), [(32, 1, 1), (32, 3, 1), (32, 4, 4), (32, 8, 8)]
)
def test_microbatches_have_no_more_tokens_than_rows_of_the_longest_pairs(
    batch_size, pairs, row_multiple
):
    sizes, order = sizes_of(1000, seed=4), order_of(1000, batch_size, 60)
    cut = Microbatches.of(batch_size, pairs, row_multiple)
    found = plan(order, sizes, cut, 6)
    most = packing.round_up(pairs, row_multiple) * packing.round_up(int(sizes.row.max()))
    assert max(shape.rows * shape.length for shape in found.shapes) <= most


def test_pairs_of_many_microbatches_leave_less_at_the_ends_of_rows():
    sizes, order = sizes_of(2000, seed=2), order_of(2000, 32, 60)
    padding = {n: plan(order, sizes, Microbatches.of(32, n, 1), 6).padding for n in (1, 4, 8)}
    assert padding[8] < 0.1
    # What rows that four pairs share would leave.
    apart = plan(order_of(2000, 4, 480), sizes, Microbatches.of(4, 4, 1), 6).padding
    assert padding[4] < apart
