"""Marked pairs: what rows may say, and where the marks are in tokens."""

import collections
import json
import re

import pytest

from attnpo_jax.data.columns import AS_THEY_ARE, Columns
from attnpo_jax.data.pair import SIDES, BadExample
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.probe.pairs import BUILTIN, load, token_mask
from tests import tiny

ROW = {"id": "a", "prompt": "How many?", "chosen": "It is 12, not 9.", "rejected": " It is 13!"}


def loaded(tmp_path, *rows, on_bad_row="error", columns=AS_THEY_ARE):
    file = tiny.write_lines(tmp_path / "marked.jsonl", rows)
    return load(str(file), columns, on_bad_row=on_bad_row, limit=1 << 20)


def test_marks_are_read_beside_the_pair(tmp_path):
    marks = {"chosen_spans": [[6, 8], [14, 15]], "rejected_spans": [[7, 9]]}
    found = loaded(
        tmp_path,
        ROW | marks | {"subset": "numbers", "group": 7, "kind": "number"},
        ROW | {"id": "b", "chosen_spans": [], "rejected_spans": None},
    )
    first, second = found.pairs
    assert first.spans == {"chosen": ((6, 8), (14, 15)), "rejected": ((7, 9),)}
    assert (first.subset, first.group, first.marked) == ("numbers", "7", True)
    other = load(
        str(tmp_path / "marked.jsonl"), AS_THEY_ARE, by="kind", on_bad_row="error", limit=9999
    )
    assert (other.pairs[0].subset, other.pairs[0].stratum) == ("number", "numbers")
    assert second.spans == {"chosen": (), "rejected": ()}
    assert (second.subset, second.group, second.marked) == ("", "b", False)


def test_columns_of_other_names_are_those_of_the_pairs_alone(tmp_path):
    row = {"prompt": "q", "good": "one", "bad": "two", "chosen_spans": [[0, 3]]}
    columns = Columns({"chosen": "good", "rejected": "bad"})
    (found,) = loaded(tmp_path, row, columns=columns).pairs
    assert (found.pair.chosen, found.spans["chosen"]) == ("one", ((0, 3),))
    assert len(load(BUILTIN, columns, on_bad_row="error", limit=1 << 20).pairs) == 200


@pytest.mark.parametrize(
    "spans, found",
    [
        ([[6, 99]], "holds [6, 99]"),
        ([[8, 8]], "holds [8, 8]"),
        ([[-1, 2]], "holds [-1, 2]"),
        ([[1, 2, 3]], "holds [1, 2, 3]"),
        ([[0.0, 2.0]], "holds [0.0, 2.0]"),
        ([5], "holds 5"),
        (5, "is 5"),
    ],
)
def test_spans_that_are_none_are_told_with_file_and_row(tmp_path, spans, found):
    rows = [ROW, ROW | {"id": "b", "chosen_spans": spans}]
    message = f"marked.jsonl, example 2: `chosen_spans` {found}; accepted: a list of [start, end), "
    with pytest.raises(BadExample, match=re.escape(message)) as error:
        loaded(tmp_path, *rows)
    assert "characters of `chosen`, 0 <= start < end <= 16" in str(error.value)
    found = loaded(tmp_path, *rows, on_bad_row="skip")
    assert [one.pair.id for one in found.pairs] == ["a"]
    assert [(bad["row"], bad["id"]) for bad in found.bad_rows] == [(2, "b")]


def test_marks_go_to_the_tokens_that_hold_their_characters(tmp_path):
    tokenizer = ChatTokenizer(
        tiny.byte_tokenizer(merges=[("1", "3"), ("Ġ", "13")], use_regex=True), origin="tiny"
    )
    # The text is stripped: its tokens begin at the row's second character.
    (marked,) = loaded(tmp_path, ROW | {"rejected_spans": [[7, 9]]}).pairs
    tokenized = tokenize_pair(tokenizer, marked.pair, max_length=200, max_prompt_length=100)
    mask = token_mask(marked, tokenized, "rejected")
    text = tokenized.text(marked.pair, "rejected")
    pieces = [text[start:end] for start, end in tokenized.rejected_spans]
    assert [piece for piece, of in zip(pieces, mask, strict=True) if of] == [" 13"]
    assert not token_mask(marked, tokenized, "chosen").any()
    # What is cut off is not there to be marked.
    room = len(tokenized.prompt_ids) + 4
    cut = tokenize_pair(tokenizer, marked.pair, max_length=room, max_prompt_length=100)
    assert not token_mask(marked, cut, "rejected").any()


def test_builtin_pairs_differ_in_their_marks_alone():
    found = load(BUILTIN, AS_THEY_ARE, on_bad_row="error", limit=1 << 20).pairs
    subsets = collections.Counter(one.subset for one in found)
    assert subsets == {"plain": 100, "filler": 50, "late": 50}
    groups = collections.defaultdict(dict)
    for one in found:
        (start, end), (other_start, other_end) = (one.spans[side][0] for side in SIDES)
        texts = [one.pair.chosen, one.pair.rejected]
        assert all(len(one.spans[side]) == 1 for side in SIDES)
        right, wrong = texts[0][start:end], texts[1][other_start:other_end]
        assert right != wrong and right == right.strip() and wrong == wrong.strip()
        groups[one.group][one.subset] = (right, wrong)
        around = [
            (text[:a], text[b:])
            for text, (a, b) in zip(texts, [(start, end), (other_start, other_end)], strict=True)
        ]
        # Sentences around are others on both sides, those before are the same.
        assert (around[0] == around[1]) == (one.subset != "filler")
        if one.subset == "late":
            assert start >= 90
    assert len(groups) == 100
    assert all(len(of) == 2 and len({*of.values()}) == 1 for of in groups.values())


def test_builtin_kinds_are_in_all_subsets():
    from attnpo_jax.data import readers

    lines = (readers._BUILTIN / "planted.jsonl").read_text("utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    kinds = collections.Counter(row["kind"] for row in rows if row["subset"] == "plain")
    ours = {"order": 15, "tense": 15, "list": 15, "code": 15}
    assert kinds == ours | {"number": 10, "name": 12, "unit": 6, "negation": 8, "adjective": 4}
    every = {(kind, subset) for kind in kinds for subset in ("plain", "filler", "late")}
    assert {(row["kind"], row["subset"]) for row in rows} == every
