"""Which items go into which row, and which rows into which batch, so that little is padded."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np

# Row lengths are multiples of this: matmuls on CPU and GPU run best on multiples of 8 to 32, and
# finer steps would only make buckets that hardly differ.
ROUND_TO = 32

# What a batch costs beside its tokens, in tokens: small matrix products are slower.
_BATCH_COST = 256
# What compiling one more shape costs, in tokens: little, since later batches use it too. Over 30
# shards of log-normal lengths, eight buckets came to 19 shapes; were this 0, to 29.
_COMPILE_COST = 192


def round_up(value, multiple: int = ROUND_TO):
    """The least multiple that is not below a whole number, or below each of an array of them."""
    return -(-value // multiple) * multiple


def choose_buckets(needed: np.ndarray, num_buckets: int) -> tuple[int, ...]:
    """The at most `num_buckets` sizes that pad the given needs least, exactly (dynamic program).

    Args:
      needed: what each item (or each batch) needs, int (n,); n > 0.
      num_buckets: how many sizes may be used.

    Returns:
      Increasing sizes, multiples of `ROUND_TO`; the last one holds the largest need.
    """
    sizes, counts = np.unique(round_up(needed), return_counts=True)
    n = len(sizes)
    num_buckets = min(num_buckets, n)  # more would be empty
    totals = np.concatenate([[0], np.cumsum(counts)])
    # best[k][j]: least padded total for the first j sizes with k buckets; cut[k][j] remembers how.
    best = np.full((num_buckets + 1, n + 1), np.inf)
    best[0, 0] = 0
    cut = np.zeros((num_buckets + 1, n + 1), int)
    for k in range(1, num_buckets + 1):
        for j in range(1, n + 1):
            options = best[k - 1, :j] + sizes[j - 1] * (totals[j] - totals[:j])
            cut[k, j] = int(np.argmin(options))
            best[k, j] = options[cut[k, j]]
    k = int(np.argmin(best[:, n]))
    chosen, j = [], n
    while j:
        chosen.append(int(sizes[j - 1]))
        j, k = cut[k, j], k - 1
    return tuple(reversed(chosen))


def plan_batches(
    lengths: np.ndarray,
    buckets: Sequence[int],
    batch_size: int,
    token_budget: int,
    row_multiple: int = 1,
    compiled: set[tuple[int, int]] | None = None,
) -> Iterator[tuple[np.ndarray, int, int]]:
    """Cuts rows into batches of like length, longest first, so that least is padded.

    A batch is full, or three, two or one quarter of that, so that there are at most four shapes to
    a length. One that is not full has to save as much as it takes to compile, unless it was. Which
    batches follow one another is a dynamic program.

    Args:
      lengths: int (n,), what each row needs.
      buckets: row lengths to use; rows longer than all of them get the next power of two.
      batch_size: rows a batch, at most.
      token_budget: tokens a batch, at most, but for the fewest rows there can be.
      row_multiple: batches have a multiple of this many rows, the limits rounded up to it.
      compiled: (row length, rows) of the batches of earlier calls; those of this one are added.

    Yields:
      (which rows, the batch's row length, the number of rows it is padded to).
    """
    compiled = set() if compiled is None else compiled
    order = np.argsort(-lengths, kind="stable")
    n = len(order)
    # least[i]: what the first i rows take; last[i]: (first row, length, size) of their last batch.
    least = np.full(n + 1, np.inf)
    least[0] = 0
    last: list[tuple[int, int, int]] = [(0, 0, 0)] * (n + 1)
    for start in range(n):
        longest = int(lengths[order[start]])
        fitting = [b for b in buckets if b >= longest]
        length = min(fitting) if fitting else 1 << (longest - 1).bit_length()
        full = max(1, min(batch_size, token_budget // length, n))
        for size in {round_up(-(-full * quarters // 4), row_multiple) for quarters in (4, 3, 2, 1)}:
            stop = min(start + size, n)
            cost = least[start] + size * length + _BATCH_COST
            if size < round_up(full, row_multiple) and (length, size) not in compiled:
                cost += _COMPILE_COST
            if cost < least[stop]:
                least[stop], last[stop] = cost, (start, length, size)
    cuts = []
    stop = n
    while stop:
        start, length, size = last[stop]
        cuts.append((order[start:stop], length, size))
        compiled.add((length, size))
        stop = start
    yield from reversed(cuts)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """The items of each row, by number: as few rows as first-fit decreasing finds.

    Args:
      lengths: what each item takes, none more than `capacity`.
      capacity: what a row holds.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        row = next((r for r, left in enumerate(room) if left >= lengths[item]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(capacity)
        rows[row].append(item)
        room[row] -= lengths[item]
    return rows


def split_evenly(items: np.ndarray, lengths: np.ndarray, parts: int, size: int) -> list[list[int]]:
    """Items in `parts` groups of at most `size`, their total lengths about equal, longest first."""
    items, group, _ = _split(items, lengths, parts, size)
    by_group = items[np.argsort(group, kind="stable")]
    cuts = np.cumsum(np.bincount(group, minlength=parts))[:-1]
    return [of_group.tolist() for of_group in np.split(by_group, cuts)]


def _split(
    items: np.ndarray, lengths: np.ndarray, parts: int, size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For `split_evenly`: the items, longest first, the group of each, and its place there."""
    items = items[np.argsort(-lengths[items], kind="stable")]
    first, rest = items[:parts], items[parts:]  # the first ones each find a group that is empty
    group, place = list(range(len(first))), [0] * len(first)
    # A heap of the groups that have room, by their totals and then by number, both in one integer.
    totals = lengths[first].astype(np.int64) * parts + np.arange(len(first))
    least = totals.tolist()
    heapq.heapify(least)
    filled = [1] * parts
    for length in (lengths[rest].astype(np.int64) * parts).tolist():
        g = least[0] % parts
        group.append(g)
        place.append(filled[g])
        filled[g] += 1
        if filled[g] < size:
            heapq.heapreplace(least, least[0] + length)
        else:
            heapq.heappop(least)
    return items, np.array(group), np.array(place)


# From where on `split_many` takes one row after the other.
_FEW_ROWS, _MANY_PARTS = 32, 128


def split_many(items: np.ndarray, lengths: np.ndarray, parts: int, size: int) -> np.ndarray:
    """`split_evenly` of every row of `items`.

    Args:
      items: int (rows, n), n at most `parts` times `size`.

    Returns:
      int (size, rows, parts), -1 for none.
    """
    rows, n = items.shape
    groups = np.full((size, rows, parts), -1)
    # One row after the other is quicker where few rows have many groups each.
    if n > parts and (rows < _FEW_ROWS or parts > _MANY_PARTS):
        for row, of_row in enumerate(items):
            of_row, group, place = _split(of_row, lengths, parts, size)
            groups[place, row, group] = of_row
        return groups
    every = np.arange(rows)
    order = np.argsort(-lengths[items], axis=1, kind="stable")
    items = np.take_along_axis(items, order, axis=1).T  # (n, rows)
    # The first ones each find a group that is empty.
    first = min(parts, n)
    groups[0, :, :first] = items[:first].T
    if n <= parts:
        return groups
    totals = lengths[groups[0]].astype(np.int64)  # (rows, parts)
    filled = np.ones((rows, parts), int)
    for item in items[parts:]:
        group = totals.argmin(axis=1)
        place = filled[every, group]
        groups[place, every, group] = item
        filled[every, group] += 1
        full = place + 1 == size
        totals[every, group] = np.where(
            full, np.iinfo(np.int64).max, totals[every, group] + lengths[item]
        )
    return groups


# Groups that are packed at a time: arrays of as many lengths stay in the processor's cache.
_PACKED_AT_ONCE = 1 << 14


def rows_needed(lengths: Sequence[np.ndarray], capacities: np.ndarray) -> list[np.ndarray]:
    """How many rows `pack` finds for each of many groups, with each of several capacities.

    Args:
      lengths: by capacity, int (items, groups), decreasing along the first axis, down to 0 where a
        group has fewer; none more than the capacity.
      capacities: of the rows, int (len(lengths),).

    Returns:
      Rows, int (groups,), by capacity.
    """
    every = np.concatenate(lengths, axis=1)
    capacity = np.repeat(capacities, [of_one.shape[1] for of_one in lengths])
    needed = np.zeros(len(capacity), int)
    for start in range(0, len(capacity), _PACKED_AT_ONCE):
        part = slice(start, start + _PACKED_AT_ONCE)
        for room in _first_fit(every[:, part], capacity[part]):
            needed[part] += room < capacity[part]
    return np.split(needed, np.cumsum([of_one.shape[1] for of_one in lengths])[:-1])


def rows_used(
    lengths: np.ndarray, scored: np.ndarray, capacities: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The most that any row of each group holds after `pack` has packed it.

    Args:
      lengths: int (items, groups), as for `rows_needed`.
      scored: of each item, how many of its tokens are scored, int (items, groups).
      capacities: of the rows of each group, int (groups,).

    Returns:
      (scored tokens, items), each int (groups,).
    """
    most = np.zeros((2, lengths.shape[1]), int)
    counted = np.stack([scored, lengths > 0], axis=1)  # (items, 2, groups)
    for start in range(0, lengths.shape[1], _PACKED_AT_ONCE):
        part = slice(start, start + _PACKED_AT_ONCE)
        held: list[np.ndarray] = []
        _first_fit(lengths[:, part], capacities[part], counted[..., part], held)
        most[:, part] = np.max(held, axis=0, initial=0)
    return most[0], most[1]


def _first_fit(
    lengths: np.ndarray,
    capacity: np.ndarray,
    counted: np.ndarray | None = None,
    held: list[np.ndarray] | None = None,
) -> list[np.ndarray]:
    """What is left of each row, (groups,), after first-fit packing of all groups at once.

    With `counted` (items, n, groups), `held` gets the sums (n, groups) over the items of each row;
    no sum is more than the capacity.
    """
    word = np.int16 if int(capacity.max()) <= np.iinfo(np.int16).max else np.int32
    sign_bit = word(8 * np.dtype(word).itemsize - 1)
    lengths, capacity = lengths.astype(word), capacity.astype(word)
    counted = None if counted is None else counted.astype(word)
    unfit = np.empty_like(capacity)
    rooms: list[np.ndarray] = []
    for i, waiting in enumerate(lengths):  # lengths that have no row yet, 0 when they have
        waiting = waiting.copy()
        for r in range(len(rooms) + 1):
            if r == len(rooms):
                if not waiting.any():
                    break
                rooms.append(capacity.copy())
                if held is not None:
                    held.append(np.zeros_like(counted[0]))
            # Where it fits, the room shrinks and nothing waits any more. Without masks or copies:
            # most of planning a run is spent here.
            rooms[r] -= waiting
            np.right_shift(rooms[r], sign_bit, out=unfit)  # all bits set where it does not fit
            waiting &= unfit
            rooms[r] += waiting
            if held is not None:
                held[r] += counted[i] & ~unfit
                counted[i] &= unfit
    return rooms
