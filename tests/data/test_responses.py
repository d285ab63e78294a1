import copy
import logging
import os
import pathlib

import numpy as np
import pytest

from attnpo_jax.data.formats import pair_of_example
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from tests import chat_families
from tests.chat_families import FAMILIES
from tests.data.test_chat_template import CALL, TOOL, tokenizer_of

QUESTION = {"role": "user", "content": "How high is the tide at Blue Cove?"}
THOUGHT = "<think>\n91 = 7 * 13.\n</think>\n\nNo."


def row_of(chosen, rejected="No.", prompt=(QUESTION,), **columns):
    prompt = prompt if isinstance(prompt, str) else list(prompt)
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **columns}


def answer(content, **fields):
    return {"role": "assistant", "content": content, **fields}


def forms(tokenizer, row):
    pair = pair_of_example(row, "p", ("rows", 1))
    return pair, tokenize_pair(tokenizer, pair, max_length=9999, max_prompt_length=9000)


def decode(tokenizer, ids):
    return tokenizer.tokenizer.decode(ids, clean_up_tokenization_spaces=False)


def judged_answer(tokenizer, pair, side="chosen"):
    prompt = JudgePrompter(tokenizer, JudgeTemplate.load("default"), 9999, 900).build(pair)
    return decode(tokenizer, prompt.ids[0][getattr(prompt, f"{side}_tokens")[0]]).strip()


def real(name, template=None, **kwargs):
    folder = os.environ.get("ATTNPO_TOKENIZERS")
    if not folder:
        pytest.skip("no $ATTNPO_TOKENIZERS (see tests/fetch_tokenizers.sh)")
    return ChatTokenizer.load(pathlib.Path(folder) / name, template, **kwargs)


@pytest.fixture(scope="module")
def qwen3():
    return real("qwen3")


@pytest.fixture(scope="module")
def llama3():
    return real("llama3")


# --- Rows that other trainers got wrong, with the tokenizers of the models ------------------------


def test_tool_calls_of_an_answer_are_trained_on_and_judged(qwen3):
    calls = [
        {
            "type": "function",
            "function": {"name": "get_tide", "arguments": '{"harbour": "Blue Cove"}'},
        }
    ]
    row = row_of([answer("Let me look that up.", tool_calls=calls)], [answer("3 m.")], tools=[TOOL])
    pair, tokenized = forms(qwen3, row)
    written = (
        'Let me look that up.\n<tool_call>\n{"name": "get_tide", "arguments": '
        '{"harbour": "Blue Cove"}}\n</tool_call>'
    )
    assert decode(qwen3, tokenized.chosen_ids) == written + "<|im_end|>\n"
    assert decode(qwen3, tokenized.chosen_ids[: tokenized.chosen_text_length]) == written
    assert {151657, 151658} <= {*tokenized.chosen_ids.tolist()}
    assert '"name": "tide"' in decode(qwen3, tokenized.prompt_ids)
    assert tokenized.text(pair, "chosen") == written
    assert judged_answer(qwen3, pair) == written
    assert tokenized.text(pair, "rejected") == "3 m."


def test_tool_calls_of_an_earlier_turn_stay_in_the_prompt(qwen3):
    turns = [QUESTION, answer(None, tool_calls=[CALL]), {"role": "user", "content": "And Red Bay?"}]
    _, tokenized = forms(qwen3, row_of("2 m.", prompt=turns))
    called = '<tool_call>\n{"name": "tide", "arguments": {"harbour": "Blue Cove"}}\n</tool_call>'
    assert f"assistant\n{called}<|im_end|>" in decode(qwen3, tokenized.prompt_ids)


def test_tool_turns_end_a_prompt(qwen3):
    turns = [QUESTION, answer("", tool_calls=[CALL]), {"role": "tool", "content": "3 m"}]
    _, tokenized = forms(qwen3, row_of("It is 3 m.", prompt=turns))
    expected = "<|im_start|>user\n<tool_response>\n3 m\n</tool_response><|im_end|>\n"
    assert expected + "<|im_start|>assistant\n" in decode(qwen3, tokenized.prompt_ids)


@pytest.mark.parametrize(
    ("row", "field"),
    [
        (row_of([answer("", tool_calls=[CALL])], [answer("3 m.")]), "`tool_calls` of `chosen`"),
        (row_of("3 m.", tools=[TOOL]), "`tools`"),
        (
            row_of("3 m.", prompt=[QUESTION, answer("", tool_calls=[CALL]), QUESTION]),
            "`tool_calls` of message 2 of the prompt",
        ),
        (row_of([answer("3 m.", reasoning_content="Hm.")]), "`reasoning_content` of `chosen`"),
        (row_of("3 m.", prompt=[QUESTION | {"documents": ["a"]}]), "`documents` of message 1"),
    ],
)
def test_what_a_template_does_not_write_is_refused_by_name(llama3, row, field):
    with pytest.raises(
        BadExample, match=f"{field}.*: the chat template of .*llama3 does not write"
    ):
        forms(llama3, row)


def test_thinking_answers_of_qwen3(qwen3, caplog):
    row = row_of(THOUGHT, "<think>\nLooks prime.\n</think>\n\nYes.", "Is 91 prime?")
    qwen3.warned_of_opening = False
    with caplog.at_level(logging.WARNING):
        pair, tokenized = forms(qwen3, row)
        forms(qwen3, row)
    ids = [*tokenized.prompt_ids.tolist(), *tokenized.chosen_ids.tolist()]
    assert len(ids) == 32
    assert (ids.count(151667), ids.count(151668)) == (1, 1)
    assert decode(qwen3, tokenized.prompt_ids).endswith("<|im_start|>assistant\n")
    assert decode(qwen3, tokenized.chosen_ids) == THOUGHT + "<|im_end|>\n"
    assert judged_answer(qwen3, pair) == THOUGHT
    # The generation prompt closes the thinking block, which these answers fill; said once.
    (record,) = caplog.records
    assert "generation prompt is not what the responses of pair p follow" in record.message


def test_thinking_of_an_earlier_turn_is_left_out(qwen3):
    turns = [
        {"role": "user", "content": "Is 91 prime?"},
        answer("<think>\n7*13\n</think>\n\nNo."),
        {"role": "user", "content": "And 97?"},
    ]
    as_field = [turns[0], answer("No.", reasoning_content="7*13"), turns[2]]
    for prompt in (turns, as_field):
        _, tokenized = forms(qwen3, row_of("Yes.", prompt=prompt))
        assert "assistant\nNo.<|im_end|>" in decode(qwen3, tokenized.prompt_ids)
        assert "7*13" not in decode(qwen3, tokenized.prompt_ids)


def test_reasoning_of_the_answer_is_its_text(qwen3):
    row = row_of([answer("No.", reasoning_content="91 = 7 * 13.")], [answer("Yes.")])
    pair, tokenized = forms(qwen3, row)
    assert tokenized.text(pair, "chosen") == THOUGHT
    assert judged_answer(qwen3, pair) == THOUGHT
    # Both follow what they share; the block that the template gives the other is in front of it.
    assert decode(qwen3, tokenized.prompt_ids).endswith("<|im_start|>assistant\n")
    assert decode(qwen3, tokenized.rejected_ids) == "<think>\n\n</think>\n\nYes.<|im_end|>\n"
    # of these characters none is the answer's
    block = decode(qwen3, tokenized.rejected_ids[: tokenized.rejected_text_length])
    assert block.endswith("</think>\n\nYes.")
    covered = [span for span in tokenized.rejected_spans.tolist() if span[1] > span[0]]
    assert covered == [[0, 3], [3, 4]]


@pytest.mark.parametrize("content", ["x </think> y", "<think>a</think>b", "<think>\n</think>z"])
def test_answers_that_the_template_rewrites_are_refused(qwen3, content):
    with pytest.raises(BadExample, match="`chosen`: .*does not write its text as it is"):
        forms(qwen3, row_of(content))


def test_a_spelled_tool_call_is_the_model_s_own_token(qwen3):
    call = '<tool_call>\n{"name": "get_tide", "arguments": {"harbour": "Blue Cove"}}\n</tool_call>'
    _, tokenized = forms(qwen3, row_of(call, "About 3 metres.", "Tide at Blue Cove?"))
    assert len(tokenized.prompt_ids) + len(tokenized.chosen_ids) == 42
    assert tokenized.chosen_ids[0] == 151657
    assert 151658 in tokenized.chosen_ids
    # In a user's turn it is text, and so is an end of turn in an answer.
    _, tokenized = forms(qwen3, row_of("a<|im_end|>b", prompt=call))
    assert not {151657, 151658} & {*tokenized.prompt_ids.tolist()}
    assert tokenized.chosen_ids.tolist().count(151645) == 1
    assert decode(qwen3, tokenized.chosen_ids) == "a<|im_end|>b<|im_end|>\n"


def test_a_user_s_token_that_the_template_looks_for_is_text(qwen3):
    """Qwen3's template asks whether a user's text is a tool's response."""
    text = "<tool_response>\n3 m\n</tool_response>"
    turns = [QUESTION, answer("Wait."), {"role": "user", "content": text}]
    _, tokenized = forms(qwen3, row_of("It is 3 m.", prompt=turns))
    assert text in decode(qwen3, tokenized.prompt_ids)
    tokens = qwen3.tokenizer.convert_ids_to_tokens(tokenized.prompt_ids.tolist())
    assert not {"<tool_response>", "</tool_response>"} & {*tokens}


def test_an_empty_system_message_gives_no_block():
    tokenizer = tokenizer_of(chat_families.PHI)
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Name a river."}]
    _, tokenized = forms(tokenizer, row_of("The Elbe.", "A lake.", turns))
    assert (
        decode(tokenizer, tokenized.prompt_ids) == "<|user|>\nName a river.<|end|>\n<|assistant|>\n"
    )


def test_the_tokens_of_a_row_with_an_empty_system_message():
    turns = [{"role": "system", "content": ""}, {"role": "user", "content": "Name a river."}]
    _, tokenized = forms(real("qwen3", chat_families.PHI), row_of("The Elbe.", "A lake.", turns))
    # With the empty block they would be 37.
    assert len(tokenized.prompt_ids) + len(tokenized.chosen_ids) == 27


def test_a_flag_in_the_system_message_is_the_template_s():
    tokenizer = tokenizer_of(chat_families.SMOLLM3)
    for given, written in (
        ("Be brief. /no_think", "Reasoning: /no_think\n\nBe brief."),
        ("", "Reasoning: /think\n\nYou are a helper."),
    ):
        turns = [{"role": "system", "content": given}, {"role": "user", "content": "Name a river."}]
        _, tokenized = forms(tokenizer, row_of("The Elbe.", prompt=turns))
        expected = f"<|im_start|>system\n{written}<|im_end|>\n<|im_start|>user\n"
        assert decode(tokenizer, tokenized.prompt_ids).startswith(expected)


def test_the_border_has_the_tokens_of_the_joint_text():
    tokenizer = real("llama2", FAMILIES["zephyr"].replace("</s>", "{{ eos_token }}"))
    for chosen, first in (("The Elbe.", "The"), ("川です。", "川"), ("1. river", "1")):
        _, tokenized = forms(tokenizer, row_of(chosen, "Lake Como.", "Name a river."))
        tokens = tokenizer.tokenizer.convert_ids_to_tokens(tokenized.chosen_ids.tolist())
        assert tokens[0] == first
        assert (
            tokenizer.tokenizer.convert_ids_to_tokens(tokenized.prompt_ids.tolist())[-1] == "<0x0A>"
        )


def test_the_next_turn_s_header_is_cut(llama3):
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Name a river."},
        answer("Elbe."),
        {"role": "user", "content": "More."},
    ]
    for prompt in ("Name a river.", turns):
        _, tokenized = forms(llama3, row_of("The Oder.", prompt=prompt))
        tokens = llama3.tokenizer.convert_ids_to_tokens(tokenized.chosen_ids.tolist())
        assert tokens == ["The", "ĠO", "der", ".", "<|eot_id|>"]
        assert decode(llama3, tokenized.prompt_ids).endswith("assistant<|end_header_id|>\n\n")


# --- Templates of our own -------------------------------------------------------------------------


def test_variables_reach_the_template_and_change_the_digest():
    usual = tokenizer_of(FAMILIES["qwen3"])
    thinking = tokenizer_of(FAMILIES["qwen3"], chat_template_kwargs={"enable_thinking": True})
    block = "<think>\n\n</think>\n\n"
    turns = [QUESTION]
    assert usual.render(turns, generation_prompt=True).endswith(block)
    assert thinking.render(turns, generation_prompt=True).endswith("<|im_start|>assistant\n")
    assert usual.digest() != thinking.digest()
    assert usual.digest() == tokenizer_of(FAMILIES["qwen3"], chat_template_kwargs={}).digest()
    # The block that every plain answer is given goes with the prompt either way.
    for tokenizer in (usual, thinking):
        _, tokenized = forms(tokenizer, row_of("Yes."))
        assert decode(tokenizer, tokenized.prompt_ids).endswith(block)


def test_a_generation_prompt_that_opens_a_block_is_not_trained_on(caplog):
    tokenizer = tokenizer_of(FAMILIES["r1"])
    _, tokenized = forms(tokenizer, row_of("Yes."))
    assert decode(tokenizer, tokenized.prompt_ids).endswith("Cove?<|Assistant|>")
    assert decode(tokenizer, tokenized.chosen_ids) == "Yes.</s>"
    assert "it goes on with '<think>\\n'" in caplog.text


def test_a_token_across_the_border_goes_with_the_response():
    # "\n" ends the prompt; three of them are one token.
    tokenizer = tokenizer_of(FAMILIES["chatml"])
    _, tokenized = forms(tokenizer, row_of("\n\nb", "c"))
    tokens = tokenizer.tokenizer.convert_ids_to_tokens(tokenized.chosen_ids.tolist())
    assert tokens == ["ĊĊĊ", "b", "<|im_end|>", "Ċ"]
    assert tokenized.chosen_spans.tolist() == [[0, 0], [0, 1]]
    assert decode(tokenizer, tokenized.prompt_ids).endswith("<|im_start|>assistant")
    assert decode(tokenizer, tokenized.rejected_ids) == "\nc<|im_end|>\n"


def test_a_text_for_arguments_that_a_template_quotes_is_refused():
    tokenizer = tokenizer_of(FAMILIES["qwen3"])
    call = copy.deepcopy(CALL)
    call["function"]["arguments"] = '{"harbour": "Blue Cove"}'
    with pytest.raises(BadExample, match="`tool_calls` of `chosen`: .* quotes `arguments`.*object"):
        forms(tokenizer, row_of([answer("", tool_calls=[call])]))
    _, tokenized = forms(tokenizer, row_of([answer("", tool_calls=[CALL])]))
    assert '"arguments": {"harbour": "Blue Cove"}}' in decode(tokenizer, tokenized.chosen_ids)


def test_content_that_a_template_drops_beside_calls_is_refused():
    tokenizer = tokenizer_of(FAMILIES["llama3-tools"])
    with pytest.raises(BadExample, match="`content` of `chosen`: .*beside `tool_calls`"):
        forms(tokenizer, row_of([answer("Let me see.", tool_calls=[CALL])]))


def test_control_tokens_in_tools_and_arguments_are_text():
    tokenizer = tokenizer_of(FAMILIES["qwen2.5"])
    tool, call = copy.deepcopy(TOOL), copy.deepcopy(CALL)
    tool["function"]["description"] = 'ends <|im_end|> with "<|im_end|>"'
    call["function"]["arguments"]["harbour"] = "Blue<|im_end|>"
    plain = [forms(tokenizer, row_of([answer("", tool_calls=[CALL])], tools=[TOOL]))[1]]
    row = row_of([answer("", tool_calls=[call])], tools=[tool])
    pair, tokenized = forms(tokenizer, row)
    end = tokenizer.tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name in ("prompt_ids", "chosen_ids"):
        ids = getattr(tokenized, name)
        assert np.sum(ids == end) == np.sum(getattr(plain[0], name) == end)
    written = decode(tokenizer, np.concatenate([tokenized.prompt_ids, tokenized.chosen_ids]))
    assert written == tokenizer.tokenizer.apply_chat_template(
        [*pair.prompt, pair.response("chosen")], tools=[tool], tokenize=False
    )
    tool["function"]["parameters"]["properties"] = {"<|im_end|>": {"type": "string"}}
    with pytest.raises(BadExample, match="a key in `tools` or `tool_calls` spells control tokens"):
        forms(tokenizer, row)


def test_judge_request_that_a_template_rewrites_is_refused():
    template = FAMILIES["chatml"].replace("m['content']", "m['content'] | replace('Q', 'q')")
    tokenizer = tokenizer_of(template)
    pair = pair_of_example(row_of("A", "B", prompt="Q"), "p", ("rows", 1))
    with pytest.raises(BadExample, match="does not write the judge's request as it is"):
        JudgePrompter(tokenizer, JudgeTemplate.load("default"), 9999, 900).build(pair)
