"""Texts that a chat template has rendered already are told from those that speak of its tokens."""

import pytest

from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.data.rendered import RenderedTexts
from attnpo_jax.data.tokenize import ChatTokenizer
from tests import tiny
from tests.data.test_real_tokenizers import LLAMA2_TEMPLATE

DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe brief.<|im_end|>\n{% endif %}"
    + tiny.CHATML
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else 'user' }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
ZEPHYR = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
TEMPLATES = {
    "chatml": tiny.CHATML,
    "default system": DEFAULT_SYSTEM,
    "llama3": LLAMA3,
    "gemma": GEMMA,
    "llama2": LLAMA2_TEMPLATE,
    "zephyr": ZEPHYR,
}


def chat_tokenizer(template):
    marks = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|eot_id|>"]
    roles = {"bos_token": "<s>", "eos_token": "</s>"}
    return ChatTokenizer(tiny.byte_tokenizer(marks, template, **roles), origin="test")


def message(role, content):
    return {"role": role, "content": content}


def pair(prompt="Name a river.", chosen="The Elbe.", rejected="A lake."):
    return Pair("x", (message("user", prompt),), chosen, rejected)


def check(template, of):
    RenderedTexts.of(chat_tokenizer(template)).check(of)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_template_renders_is_refused(name):
    tokenizer = chat_tokenizer(TEMPLATES[name])
    looks = RenderedTexts.of(tokenizer)
    asked = message("user", "Name a river.")
    prompt = tokenizer.render([asked], generation_prompt=True)
    answered = tokenizer.render([asked, message("assistant", "A lake.")], generation_prompt=False)
    bare = tokenizer.render([asked], generation_prompt=False)
    response = answered.removeprefix(prompt).removeprefix(bare)
    # As TRL's examples do it: prompt and responses apart; and without the closing token.
    for of in (pair(prompt), pair(prompt.removeprefix("<s>")), pair(rejected=response)):
        with pytest.raises(BadExample, match="a chat template has rendered it already"):
            looks.check(of)
    looks.check(pair())


def test_prerendered_rows():
    row = {
        "prompt": "<|im_start|>user\nName a river.<|im_end|>\n<|im_start|>assistant\n",
        "chosen": "The Elbe.<|im_end|>\n",
        "rejected": "A lake.<|im_end|>\n",
    }
    with pytest.raises(BadExample) as caught:
        check(tiny.CHATML, pair(**row))
    assert caught.value.reason == (
        "message 1 of the prompt (user) begins with '<|im_start|>user': a chat template has "
        "rendered it already, and would do so once more; accepted: messages' own texts"
    )
    with pytest.raises(BadExample, match="`chosen` ends with '<.im_end.>'"):
        check(tiny.CHATML, pair(**row | {"prompt": "Name a river."}))
    with pytest.raises(BadExample, match="of the prompt .user. ends with '<.im_start.>assistant'"):
        check(tiny.CHATML, pair("Name a river.<|im_end|>\n<|im_start|>assistant\n"))
    # Another model's template has rendered them.
    for template in (LLAMA3, LLAMA2_TEMPLATE):
        with pytest.raises(BadExample, match="begins with '<.im_start.>user'"):
            check(template, pair(row["prompt"]))
        with pytest.raises(BadExample, match="ends with '<.im_end.>'"):
            check(template, pair(rejected=row["rejected"]))


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize(
    "text",
    [
        "What does <|im_end|> do?",
        "<|im_start|> is a token; which one?",
        "<|im_end|> and </s> end turns, <|eot_id|> too.",
        "[INST] opens a turn, doesn't it?",
        "user\nassistant\nUser: hi",
        "Explain:\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>user\nho",
        "<s>struck</s> out <b>text</b>",
        "<html><body></body></html>",
    ],
)
def test_texts_that_speak_of_tokens_are_not_refused(name, text):
    check(TEMPLATES[name], pair(text, f"So: {text} Yes.", text))


def test_templates_without_marks_tell_nothing():
    plain = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    check(plain, pair("user: hi\nassistant:", "assistant: hi"))
