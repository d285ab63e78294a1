"""Shuffled orders of many epochs at once, the ones that Grain's `shuffle` gives.

Grain's order is a function of (number of items, seed) that is stable across library versions, which
NumPy's generators are not, but it is had item by item, at a microsecond each. A run is planned over
all of its epochs, so here are the same orders as arrays: a cipher with small blocks permutes the
numbers that fit into a block, and is applied again to those that are no item's ("cycle walking").

The cipher is Simon with four rounds (Beaulieu et al. 2013, https://eprint.iacr.org/2013/404), its
round keys what C++'s `std::seed_seq` generates of the seed.
"""

import numpy as np

_ROUNDS = 4
_LEAST_BITS = 16  # of a block
_FEW = 10_000  # items of all epochs for which a table an epoch takes less than arrays of walks
_AT_ONCE = 1 << 18  # numbers that are permuted together; fewer take longer for small epochs


def shuffled(num_items: int, seeds: np.ndarray) -> np.ndarray:
    """The order of items 0 to `num_items` - 1 for each seed, int64 (len(seeds), num_items).

    Args:
      num_items: 1 or more, less than 2^32.
      seeds: integers from 0 to 2^32 - 1, (n,).
    """
    seeds = np.asarray(seeds, np.uint32)
    order = np.zeros((len(seeds), num_items), np.int64)
    if num_items == 1:
        return order
    keys = _round_keys(seeds)
    # Of a largest item 4^n, Grain's block has a bit too few: one item comes twice, another never.
    bits = max(_LEAST_BITS, (num_items - 1).bit_length())
    half = (bits + 1) // 2
    if bits == _LEAST_BITS and order.size <= _FEW:
        for row, of_seed in zip(order, keys.T, strict=True):
            row[:] = _walked(num_items, of_seed[:, None], half)
        return order
    number = np.repeat(np.arange(len(seeds)), num_items)
    items = np.tile(np.arange(num_items), len(seeds))
    flat = order.reshape(-1)
    for start in range(0, len(items), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        flat[part] = _permuted(items[part], num_items - 1, keys[:, number[part]], half)
    return order


def _words(values: np.ndarray, half: int) -> tuple[np.ndarray, np.ndarray]:
    """The upper and the lower `half` bits of numbers, in the least type that holds them."""
    word = np.uint8 if half <= 8 else np.uint16 if half <= 16 else np.uint32
    mask = word((1 << half) - 1)
    return (values >> half).astype(word) & mask, values.astype(word) & mask


def _encrypted(
    left: np.ndarray, right: np.ndarray, keys: np.ndarray, half: int
) -> tuple[np.ndarray, np.ndarray]:
    """The two words (n,) of each block after all rounds, with keys (rounds, n or 1)."""
    word = left.dtype.type
    mask = word((1 << half) - 1)
    whole = half == 8 * left.dtype.itemsize

    def rotated(x: np.ndarray, by: int) -> np.ndarray:
        # NumPy multiplies bytes ten times faster than it shifts them to the left.
        turned = x * word(1 << by) | x >> word(half - by)
        return turned if whole else turned & mask

    def mixed(x: np.ndarray) -> np.ndarray:
        # Of 8 bits, a rotation by 8 is none.
        far = x if half == 8 else rotated(x, 8)
        return rotated(x, 1) & far ^ rotated(x, 2)

    for k in range(0, _ROUNDS, 2):
        left = left ^ mixed(right) ^ keys[k]
        right = right ^ mixed(left) ^ keys[k + 1]
    return left, right


def _walked(num_items: int, keys: np.ndarray, half: int) -> list[int]:
    """The permutation of one epoch: a table of the whole block, and walks through it."""
    left, right = _words(np.arange(1 << 2 * half), half)
    left, right = _encrypted(left, right, _words(keys, half)[1], half)
    table = (left.astype(np.int64) << half | right).tolist()
    order = []
    for item in range(num_items):
        item = table[item]
        while item >= num_items:
            item = table[item]
        order.append(item)
    return order


def _permuted(values: np.ndarray, largest: int, keys: np.ndarray, half: int) -> np.ndarray:
    """Each value's place in the permutation of 0 to `largest` that its keys (rounds, n) make."""
    found = np.empty(len(values), np.int64)
    places = np.arange(len(values))
    left, right = _words(values, half)
    keys = _words(keys, half)[1]
    waits = np.ones(len(values), bool)  # for a value that is an item's
    last_left, last_right = _words(np.array(min(largest, (1 << 2 * half) - 1)), half)
    while True:
        left, right = _encrypted(left, right, keys, half)
        # Compared in words, which are a byte each where it takes many rounds.
        arrived = (left < last_left) | (left == last_left) & (right <= last_right)
        arrived &= waits
        at = np.flatnonzero(arrived)
        if not len(at):
            continue
        found[places[at]] = left[at].astype(np.int64) << half | right[at]
        waits &= ~arrived
        waiting = np.count_nonzero(waits)
        if not waiting:
            return found
        if 2 * waiting < len(waits):
            left, right, places = left[waits], right[waits], places[waits]
            keys, waits = keys[:, waits], waits[waits]


def _round_keys(seeds: np.ndarray) -> np.ndarray:
    """What `std::seed_seq{seed}` generates for `_ROUNDS` words, uint32 (rounds, n).

    C++11, 26.5.7.1; all sums wrap around at 32 bits.
    """

    def tempered(x: np.ndarray) -> np.ndarray:
        return x ^ x >> np.uint32(27)

    n = _ROUNDS
    words = np.full((n, len(seeds)), 0x8B8B8B8B, np.uint32)
    t, rounds = (n - 1) // 2, n
    p = (n - t) // 2
    q = p + t
    for k in range(rounds):
        r1 = np.uint32(1664525) * tempered(words[k % n] ^ words[(k + p) % n] ^ words[(k - 1) % n])
        added = np.uint32(1) if k == 0 else np.uint32(k % n)
        r2 = r1 + added + (seeds if k == 1 else np.uint32(0))
        words[(k + p) % n] += r1
        words[(k + q) % n] += r2
        words[k % n] = r2
    for k in range(rounds, rounds + n):
        r3 = np.uint32(1566083941) * tempered(
            words[k % n] + words[(k + p) % n] + words[(k - 1) % n]
        )
        r4 = r3 - np.uint32(k % n)
        words[(k + p) % n] ^= r3
        words[(k + q) % n] ^= r4
        words[k % n] = r4
    return words
