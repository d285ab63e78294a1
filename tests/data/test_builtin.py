"""Check the shipped preference pairs: counts, shape, and that length does not tell the label."""

from __future__ import annotations

import importlib.resources
import json

import pytest

PAIRS = {"train": 112, "eval": 40}
MULTI_TURN = {"train": 8, "eval": 4}
FIELDS = {"id", "prompt", "chosen", "rejected", "failure"}
FAILURES = {"wrong_fact", "padding", "ignored_format", "off_topic", "refusal", "no_answer"}
SPLITS = sorted(PAIRS)


def read(split: str) -> list[dict]:
    folder = importlib.resources.files("attnpo_jax").joinpath("data", "builtin")
    text = folder.joinpath(f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def messages(row: dict) -> list[dict]:
    prompt = row["prompt"]
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def words(text: str) -> int:
    return len(text.split())


def ids_where(rows: list[dict], condition) -> list[str]:
    return [row["id"] for row in rows if condition(row)]


@pytest.mark.parametrize("split", SPLITS)
def test_every_row_has_the_documented_fields_and_a_known_failure(split):
    rows = read(split)
    assert len(rows) == PAIRS[split]
    assert ids_where(rows, lambda row: set(row) != FIELDS) == []
    assert {row["failure"] for row in rows} == FAILURES


@pytest.mark.parametrize("split", SPLITS)
def test_responses_are_stripped_different_and_of_10_to_120_words(split):
    rows = read(split)
    responses = [(row["id"], row[side]) for row in rows for side in ("chosen", "rejected")]
    assert [(id_, words(text)) for id_, text in responses if not 10 <= words(text) <= 120] == []
    assert [id_ for id_, text in responses if text != text.strip()] == []
    assert ids_where(rows, lambda row: row["chosen"] == row["rejected"]) == []
    # Both ends of the range occur, or the lengths would not be varied.
    assert min(words(text) for _, text in responses) <= 12
    assert max(words(text) for _, text in responses) >= 100


@pytest.mark.parametrize("split", SPLITS)
def test_prompts_are_short_chats_that_end_in_a_user_turn(split):
    rows = read(split)
    for row in rows:
        chat = messages(row)
        assert all(set(turn) == {"role", "content"} for turn in chat), row["id"]
        assert all(turn["content"] == turn["content"].strip() != "" for turn in chat), row["id"]
        roles = [turn["role"] for turn in chat]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2) + ["user"], row["id"]
        assert 4 <= words(chat[-1]["content"]) <= 35, row["id"]
    multi_turn = ids_where(
        rows, lambda row: sum(turn["role"] == "user" for turn in messages(row)) > 1
    )
    assert len(multi_turn) == MULTI_TURN[split]


def test_ids_prompts_and_responses_are_unique_over_both_splits():
    rows = read("train") + read("eval")
    seen = {
        "id": [row["id"] for row in rows],
        "prompt": [messages(row)[-1]["content"].casefold() for row in rows],
        "response": [row[side].casefold() for row in rows for side in ("chosen", "rejected")],
    }
    assert {name: len(values) - len(set(values)) for name, values in seen.items()} == {
        "id": 0,
        "prompt": 0,
        "response": 0,
    }


@pytest.mark.parametrize("split", SPLITS)
def test_length_does_not_tell_which_response_was_chosen(split):
    rows = read(split)
    longer = sum(words(row["chosen"]) > words(row["rejected"]) for row in rows)
    shorter = sum(words(row["chosen"]) < words(row["rejected"]) for row in rows)
    assert 0.35 <= longer / len(rows) <= 0.65
    assert 0.35 <= shorter / len(rows) <= 0.65
