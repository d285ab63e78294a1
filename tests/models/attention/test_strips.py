"""How rows are cut into strips; what comes of them, test_blocks.py holds."""

import pytest

from attnpo_jax.models.attention import strips


@pytest.mark.parametrize("length", [1, 15, 96, 200, 384, 1000, 1407])
def test_strips_cover_every_query_once(length):
    cut = strips.strips(length, length + 129)
    places = [place for first, stop, _ in cut for place in range(first, stop)]
    assert places == list(range(length))
    assert [keys - stop for _, stop, keys in cut] == [129] * len(cut)
    # All but the last alike, and neither too few queries nor too many.
    sizes = [stop - first for first, stop, _ in cut]
    assert len(set(sizes[:-1])) <= 1 and max(sizes) <= 224
    assert length < 144 or min(sizes[:-1]) >= 80
