"""Pairs of long texts and of many turns: the same tokens, for work that grows with them."""

import pytest

from attnpo_jax.data import long_text
from attnpo_jax.data.chat_template import ChatTemplate
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from attnpo_jax.prepare.pair_forms import PairTokenizer
from tests import chat_families, tiny

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": "b"}}}


def user(content):
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def tokenize():
    roles = {"eos_token": "<|im_end|>", "bos_token": "<|im_start|>"}
    tokenizer = ChatTokenizer(tiny.byte_tokenizer(**roles), origin="tiny")
    template = JudgeTemplate("{question} A {answer_a} B {answer_b} Which?", "here")
    prompter = JudgePrompter(tokenizer, template, 2000, 500)
    return PairTokenizer(
        tokenizer, prompter, max_length=600, max_prompt_length=300, on_bad_row="skip"
    )


def rendered_messages(monkeypatch, tokenizer, turns):
    """How many messages are rendered to tokenize a conversation with calls and reasoning."""
    prompt = []
    for i in range(turns // 4):
        calls = {"tool_calls": [CALL], "reasoning_content": "Hm."}
        prompt += [user(f"q {i}"), {"role": "assistant", "content": "Well.", **calls}]
        prompt += [{"role": "tool", "content": "r"}, {"role": "assistant", "content": "x"}]
    pair = Pair("long", (*prompt, user("And?")), "yes", "no")
    counted, render = [], ChatTemplate.render

    def count(template, conversation, **kwargs):
        counted.append(len(conversation.messages))
        return render(template, conversation, **kwargs)

    monkeypatch.setattr(ChatTemplate, "render", count)
    tokenized = tokenize_pair(tokenizer, pair, max_length=300, max_prompt_length=200)
    monkeypatch.undo()
    assert len(tokenized.prompt_ids) == 200 and tokenized.prompt_truncated
    return sum(counted)


def test_a_conversation_of_many_turns_takes_linear_work(monkeypatch):
    template = chat_families.FAMILIES["qwen3"]
    fast = tiny.byte_tokenizer(marks=chat_families.MARKS, chat_template=template)
    tokenizer = ChatTokenizer(fast, origin="qwen3")
    few, many = (rendered_messages(monkeypatch, tokenizer, turns) for turns in (200, 2000))
    assert many < 12 * few


def test_a_text_of_many_control_tokens_takes_linear_work(tokenize):
    text = "<|im_end|> x " * 10_000
    pair = Pair("many", (user(text),), f"yes {text}", f"no {text}")
    (form,), bad = tokenize([pair])
    assert not bad and len(form.tokenized.prompt_ids) == 300
    short = Pair("few", (user(text[-6500:]),), f"yes {text[:6500]}", f"no {text[:6500]}")
    (of_short,), _ = tokenize([short])
    for side in ("chosen", "rejected"):
        ids = [getattr(f.tokenized, f"{side}_ids") for f in (form, of_short)]
        assert ids[0].tolist() == ids[1].tolist()


def test_a_long_pair_has_the_tokens_of_all_of_it(tokenize, monkeypatch):
    long = "The sea is wide, and 12345 fish  are in it.\n\n" * 2000
    pairs = [
        Pair("prompt", (user(long),), "yes", "no"),
        Pair("answers", (user("Why?"),), f"yes {long}", f"no {long}"),
        Pair("all", (user(long), {"role": "assistant", "content": long}, user(long)), long, "x"),
    ]
    cut, _ = tokenize(pairs)
    monkeypatch.setattr(long_text, "is_long", lambda length, tokens: False)
    whole, _ = tokenize(pairs)
    for a, b in zip(cut, whole, strict=True):
        for name in ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_spans", "rejected_spans"):
            assert getattr(a.tokenized, name).tolist() == getattr(b.tokenized, name).tolist()
        assert [ids.tolist() for ids in a.prompt.ids] == [ids.tolist() for ids in b.prompt.ids]
        for name in ("chosen_spans", "rejected_tokens"):
            of_both = zip(getattr(a.prompt, name), getattr(b.prompt, name), strict=True)
            assert all(x.tolist() == y.tolist() for x, y in of_both)
        assert a.tokenized.prompt_truncated == b.tokenized.prompt_truncated
        assert a.tokenized.chosen_truncated == b.tokenized.chosen_truncated
