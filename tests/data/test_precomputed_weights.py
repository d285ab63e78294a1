"""Precomputed weights: what a row may hold, and how its tokens find their place in the response."""

import json

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from attnpo_jax.data import precomputed_weights, token_bytes
from attnpo_jax.data.pair import BadExample, PrecomputedWeights
from attnpo_jax.data.precomputed_weights import WeightReader
from attnpo_jax.data.sources import load_pairs, pairs_digest
from attnpo_jax.data.tokenize import TokenizedPair

ROW = {
    "prompt": "Why?",
    "chosen": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "As is."}],
    "rejected": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "No"}],
    "chosen_tokens": [3, 4, 5],
    "rejected_tokens": [6],
    "chosen_weights_7": [0.5, 0.25, 0.25],
    "rejected_weights_7": [1.0],
    "chosen_weights_31": [0.25, 0.75, 0],
    "rejected_weights_31": [1],
    "chosen_weights_attention_rollout": [0.0, 0.0, 1.0],
    "rejected_weights_attention_rollout": [1.0],
    "cr_last_token": "A",
    "chosen_weights_half": [1.0, 0.0, 0.0],
}


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


# --- Rows ---------------------------------------------------------------------------------------


def test_names_are_those_of_both_responses_the_highest_number_last():
    assert precomputed_weights.names(ROW) == ("attention_rollout", "7", "31")
    assert precomputed_weights.names(["chosen", "chosen_weights_2"]) == ()


def test_columns_are_read_by_name_or_all(tmp_path):
    file = write(tmp_path / "a.jsonl", [ROW, ROW])
    loaded = load_pairs(file, weight_columns="all")
    assert loaded.weight_columns == ("attention_rollout", "7", "31")
    ready = loaded.pairs[1].precomputed
    assert ready.tokens["chosen"].tolist() == [3, 4, 5]
    assert ready.weights["chosen"].tolist() == [[0, 0, 1], [0.5, 0.25, 0.25], [0.25, 0.75, 0]]
    assert ready.weights["rejected"].tolist() == [[1], [1], [1]]

    loaded = load_pairs(file, weight_columns=("7",))
    assert loaded.weight_columns == ("7",)
    assert loaded.pairs[0].precomputed.weights["chosen"].tolist() == [[0.5, 0.25, 0.25]]
    assert load_pairs(file).pairs[0].precomputed is None


def test_numbers_of_any_sign_are_read_and_carried_over(tmp_path):
    file = write(tmp_path / "a.jsonl", [{**ROW, "chosen_weights_7": [-3.5, 0, -0.25]}])
    (pair,) = load_pairs(file, weight_columns=("7",)).pairs
    assert pair.precomputed.weights["chosen"].tolist() == [[-3.5, 0, -0.25]]
    # "naïve" as na|ïve: a token's number is shared by its characters, whatever its sign.
    trained = trained_on([500, 501], [(0, 2), (2, 5)])
    found = carried(byte_level("naïve"), [256], [-1.0], "naïve", trained)
    np.testing.assert_allclose(found, [-0.4, -0.6], rtol=1e-6)


def test_columns_of_a_table_are_read(tmp_path):
    import datasets

    datasets.Dataset.from_list([ROW]).save_to_disk(str(tmp_path / "table"))
    for columns in ("all", ("31",)):
        ready = load_pairs(str(tmp_path / "table"), weight_columns=columns).pairs[0].precomputed
        assert ready.weights["chosen"][-1].tolist() == [0.25, 0.75, 0]


def test_the_digest_covers_the_weights(tmp_path):
    changed = {**ROW, "chosen_weights_7": [0.25, 0.5, 0.25]}
    files = [
        write(tmp_path / f"{i}.jsonl", [{**row, "id": "x"}]) for i, row in enumerate((ROW, changed))
    ]
    digests = [pairs_digest(load_pairs(f, weight_columns=("7",)).pairs) for f in files]
    assert digests[0] != digests[1]
    assert len({pairs_digest(load_pairs(f).pairs) for f in files}) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"chosen_weights_7": None}, "`chosen_weights_7` is missing; accepted: a list of numbers"),
        ({"rejected_weights_7": [0.5, 0.5]}, "`rejected_weights_7` has 2 numbers for 1 tokens"),
        ({"chosen_weights_7": [0.5, "a", 0.6]}, "something else than finite numbers"),
        ({"chosen_weights_7": [0.5, float("inf"), 0.6]}, "something else than finite numbers"),
        ({"chosen_weights_7": [True, 0.5, 0.6]}, "something else than finite numbers"),
        ({"chosen_tokens": [True, 4, 5]}, "`chosen_tokens` holds something else than token ids"),
        ({"chosen_tokens": None}, "`chosen_tokens` is missing"),
        ({"chosen_tokens": []}, "`chosen_tokens` is empty"),
        ({"chosen_tokens": [1, "a", 2]}, "`chosen_tokens` holds something else"),
    ],
)
def test_rows_without_sound_weights_are_bad_rows(tmp_path, change, reason):
    file = write(tmp_path / "a.jsonl", [ROW, {**ROW, **change}])
    with pytest.raises(BadExample, match=f"a.jsonl, example 2: .*{reason}"):
        load_pairs(file, weight_columns=("7",))
    assert len(load_pairs(file).pairs) == 2
    with pytest.raises(BadExample, match="no `chosen_weights_<name>`"):
        precomputed_weights.read(ROW, ())


# --- Tokens to the response's characters ----------------------------------------------------------


def byte_level(*words):
    """A byte-level tokenizer of single bytes (id = byte) and whole words (ids from 256 on)."""
    byte_of = {b: c for c, b in token_bytes.bytes_of_characters().items()}
    vocab = {byte_of[b]: b for b in range(256)}
    vocab |= {"".join(byte_of[b] for b in w.encode()): 256 + i for i, w in enumerate(words)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return backend


def sentencepiece(*pieces):
    vocab = {f"<0x{b:02X}>": b for b in range(256)}
    vocab |= {piece: 256 + i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return backend


def trained_on(ids, spans):
    """A pair whose chosen response is trained on as these ids of these characters, then an end."""
    spans = np.array(spans, np.int32)
    one = np.array([[0, 1]], np.int32)
    ids = np.array([*ids, 999], np.int32)
    return TokenizedPair("p", np.array([1]), ids, np.array([7, 999]), len(spans), 1, spans, one)


def carried(backend, tokens, weights, text, pair):
    if all(isinstance(token, int) for token in tokens):
        tokens = np.array(tokens, np.int32)
    ready = PrecomputedWeights(
        {"chosen": tokens, "rejected": np.array([7], np.int32)},
        {"chosen": np.array([weights], np.float32), "rejected": np.ones((1, 1), np.float32)},
    )
    chosen, rejected = WeightReader(backend, "judge").carry(ready, text, "x", pair)
    assert rejected.tolist() == [[1.0]]
    return chosen[0].tolist()


def test_the_same_tokens_keep_their_weights():
    pair = trained_on([256, 257, 33], [(0, 2), (2, 5), (5, 6)])
    backend = byte_level("no", "pe ")
    assert carried(backend, [256, 257, 33], [0.5, 0.25, 0.25], "nope !", pair) == [0.5, 0.25, 0.25]
    # The judge saw the beginning only; training cut the end off.
    assert carried(backend, [256, 257], [0.5, 0.5], "nope !", pair) == [0.5, 0.5, 0]
    assert carried(backend, [256, 257, 33, 33], [0.5, 0.25, 0.125, 0.125], "nope !!", pair) == [
        0.5,
        0.25,
        0.125,
    ]


def test_other_tokens_share_by_characters():
    # "naïve": one token of 6 bytes to na|ïve; then n|a|two bytes of ï|v|e to the same.
    pair = trained_on([500, 501], [(0, 2), (2, 5)])
    weights = carried(byte_level("naïve"), [256], [1.0], " naïve\n", pair)
    np.testing.assert_allclose(weights, [0.4, 0.6], rtol=1e-6)
    tokens = list("naïve".encode())
    weights = carried(byte_level(), tokens, [0.1, 0.2, 0.1, 0.2, 0.3, 0.1], "naïve", pair)
    np.testing.assert_allclose(weights, [0.3, 0.7], rtol=1e-6)


def test_sentencepiece_tokens_and_texts():
    pair = trained_on([500, 501], [(0, 2), (2, 5)])
    # "a 😀b": the word mark before the first word is no character of the response.
    tokens = [256, 257, *"😀".encode(), ord("b")]
    weights = [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.3]
    found = carried(sentencepiece("▁a", "▁"), tokens, weights, "a 😀bc", pair)
    np.testing.assert_allclose(found, [0.3, 0.7], rtol=1e-6)
    found = carried(byte_level(), ("a ", "😀bc"), [0.25, 0.75], "a 😀bc", pair)
    np.testing.assert_allclose(found, [0.25, 0.75], rtol=1e-6)


# As transformers' `convert_ids_to_tokens` writes tokens.


def test_entries_of_a_byte_level_vocabulary_are_read():
    text, pair = "no 😀b", trained_on([500, 501], [(0, 3), (3, 5)])
    backend = byte_level("no")
    tokens = ("no", "Ġ", "ð", "Ł", "ĺ", "Ģ", "b", "Ċ")
    assert tokens == tuple(
        backend.id_to_token(i) for i in (256, 32, *"😀".encode(), ord("b"), ord("\n"))
    )
    weights = [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.2, 0.1]
    found = carried(backend, tokens, weights, text, pair)
    np.testing.assert_allclose(found, [0.3, 0.7], rtol=1e-6)


def test_entries_of_a_sentencepiece_vocabulary_are_read():
    pair = trained_on([500, 501], [(0, 2), (2, 5)])
    tokens = ("▁a", "▁", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "b")
    weights = [0.1, 0.2, 0.1, 0.1, 0.1, 0.1, 0.3]
    found = carried(sentencepiece("▁a", "▁", "b"), tokens, weights, "a 😀b", pair)
    np.testing.assert_allclose(found, [0.3, 0.7], rtol=1e-6)


def test_what_looks_like_an_entry_is_text_where_the_response_has_it():
    # The texts "Ġ" and "a" of the response "Ġa", though "Ġ" is the vocabulary's space.
    pair = trained_on([500, 501], [(0, 1), (1, 2)])
    assert carried(byte_level(), ("Ġ", "a"), [0.25, 0.75], "Ġa", pair) == [0.25, 0.75]
    assert carried(sentencepiece("▁", "a"), ("▁", "a"), [0.25, 0.75], "▁a", pair) == [0.25, 0.75]


def test_entries_of_another_vocabulary_are_refused():
    pair = trained_on([500, 501], [(0, 2), (2, 5)])
    with pytest.raises(BadExample, match="read 'ĠnoĠpeĠx'.*another tokenizer than judge"):
        carried(byte_level(), ("Ġno", "Ġpe", "Ġx"), [0.5, 0.25, 0.25], "aa bb cc", pair)


def test_small_differences_are_passed_over_and_mass_is_kept():
    text = "I do n't know that . It was long ago, in a different country"
    pair = trained_on([500, 501], [(0, 20), (20, len(text))])
    # As decoding with clean-up writes it, cut in the middle of a character, with template text.
    tokens = ("I", " don't", " know", " that.", " It was long ago, in a", "\ufffd", "\n<|end")
    weights = np.array([0.1, 0.2, 0.3, 0.1, 0.2, 0.05, 0.05])
    found = carried(byte_level(), tokens, weights, text, pair)
    np.testing.assert_allclose(sum(found), 1, rtol=1e-6)
    # All but " It was ..." and what follows stands in the first 20 characters.
    np.testing.assert_allclose(found, [0.7, 0.3], rtol=1e-6)


def test_tokens_of_another_text_are_refused():
    pair = trained_on([500, 501], [(0, 2), (2, 5)])
    with pytest.raises(BadExample, match="pair p: `chosen_tokens` read 'else'.*than judge"):
        carried(byte_level("else"), [256], [1.0], "Nope.", pair)
    with pytest.raises(BadExample, match="token 1000 is not in the vocabulary of judge"):
        carried(byte_level(), [1000], [1.0], "Nope.", pair)
    with pytest.raises(BadExample, match="pair p: `chosen_tokens` read"):
        carried(byte_level(), ["\ud83d"], [1.0], "Nope.", pair)  # half of a character, as JSON can
    words = tokenizers.Tokenizer(models.WordLevel({"Nope": 0, "?": 1}, "?"))
    with pytest.raises(ValueError, match="judge: neither a byte-level nor a SentencePiece"):
        carried(words, [0], [1.0], "Nope.", pair)
