import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from attnpo_jax.data import align as alignment


def test_identical_tokenizations_give_identity():
    spans = [[0, 3], [3, 4], [4, 9]]
    mass = np.array([0.2, 0.5, 0.3])
    np.testing.assert_array_equal(alignment.align(mass, spans, spans), mass)


def test_mass_goes_by_characters():
    # "unhappily": un|happily against unhapp|ily; 7 characters of 0.7 leave 0.4 left of the cut.
    out = alignment.align([0.3, 0.7], [[0, 2], [2, 9]], [[0, 6], [6, 9]])
    np.testing.assert_allclose(out, [0.3 + 0.4, 0.3], rtol=1e-15)


def test_equal_segments_are_copied_bit_by_bit_beside_unequal_ones():
    source = [[0, 3], [3, 7], [7, 8], [8, 12]]
    target = [[0, 3], [3, 5], [5, 7], [7, 8], [8, 12]]
    mass = np.array([[0.1, 0.4, 1 / 3, 0.7], [1e-9, 2.0, 0.0, 5.0]])
    out = alignment.align(mass, source, target)
    np.testing.assert_array_equal(out[:, [0, 3, 4]], mass[:, [0, 2, 3]])
    np.testing.assert_array_equal(out[:, 1], mass[:, 1] / 2)
    np.testing.assert_array_equal(out[:, 2], mass[:, 1] / 2)


def test_several_tokens_over_one_character_keep_their_own_mass():
    # A four-byte emoji between two words; the last word is cut otherwise, so nothing is trivial.
    source = [[0, 2]] + [[2, 3]] * 4 + [[3, 6]]
    target = [[0, 2]] + [[2, 3]] * 4 + [[3, 4], [4, 6]]
    out = alignment.align([0.1, 0.2, 0.3, 0.05, 0.05, 0.3], source, target)
    np.testing.assert_allclose(out, [0.1, 0.2, 0.3, 0.05, 0.05, 0.1, 0.2], rtol=1e-15)


def test_several_targets_over_one_character_share_evenly():
    out = alignment.align([0.6, 0.4], [[0, 1], [1, 2]], [[0, 1], [0, 1], [0, 1], [1, 2]])
    np.testing.assert_allclose(out, [0.2, 0.2, 0.2, 0.4], rtol=1e-15)


def test_other_ids_over_the_same_characters_are_not_copied():
    source = target = [[0, 1], [0, 1], [1, 2]]
    mass = [0.6, 0.2, 0.2]
    np.testing.assert_array_equal(alignment.align(mass, source, target, [1, 2, 3], [1, 2, 3]), mass)
    out = alignment.align(mass, source, target, [1, 2, 3], [7, 8, 3])
    np.testing.assert_allclose(out, [0.4, 0.4, 0.2], rtol=1e-15)


def test_skipped_characters_belong_to_the_token_that_follows():
    # "a bc" with the space left out of the offsets on one side only.
    out = alignment.align([0.4, 0.6], [[0, 1], [1, 4]], [[0, 1], [2, 4]])
    np.testing.assert_array_equal(out, [0.4, 0.6])
    out = alignment.align([0.4, 0.6], [[0, 1], [2, 4]], [[0, 2], [2, 4]])
    np.testing.assert_allclose(out, [0.4 + 0.2, 0.4], rtol=1e-15)


def test_target_without_characters_gets_nothing_from_its_neighbours():
    out = alignment.align([0.4, 0.6], [[0, 2], [2, 5]], [[0, 0], [0, 2], [2, 5], [5, 5]])
    np.testing.assert_array_equal(out, [0, 0.4, 0.6, 0])


def test_source_without_characters_passes_its_mass_on():
    # to the character it stands before, and at the end of the text to the last one
    out = alignment.align([0.1, 0.4, 0.3, 0.2], [[0, 0], [0, 2], [2, 5], [5, 5]], [[0, 2], [2, 5]])
    np.testing.assert_allclose(out, [0.5, 0.5], rtol=1e-15)
    # or to its like, where the target has one
    out = alignment.align(
        [0.1, 0.4, 0.5], [[0, 0], [0, 2], [2, 5]], [[0, 0], [0, 2], [2, 4], [4, 5]]
    )
    np.testing.assert_allclose(out, [0.1, 0.4, 0.5 * 2 / 3, 0.5 / 3], rtol=1e-15)


def test_text_cut_for_training_loses_the_mass_beyond_it():
    out = alignment.align([0.25, 0.25, 0.5], [[0, 2], [2, 4], [4, 8]], [[0, 2], [2, 4], [4, 6]])
    np.testing.assert_array_equal(out, [0.25, 0.25, 0.25])


def test_text_cut_for_the_judge_has_no_mass_beyond_it():
    out = alignment.align([0.25, 0.75], [[0, 2], [2, 4]], [[0, 2], [2, 4], [4, 6]])
    np.testing.assert_array_equal(out, [0.25, 0.75, 0])


def test_no_tokens():
    none = np.zeros((0, 2), np.int32)
    assert alignment.align(np.zeros((2, 0)), none, [[0, 3]]).tolist() == [[0], [0]]
    assert alignment.align(np.ones((2, 1)), [[0, 3]], none).shape == (2, 0)


def test_misfitting_shapes_are_refused():
    with pytest.raises(ValueError, match="last axis must match the 2 source spans"):
        alignment.align([1.0], [[0, 1], [1, 2]], [[0, 2]])
    with pytest.raises(ValueError, match="target_ids has shape"):
        alignment.align([1.0], [[0, 2]], [[0, 2]], [1], [1, 2])
    with pytest.raises(ValueError, match="both or neither"):
        alignment.align([1.0], [[0, 2]], [[0, 2]], [1])


def test_close_gaps():
    spans = np.array([[1, 2], [2, 2], [4, 6]])
    assert alignment.close_gaps(spans).tolist() == [[0, 2], [2, 2], [2, 6]]
    assert alignment.close_gaps(spans, 8).tolist() == [[0, 2], [2, 2], [2, 8]]


@st.composite
def tokenizations(draw, length: int, plain: bool = False):
    """Spans over `length` characters: words; unless plain, also byte pieces, gaps, empty tokens."""
    spans = []
    place = 0
    while place < length:
        end = draw(st.integers(place + 1, min(length, place + 5)))
        kind = "word" if plain else draw(st.sampled_from(["word", "word", "bytes", "gap", "empty"]))
        if kind == "empty":
            spans.append((place, place))
        if kind == "bytes":
            # The last piece also holds the beginning of the next character, as byte-level BPE may.
            spans += [(place, place + 1)] * draw(st.integers(1, 3))
            spans += [(place, min(place + 2, length))] * draw(st.integers(0, 1))
            end = place + 1
        elif kind == "gap" and end > place + 1:
            spans.append((place + 1, end))
        else:
            spans.append((place, end))
        place = end
    if not plain and draw(st.booleans()):
        spans.append((length, length))
    return np.array(spans)


def masses(count: int):
    # Halves of the smallest numbers there are would be nothing.
    in_range = st.floats(0, 1, allow_subnormal=False)
    return st.lists(in_range, min_size=count, max_size=count).map(np.array)


@hypothesis.given(st.data())
def test_mass_is_conserved(data):
    length = data.draw(st.integers(1, 30))
    source, target = data.draw(tokenizations(length)), data.draw(tokenizations(length))
    mass = data.draw(masses(len(source)))
    out = alignment.align(np.stack([mass, mass[::-1]]), source, target)
    assert (out >= 0).all()
    np.testing.assert_allclose(out.sum(-1), mass.sum(), rtol=1e-12)


@hypothesis.given(st.data())
def test_identity_survives_other_ids_and_a_different_tail(data):
    length = data.draw(st.integers(1, 20))
    spans = data.draw(tokenizations(length))
    wide = spans[spans[:, 1] > spans[:, 0]]
    mass = data.draw(masses(len(wide)))
    ids = np.arange(len(wide))
    tail = np.array([[length, length + 2], [length + 2, length + 4]])
    other_tail = np.array([[length, length + 1], [length + 1, length + 4]])
    out = alignment.align(
        np.append(mass, [0.25, 0.5]),
        np.concatenate([wide, tail]),
        np.concatenate([wide, other_tail]),
        np.append(ids, [100, 101]),
        np.append(ids, [200, 201]),
    )
    np.testing.assert_array_equal(out[: len(wide)], mass)
    np.testing.assert_allclose(out[len(wide) :], [0.125, 0.625])


@hypothesis.given(st.data())
def test_words_share_mass_by_overlap(data):
    length = data.draw(st.integers(1, 20))
    source = data.draw(tokenizations(length, plain=True))
    target = data.draw(tokenizations(length, plain=True))
    mass = data.draw(masses(len(source)))
    expected = [
        sum(
            m * max(0, min(end, e) - max(start, s)) / (e - s)
            for m, (s, e) in zip(mass, source, strict=True)
        )
        for start, end in target
    ]
    np.testing.assert_allclose(alignment.align(mass, source, target), expected, atol=1e-12)
