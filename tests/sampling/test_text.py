"""Texts as their tokens come, on bytes, so that stop texts and characters lie across tokens."""

import pytest

from attnpo_jax.sampling.text import ResponseText
from tests import tiny

TOKENIZER = tiny.byte_tokenizer().backend_tokenizer


def ids(text):
    return TOKENIZER.encode(text, add_special_tokens=False).ids


def fed(text, stop=()):
    response, news = ResponseText(TOKENIZER, stop), []
    for token in ids(text):
        stopped = response.add(token)
        news.append(response.news())
        if stopped:
            break
    response.finish()
    return response, [*news, response.news(last=True)]


@pytest.mark.parametrize("text", ["plain", "élan — 漢字 🦜", "  two  spaces\n"])
def test_what_comes_is_the_text(text):
    response, news = fed(text)
    assert response.text == "".join(news) == text


def test_a_character_comes_when_it_is_whole():
    _, news = fed("aé")
    assert news == ["a", "", "é", ""]


def test_a_character_that_never_became_whole_is_shown_as_such():
    response = ResponseText(TOKENIZER)
    for token in ids("a🦜")[:-1]:
        response.add(token)
    assert response.finish() == "a\ufffd"


@pytest.mark.parametrize(
    ("text", "stop", "left"),
    [
        ("one END two", ["END"], "one "),
        ("one END two", ["E", "END"], "one "),
        ("\n\nafter", ["\n\n"], ""),
        ("ab漢字c", ["字"], "ab漢"),
        ("aaab", ["aab"], "a"),
        ("nothing", ["z"], "nothing"),
    ],
)
def test_a_stop_text_ends_it(text, stop, left):
    response, news = fed(text, stop)
    assert response.text == "".join(news) == left
    assert response.is_stopped == (left != text)


def test_the_beginning_of_a_stop_text_is_held_back():
    _, news = fed("a<eb", ["<end>"])
    assert news == ["a", "", "", "<eb", ""]


def test_special_tokens_are_no_text():
    response = ResponseText(TOKENIZER)
    for token in [*ids("hi"), TOKENIZER.token_to_id("<|im_end|>")]:
        response.add(token)
    assert response.finish() == "hi"
