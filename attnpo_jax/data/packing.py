"""Which items go into which row, and which rows into which batch, so that little is padded."""

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


def round_up(value: int, multiple: int = ROUND_TO) -> int:
    """The least multiple that is not below a value."""
    return -(-value // multiple) * multiple


def choose_buckets(needed: np.ndarray, num_buckets: int) -> tuple[int, ...]:
    """The at most `num_buckets` sizes that pad the given needs least, exactly (dynamic program).

    Args:
      needed: what each item (or each batch) needs, int (n,); n > 0.
      num_buckets: how many sizes may be used.

    Returns:
      Increasing sizes, multiples of `ROUND_TO`; the last one holds the largest need.
    """
    sizes, counts = np.unique([round_up(int(value)) for value in needed], return_counts=True)
    n = len(sizes)
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


def split_evenly(items: np.ndarray, lengths: np.ndarray, parts: int, size: int):
    """Items in `parts` groups of at most `size`, their total lengths about equal."""
    groups: list[list[int]] = [[] for _ in range(parts)]
    totals = [0] * parts
    for item in items[np.argsort(-lengths[items], kind="stable")]:
        group = min((g for g in range(parts) if len(groups[g]) < size), key=totals.__getitem__)
        groups[group].append(int(item))
        totals[group] += int(lengths[item])
    return groups
