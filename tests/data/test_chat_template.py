"""Rows of chat templates of many families: what is trained on is what transformers renders."""

import os
import pathlib
import random

import numpy as np
import pytest
import transformers

from attnpo_jax.data import chat_template
from attnpo_jax.data.formats import pair_of_example
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from tests import chat_families
from tests.chat_families import ALWAYS, FAMILIES, MARKS

TOOL = {
    "type": "function",
    "function": {"name": "tide", "parameters": {"type": "object", "properties": {}}},
}
CALL = {"type": "function", "function": {"name": "tide", "arguments": {"harbour": "Blue Cove"}}}
QUESTIONS = ["Name a river.", " Why?\n", "\n\nWhat is 7*13?", "Ä 今 😀", "a\n\n\nb", "The"]
ANSWERS = [
    *("The Elbe.", "A lake. ", "\n\n  indented\n", "Line\n\nline\n", "今天", "TheThe", ":", "n"),
    *("<think>\n7*13\n</think>\n\nNo.", "<think>\n\n</think>\n\nSo.", "<think>hm</think>Yes."),
    *("<tool_call>\n{}\n</tool_call>", "end", "</think>", "half <think> of it"),
]
SYSTEMS = ["", "Be brief.", "Be brief. /no_think", "Be\n\nbrief. /think"]


def generated_row(rng, spelled=False):
    """An example of random turns; with control tokens in its texts where `spelled`."""

    def text(texts):
        found = rng.choice(texts)
        for mark in rng.sample(MARKS, 2) if spelled else ():
            at = rng.randint(0, len(found))
            found = found[:at] + mark + found[at:]
        return found

    prompt = []
    if rng.random() < 0.4:
        prompt.append({"role": "system", "content": text(SYSTEMS)})
    for _ in range(rng.choice([0, 0, 1, 2])):
        prompt.append({"role": "user", "content": text(QUESTIONS)})
        turn = {"role": "assistant", "content": text(ANSWERS)}
        if rng.random() < 0.3:
            turn |= {"content": rng.choice([turn["content"], "", None]), "tool_calls": [CALL]}
            if rng.random() < 0.5:
                prompt += [turn, {"role": "tool", "content": text(QUESTIONS)}]
                turn = {"role": "assistant", "content": text(ANSWERS)}
        if rng.random() < 0.2:
            turn["reasoning_content"] = "I know."
        prompt.append(turn)
    prompt.append({"role": "user", "content": text(QUESTIONS)})
    chosen, rejected = rng.sample(ANSWERS, 2)
    row = {"prompt": prompt, "chosen": text([chosen]), "rejected": text([rejected])}
    kind = rng.random()
    if kind < 0.2:
        turn = {"role": "assistant", "content": row["chosen"], "tool_calls": [CALL, CALL]}
        row["chosen"] = [turn | {"content": rng.choice([turn["content"], None])}]
    elif kind < 0.3:
        turn = {"role": "assistant", "content": row["chosen"], "reasoning_content": "Hm.\nSo."}
        row["chosen"] = [turn]
    if rng.random() < 0.2:
        row["tools"] = [TOOL]
    return row


@pytest.fixture(scope="module")
def tokenizers_of_families():
    return {name: tokenizer_of(template) for name, template in FAMILIES.items()}


def tokenizer_of(template, **kwargs):
    fast = chat_families.byte_level()
    fast.chat_template = template
    return ChatTokenizer(fast, origin="test", **kwargs)


def messages_of(row, side):
    """The row's conversation as transformers is given it."""
    response = row[side]
    if isinstance(response, str):
        response = [{"role": "assistant", "content": response}]
    return [m | {"content": m["content"] or ""} for m in (*row["prompt"], *response)]


def rendered_by_transformers(fast, row, side, **kwargs):
    return fast.apply_chat_template(
        messages_of(row, side),
        tools=row.get("tools"),
        tokenize=False,
        **{"enable_thinking": False, **kwargs},
    )


def whole(tokenized, side):
    return np.concatenate([tokenized.prompt_ids, getattr(tokenized, f"{side}_ids")]).tolist()


def forms(tokenizer, row):
    pair = pair_of_example(row, "p", ("rows", 1))
    return pair, tokenize_pair(tokenizer, pair, max_length=10_000, max_prompt_length=9_000)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_the_tokens_of_what_transformers_renders(tokenizers_of_families, family):
    tokenizer = tokenizers_of_families[family]
    fast, rng = tokenizer.tokenizer, random.Random(family)
    prompter = JudgePrompter(tokenizer, JudgeTemplate.load("default"), 100_000, 10_000)
    good = 0
    for _ in range(60):
        row = generated_row(rng)
        try:
            pair, tokenized = forms(tokenizer, row)
        except BadExample as bad:
            assert "chat template" in bad.reason or "equals" in bad.reason, bad.reason
            continue
        good += 1
        judged = prompter.build(pair)
        for side in ("chosen", "rejected"):
            text = rendered_by_transformers(fast, row, side)
            text = text.removesuffix(ALWAYS.get(family, ""))
            expected = fast(text, add_special_tokens=False).input_ids
            assert whole(tokenized, side) == expected, row
            ids = getattr(tokenized, f"{side}_ids")[: getattr(tokenized, f"{side}_text_length")]
            answer = tokenized.text(pair, side)
            assert fast.decode(ids).strip().endswith(answer), row
            if isinstance(row[side], str):
                assert answer == row[side].strip()
            spans = getattr(tokenized, f"{side}_spans")
            covered = {c for start, end in spans.tolist() for c in range(start, end)}
            assert covered == set(range(len(answer))), row
            for order in (0, 1):
                at = getattr(judged, f"{side}_tokens")[order]
                assert answer in fast.decode(judged.ids[order][at]), row
    assert good >= 8


@pytest.fixture(scope="module", params=["llama2", "gemma3"])
def sentencepiece(request):
    """Loaded once for all templates: it takes longer than what is done with it."""
    folder = os.environ.get("ATTNPO_TOKENIZERS")
    if not folder:
        pytest.skip("no $ATTNPO_TOKENIZERS (see tests/fetch_tokenizers.sh)")
    given = transformers.AutoTokenizer.from_pretrained(pathlib.Path(folder) / request.param)
    return chat_families.with_marks(given.backend_tokenizer)


@pytest.mark.parametrize("family", ["llama2", "zephyr", "vicuna", "qwen3"])
def test_sentencepiece_rows_are_the_tokens_of_the_joint_text(sentencepiece, family):
    fast = sentencepiece
    fast.chat_template = FAMILIES[family]
    tokenizer, rng, good = ChatTokenizer(fast, origin="test"), random.Random(family), 0
    for _ in range(25):
        row = generated_row(rng)
        try:
            _, tokenized = forms(tokenizer, row)
        except BadExample:
            continue
        good += 1
        for side in ("chosen", "rejected"):
            text = rendered_by_transformers(fast, row, side)
            assert whole(tokenized, side) == fast(text, add_special_tokens=False).input_ids, row
    assert good >= 5


@pytest.mark.parametrize("family", FAMILIES)
def test_spelled_control_tokens_are_text_in_every_turn(tokenizers_of_families, family):
    tokenizer = tokenizers_of_families[family]
    fast, rng = tokenizer.tokenizer, random.Random(family)
    special = {fast.convert_tokens_to_ids(mark) for mark in MARKS} - tokenizer.emitted
    # What the assistant emits to call a tool is a token in its turns.
    calls = {"[TOOL_CALLS]"} if family == "mistral" else set()
    assert {fast.convert_ids_to_tokens(i) for i in tokenizer.emitted} & {*MARKS} == calls
    good = 0
    for _ in range(40):
        row = generated_row(rng, spelled=True)
        try:
            _, tokenized = forms(tokenizer, row)
        except BadExample as bad:
            assert "chat template" in bad.reason, bad.reason
            continue
        good += 1
        for side in ("chosen", "rejected"):
            text = rendered_by_transformers(fast, row, side)
            text = text.removesuffix(ALWAYS.get(family, ""))
            ids = whole(tokenized, side)
            assert fast.decode(ids) == text
            # What is left once the texts' own are taken away is the template's.
            messages = messages_of(row, side)
            plain = dict(row, prompt=[without_marks(m) for m in messages[:-1]])
            plain[side] = [without_marks(messages[-1])]
            bare = rendered_by_transformers(fast, plain, side)
            bare = bare.removesuffix(ALWAYS.get(family, ""))
            expected = [i for i in fast(bare, add_special_tokens=False).input_ids if i in special]
            assert [i for i in ids if i in special] == expected
    assert good >= 8


def without_marks(message):
    content = message["content"]
    for mark in MARKS:
        content = content.replace(mark, "x")
    return message | {"content": content}


def test_marks_hold_nothing_that_a_template_looks_for():
    """With hex digits in it, one in 140 programs had a mark with "def" inside."""
    mark = chat_template.MARK
    assert all(character > "\ua67f" for character in mark) and len(set(mark)) > 8
    assert mark.upper() != mark != mark.lower()  # a template that changes case is told by it
