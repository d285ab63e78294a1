"""A run's batches planned one by one, in plain loops: what `attnpo_jax.data.batch_plan` must equal.

Runs were planned so before they were planned many batches at a time; a run that is resumed must
find the batches that it began with.
"""

import math

import grain
import numpy as np

from attnpo_jax.data.packing import choose_buckets, pack, round_up


def epoch_order(num_items, seed, epoch):
    if seed is None:
        return np.arange(num_items)
    shuffled = grain.MapDataset.range(num_items).shuffle(seed=(seed * 1_000_003 + epoch) % 2**32)
    return np.array([shuffled[i] for i in range(num_items)])


def split_evenly(items, lengths, parts, size):
    groups, totals = [[] for _ in range(parts)], [0] * parts
    for item in items[np.argsort(-lengths[items], kind="stable")]:
        group = min((g for g in range(parts) if len(groups[g]) < size), key=totals.__getitem__)
        groups[group].append(int(item))
        totals[group] += int(lengths[item])
    return groups


def cut(batch_size, pairs, row_multiple):
    """Pairs a microbatch, microbatches packed together, and how many such groups a batch has."""
    pairs = min(pairs, batch_size)
    microbatches = math.ceil(batch_size / pairs)
    fewest = math.ceil(microbatches / max(1, max(256, 2 * row_multiple) // pairs))
    even = [g for g in range(fewest, 4 * fewest + 1) if microbatches % g == 0]
    groups = min(even, default=fewest)
    return pairs, math.ceil(microbatches / groups), groups


def most_rows(length, longest, pairs, together, row_multiple):
    """The rows of a length that have no more tokens than a microbatch of rows of one pair each."""
    rows = round_up(pairs, row_multiple)
    while together > 1 and rows * length > round_up(pairs, row_multiple) * round_up(longest):
        rows -= row_multiple
    return rows


def rows_of(needed, together, row_multiple, most):
    """(rows of a microbatch, microbatches) that have the rows of a group, and cost least."""
    even = round_up(math.ceil(needed / together), row_multiple)
    if together == 1:
        return even, 1
    options = [
        (b, math.ceil(needed / b)) for b in range(row_multiple, min(even, most) + 1, row_multiple)
    ]
    return min(reversed(options), key=lambda option: option[1] * (option[0] + row_multiple / 2))


def choose(groups, lengths, longest, num_buckets, row_multiple, pairs, together):
    """The (row length, rows) to use, and which of them each batch does."""
    base = choose_buckets(longest, num_buckets)
    spread = np.linspace(base[0], 2 * base[-1], 24)
    tried = sorted({*base, *(round_up(math.ceil(length)) for length in spread)})
    most = {L: most_rows(L, longest.max(), pairs, together, row_multiple) for L in tried}
    tried = [length for length in tried if most[length]]
    rows = np.zeros((len(longest), len(tried)), int)
    for c, length in enumerate(tried):
        for s in np.flatnonzero(longest <= length):
            needed = max(len(pack(lengths[g], length)) for g in groups[s])
            rows[s, c] = math.prod(rows_of(max(needed, 1), together, row_multiple, most[length]))
    sizes = sorted({(tried[c], int(r)) for c in range(len(tried)) for r in rows[:, c] if r})
    cost = np.full((len(sizes), len(longest)), np.inf)
    for k, (length, count) in enumerate(sizes):
        c = tried.index(length)
        fits = (rows[:, c] > 0) & (rows[:, c] <= count)
        cost[k, fits] = length * count * (1 + length / 2048)
    picked = []
    best = np.full(len(longest), np.inf)
    for _ in range(num_buckets):
        totals = np.minimum(cost, best).sum(axis=1)
        k = int(np.argmin(totals))
        if not totals[k] < best.sum():
            break
        picked.append(k)
        best = np.minimum(best, cost[k])
    picked = sorted({sorted(picked)[k] for k in np.argmin(cost[sorted(picked)], axis=0)})
    return [sizes[k] for k in picked], np.argmin(cost[picked], axis=0)


def shape(groups, sizes, length, rows, row_multiple, together, most):
    """A `RowShape`'s fields, of the rows that the groups of some batches need."""
    packed = [
        [group[i] for i in row]
        for of_batch in groups
        for group in of_batch
        for row in pack(sizes.row[group], length)
    ]
    scored = round_up(max(int(sizes.scored[row].sum()) for row in packed))
    response = round_up(max(int(sizes.response[row].max()) for row in packed))
    most = min(most, round_up(math.ceil(rows / together), row_multiple))
    b = max(b for b in range(row_multiple, most + 1, row_multiple) if rows % b == 0)
    microbatches = len(groups[0]) * rows // b
    return length, scored, response, max(len(row) for row in packed), b, microbatches


def plan(order, sizes, *, batch_size, pairs, num_buckets, row_multiple):
    """The groups of each batch, the shapes as tuples, each batch's shape, the padding."""
    pairs, together, parts = cut(batch_size, pairs, row_multiple)
    groups = [split_evenly(items, sizes.row, parts, pairs * together) for items in order]
    longest = np.array([sizes.row[items].max() for items in order])
    settings = num_buckets, row_multiple, pairs, together
    chosen, which = choose(groups, sizes.row, longest, *settings)
    shapes = []
    for k, (length, rows) in enumerate(chosen):
        of_shape = [groups[s] for s in np.flatnonzero(which == k)]
        most = rows
        if together > 1:
            most = most_rows(length, longest.max(), pairs, together, row_multiple)
        shapes.append(shape(of_shape, sizes, length, rows, row_multiple, together, most))
    room = sum(shapes[k][0] * shapes[k][4] * shapes[k][5] for k in which)
    used = sum(int(sizes.row[items].sum()) for items in order)
    return groups, shapes, which, 1 - used / room
