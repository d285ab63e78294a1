"""Invariants of rows, whatever the pairs: text, tokenizer, lengths and packing are random."""

import functools

import hypothesis
import numpy as np
from hypothesis import strategies as st

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.formats import Pair
from attnpo_jax.data.packing import pack
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from tests import tiny

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEXT = st.text(st.sampled_from("ab é\n\u0301😀今<|>"), min_size=1, max_size=12).filter(str.strip)


@functools.cache
def chat_tokenizer(merges):
    """A byte-level tokenizer with the first `merges` of some merges of bytes."""
    pairs = [("a", "b"), ("Ġ", "a"), ("ab", "ab"), ("Ã", "©"), ("ð", "Ł"), ("a", "a")][:merges]
    marks = ["<|user|>", "<|assistant|>", "<|end|>"]
    fast = tiny.byte_tokenizer(marks, TEMPLATE, pairs, use_regex=True)
    return ChatTokenizer(fast, origin="random")


@st.composite
def examples(draw):
    """Pairs of random text by a random tokenizer, cut to random lengths, with random numbers."""
    tokenizer = chat_tokenizer(draw(st.integers(0, 6)))
    sources, columns = draw(st.integers(0, 2)), draw(st.integers(0, 2))
    found = []
    for index in range(draw(st.integers(1, 7))):
        prompt, chosen, rejected = draw(TEXT), draw(TEXT), draw(TEXT)
        pair = Pair(str(index), ({"role": "user", "content": prompt},), chosen, rejected)
        longest = draw(st.integers(4, 40))
        tokenized = tokenize_pair(
            tokenizer, pair, max_length=longest, max_prompt_length=draw(st.integers(1, longest - 1))
        )
        ids = (tokenized.chosen_ids, tokenized.rejected_ids)
        lengths = (tokenized.chosen_text_length, tokenized.rejected_text_length)
        # Numbers that tell pair, response and place.
        base = 1000.0 * (index + 1)
        found.append(
            Example(
                index,
                tokenized.prompt_ids,
                ids,
                lengths,
                judge=tuple(
                    base + 100 * r + np.tile(np.arange(n, dtype=np.float32), (2, sources, 1))
                    for r, n in enumerate(lengths)
                ),
                verdict=np.array([base, -base], np.float32),
                reference_logps=tuple(
                    base + 100 * r + np.arange(len(x), dtype=np.float32) for r, x in enumerate(ids)
                ),
                ready=tuple(
                    base + 100 * r + np.tile(np.arange(n, dtype=np.float32), (columns, 1))
                    for r, n in enumerate(lengths)
                )
                if columns
                else None,
            )
        )
    return found, sources, columns


def sees(batch, b):
    """Which token of row b sees which: the rule of attention, from the row's own labels."""
    branch, segment = batch.branch_BL[b], batch.segment_BL[b]
    place = np.arange(len(branch))
    real = branch > 0
    same = (branch[None] == 1) | (branch[None] == branch[:, None])
    return (
        (place[None] <= place[:, None])
        & real[None]
        & real[:, None]
        & (segment[None] == segment[:, None])
        & same
    )


@hypothesis.settings(max_examples=60)
@hypothesis.given(examples(), st.data())
def test_rows_of_random_pairs(drawn, data):
    found, sources, columns = drawn
    longest = max(e.row_length for e in found)
    capacity = data.draw(st.integers(longest, longest + 80))
    rows = pack([e.row_length for e in found], capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(found)))  # none lost or split
    shape = RowShape(
        capacity,
        max(sum(found[i].scored_length for i in row) for row in rows),
        max(len(ids) for e in found for ids in e.response_ids),
        pairs=max(map(len, rows)),
    )
    batch = fill_rows([[found[i] for i in row] for row in rows], shape, sources, columns)
    assert (batch.ready_BG2KT is None) == (columns == 0)
    scored = []
    for b, row in enumerate(rows):
        visible = sees(batch, b)
        for g, i in enumerate(row):
            e = found[i]
            assert batch.pair_BG[b, g] == i and batch.valid_BG[b, g]
            np.testing.assert_array_equal(batch.verdict_BG2[b, g], e.verdict)
            own = np.flatnonzero(batch.segment_BL[b] == g + 1)
            assert np.array_equal(own, np.arange(own[0], own[0] + e.row_length))  # in one piece
            for r, ids in enumerate(e.response_ids):
                n, text = len(ids), e.text_lengths[r]
                assert batch.mask_BG2T[b, g, r].sum() == n
                assert batch.text_mask_BG2T[b, g, r].sum() == text
                at = batch.index_BG2T[b, g, r, :n]
                scored += [(b, int(k)) for k in at]
                np.testing.assert_array_equal(batch.target_BM[b, at], ids)
                # What predicts a token sees the prompt and what is before it of its own response:
                # the row as if the response stood alone behind its prompt, at its positions.
                whole = np.concatenate([e.prompt_ids, ids])
                for t, read in enumerate(batch.read_BM[b, at]):
                    context = np.flatnonzero(visible[read])
                    size = len(e.prompt_ids) + t
                    np.testing.assert_array_equal(batch.tokens_BL[b, context], whole[:size])
                    np.testing.assert_array_equal(batch.positions_BL[b, context], np.arange(size))
                judge = batch.judge_BG22ST[b, g, r]
                np.testing.assert_array_equal(judge[..., :text], e.judge[r])
                assert not judge[..., text:].any()
                logps = batch.reference_logps_BG2T[b, g, r]
                np.testing.assert_array_equal(logps[:n], e.reference_logps[r])
                assert not logps[n:].any()
                if columns:
                    ready = batch.ready_BG2KT[b, g, r]
                    np.testing.assert_array_equal(ready[..., :text], e.ready[r])
                    assert not ready[..., text:].any()
        assert not batch.valid_BG[b, len(row) :].any()
        assert (batch.pair_BG[b, len(row) :] == -1).all()
    # Every response token is scored once.
    assert len(scored) == len(set(scored)) == sum(e.scored_length for e in found)
