"""Tokens of a window of a text: those of the whole text."""

import functools
import os
import pathlib
import random

import numpy as np
import pytest
import transformers

from attnpo_jax.data import long_text
from attnpo_jax.data.pair import BadExample
from tests import tiny

_REAL = pathlib.Path(os.environ.get("ATTNPO_TOKENIZERS", "absent"))
REAL = ("llama2", "llama3", "qwen3", "gemma3")
# Pieces of texts: many to be joined at random, or one to be repeated.
PIECES = {
    "words": "the quick  brown fox, it's 12345 jumped.\nOver\n\n  lazy dogs! ".split(" "),
    "scripts": ["今天天气", "Ä", "ß", "é", "😀", "👩‍👩‍👧", " ", "مرحبا", "\u0301"],
    "spaces": [" " * n for n in (1, 2, 3, 17, 200)] + ["\n", "\t\t", "x"],
    "runs": ["a" * n for n in (1, 5, 300)] + ["=" * 90, "0" * 700, " ", "\n"],
    "marks": ["<|im_end|>", "<|im_start|>user\n", "<", "|", "</s>", "[INST]", "word", " "],
    "base64": list("ABCDEFabcdef0123456789+/"),
}


def byte_level():
    merges = [("a", "a"), ("aa", "aa"), ("t", "h"), ("th", "e"), ("Ġ", "Ġ"), ("ĠĠ", "Ġ")]
    return tiny.byte_tokenizer(merges=merges)


@functools.cache
def backend(name):
    if name == "bytes":
        return byte_level().backend_tokenizer
    if not (_REAL / name).is_dir():
        pytest.skip("no real tokenizers here")
    loaded = transformers.AutoTokenizer.from_pretrained(str(_REAL / name))
    return loaded.backend_tokenizer


def encoder(tokenizer, text, calls=None):
    def encode(start, end):
        if calls is not None:
            calls.append(end - start)
        encoding = tokenizer.encode(text[start:end], add_special_tokens=False)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2) + np.int32(start)
        return np.array(encoding.ids, np.int32), offsets

    return encode


@pytest.mark.parametrize("kind", PIECES)
@pytest.mark.parametrize("name", ["bytes", *REAL])
def test_a_window_has_the_tokens_of_the_whole(monkeypatch, name, kind):
    monkeypatch.setattr(long_text, "is_long", lambda length, tokens: length > 3000)
    tokenizer, rng = backend(name), random.Random(kind)
    for _ in range(2):
        text = "".join(rng.choices(PIECES[kind], k=rng.randint(500, 6000)))[:20_000]
        before, after = rng.choice([0, 3, 40]), rng.choice([0, 3, 40])
        at = rng.choice([0, len(text), rng.randint(0, len(text))])
        encode = encoder(tokenizer, text)
        ids, offsets = long_text.around(encode, len(text), at, before, after)
        all_ids, all_offsets = encode(0, len(text))
        inside = (all_offsets[:, 0] >= offsets[0, 0]) & (all_offsets[:, 1] <= offsets[-1, 1])
        np.testing.assert_array_equal(ids, all_ids[inside])
        np.testing.assert_array_equal(offsets, all_offsets[inside])
        assert np.sum(offsets[:, 1] <= at) >= min(before, np.sum(all_offsets[:, 1] <= at))
        assert np.sum(offsets[:, 0] >= at) >= min(after, np.sum(all_offsets[:, 0] >= at))


def test_a_window_is_all_that_is_encoded():
    text, calls = "The sea is wide. " * 100_000, []
    encode = encoder(byte_level().backend_tokenizer, text, calls)
    long_text.around(encode, len(text), 900_000, 100, 200)
    assert len(calls) == 2 and max(calls) < 10_000


def test_a_run_of_like_characters_is_encoded_from_its_beginning(monkeypatch):
    monkeypatch.setattr(long_text, "is_long", lambda length, tokens: length > 3000)
    # Of pairs of a's, the first begins where the run does.
    text = "b " + "a" * 9001 + " c" * 9000
    encode = encoder(byte_level().backend_tokenizer, text)
    ids, offsets = long_text.around(encode, len(text), 8000, 10, 10)
    all_ids, all_offsets = encode(0, len(text))
    inside = (all_offsets[:, 0] >= offsets[0, 0]) & (all_offsets[:, 1] <= offsets[-1, 1])
    np.testing.assert_array_equal(ids, all_ids[inside])


def test_a_run_without_end_is_refused(monkeypatch):
    monkeypatch.setattr(long_text, "LONGEST", 50_000)
    text, calls = "a" * 300_001, []
    encode = encoder(byte_level().backend_tokenizer, text, calls)
    with pytest.raises(BadExample, match="a text of 300001 characters can't be cut to 20 tokens"):
        long_text.around(encode, len(text), 150_000, 10, 10)
    assert max(calls) < 60_000


@pytest.mark.parametrize(
    ("a", "b", "i", "j", "same"),
    [
        ("", "", 0, 0, 0),
        ("abc", "abd", 0, 0, 2),
        ("abc", "abc", 0, 0, 3),
        ("ab" * 5000 + "x", "ab" * 5000 + "y", 0, 0, 10_000),
        ("a" * 5000, "a" * 3000, 0, 0, 3000),
        ("xxab" + "c" * 2000, "yab" + "c" * 1500 + "d", 2, 1, 1502),
        ("abc", "abc", 3, 0, 0),
    ],
)
def test_what_two_texts_share(a, b, i, j, same):
    assert long_text.shared_beginning(a, b, i, j) == same
