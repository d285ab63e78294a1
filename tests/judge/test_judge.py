"""Judge passes against eager attention in NumPy, one prompt at a time, from the definition."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax.data.pair import Pair
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.judge import Judge, judge_pairs
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import decoder
from attnpo_jax.models.config import ModelConfig
from tests import tiny

TINY = ModelConfig(
    vocab_size=260,
    hidden_size=24,
    intermediate_size=40,
    num_layers=3,
    num_heads=6,
    num_kv_heads=2,
    head_dim=8,
    rope_theta=1000.0,
)
LENGTHS = {"max_length": 200, "max_prompt_length": 60}


@pytest.fixture(scope="module")
def model():
    """A random model over bytes, its weights far from zero so that attention is not uniform."""
    params = tiny.larger(decoder.init_params(TINY, jax.random.key(0)), 8.0)
    tokenizer = ChatTokenizer(tiny.byte_tokenizer(), origin="test")
    return LanguageModel(pathlib.Path("test"), TINY, jax.device_put(params), tokenizer)


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    file = tmp_path_factory.mktemp("template") / "judge.txt"
    file.write_text("Q {question}\n[A]\n{answer_a}\n[B]\n{answer_b}\nWhich?")
    return str(file)


def pair(name, prompt, chosen, rejected):
    return Pair(name, ({"role": "user", "content": prompt},), chosen, rejected)


PAIRS = [
    pair("short", "Why?", "good", "bad one"),
    pair("spaces", "Where to?", " Home, at six.\n", "there"),
    pair("alike", "Say which.", "the better of both", "the best"),
    pair("long", "Count.", "one two three four five six", "no"),
    pair("wide", "Name it", "Ümläut 😀", "x"),
]


def eager(params, ids):
    """Attention (layers, N, L, L), and the last position's logits (V,)."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    config, L = TINY, len(ids)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_norm_eps) * scale

    half = config.head_dim // 2
    angle = np.arange(L)[:, None] * config.rope_theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]

    def rotate(x):
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)

    x, rows = p["embedding"][ids], []
    group = config.num_heads // config.num_kv_heads
    for i in range(config.num_layers):
        layer = {name: value[i] for name, value in p["layers"].items()}
        h = norm(x, layer["attention_norm"])
        q = rotate(np.einsum("ld,dnh->lnh", h, layer["query"]))
        k = rotate(np.einsum("ld,dkh->lkh", h, layer["key"])).repeat(group, 1)
        v = np.einsum("ld,dkh->lkh", h, layer["value"]).repeat(group, 1)
        scores = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(config.head_dim)
        scores[:, np.triu(np.ones((L, L), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        rows.append(weights)
        x = x + np.einsum("nqk,knh,nhd->qd", weights, v, layer["output"])
        h = norm(x, layer["mlp_norm"])
        gate = h @ layer["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ layer["up"])) @ layer["down"]
    unembedding = np.asarray(decoder.unembedding(params), np.float64)
    return np.stack(rows), unembedding @ norm(x[-1], p["final_norm"])


def wanted(attention, source):
    """What a source of the last position's attention is, (L,), of all that there is."""
    if source == "rollout":
        rollout = np.eye(attention.shape[-1])
        for layer in attention.mean(1):
            rollout = (0.5 * layer + 0.5 * np.eye(len(rollout))) @ rollout
        return rollout[-1]
    if isinstance(source, str):
        layer, head = map(int, source.split(":"))
        return attention[layer, head, -1]
    return attention[source].mean(0)[-1]


def assert_judged_as_defined(model, judge, pairs, judgements):
    """Two prompts a pair, each run alone; text tokens are bytes, in training as for the judge."""
    assert [j.id for j in judgements] == [p.id for p in pairs]
    a, b = judge.prompter.letter_ids
    for p, judgement in zip(pairs, judgements, strict=True):
        prompt = judge.prompter.build(p)
        for order in (0, 1):
            rows, logits = eager(model.params, prompt.ids[order])
            rows = np.stack([wanted(rows, source) for source in judge.source_layers])
            for side in ("chosen", "rejected"):
                want = rows[:, getattr(prompt, f"{side}_tokens")[order]]
                found = getattr(judgement, side)[order]
                # What the judge did not see has no attention: the end of an answer that was cut,
                # and white space around one.
                response = getattr(p, side)
                before = len(response) - len(response.lstrip())
                after = found.shape[1] - before - want.shape[1]
                want = np.pad(want, ((0, 0), (before, after)))
                np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)
            if not judge.verdict:
                continue
            for_a = logits[a] - logits[b]
            np.testing.assert_allclose(
                judgement.verdict[order], for_a if order == 0 else -for_a, atol=1e-3
            )
            assert judgement.answer_ids[order] == logits.argmax()


def tokenize(model, pairs):
    return [tokenize_pair(model.tokenizer, p, **LENGTHS) for p in pairs]


def text_lengths(judgements):
    return [(j.chosen.shape[-1], j.rejected.shape[-1]) for j in judgements]


@pytest.mark.parametrize(
    "settings",
    [
        {"source_layers": (0, 1, 2)},
        {"source_layers": (-1, 0), "batch_size": 2, "num_buckets": 1},
        {"source_layers": (1,), "batch_size": 1},
        {"source_layers": (2,), "token_budget": 1},
        {"source_layers": (0, "1:5", "-1:0", "rollout", "1:2")},
        {"source_layers": ("rollout",), "batch_size": 2, "verdict": False},
        {"source_layers": ("0:3", 1), "batch_size": 2, "attention": "xla"},
    ],
)
def test_judged_as_defined_however_batched(model, template, settings):
    judge = Judge(model, template=template, **settings)
    counted = {-1: 2, "-1:0": "2:0"}
    assert judge.source_layers == tuple(counted.get(x, x) for x in settings["source_layers"])
    judgements = judge.judge(PAIRS, tokenize(model, PAIRS))
    assert_judged_as_defined(model, judge, PAIRS, judgements)
    # As trained on: all bytes of the response, its white space too, without the closing tokens.
    assert text_lengths(judgements)[:2] == [(4, 7), (15, 5)]
    assert judgements[0].chosen.shape == (2, len(settings["source_layers"]), 4)
    # What all prompts begin with ran once: "<|im_start|>user\nQ " is 8 tokens.
    assert len(judge._common) == 8


def test_a_pair_alone_runs_whole(model, template):
    judge = Judge(model, template=template, source_layers=(0, 2))
    for p in PAIRS[:2]:
        judgements = judge.judge([p], tokenize(model, [p]))
        assert_judged_as_defined(model, judge, [p], judgements)
    assert len(judge._common) == 0


def test_prompts_that_do_not_begin_like_the_sample(model, template):
    judge = Judge(model, template=template, source_layers=(0, 2))
    sample = [pair("1", "Tell me more.", "a", "b"), pair("2", "Tell me less.", "c", "d")]
    judge.fit([judge.prompter.build(p) for p in sample])
    assert len(judge._common) == 8 + len("Tell me ")
    pairs = [PAIRS[0], pair("3", "Tell me why.", "e e", "f"), PAIRS[3]]
    judgements = judge.judge(pairs, tokenize(model, pairs))
    assert_judged_as_defined(model, judge, pairs, judgements)


def test_answers_that_all_begin_alike(model, template):
    """One question, and answers with one beginning: all prompts share some of the answers."""
    pairs = [
        pair("1", "Who?", "The king of Spain", "The queen"),
        pair("2", "Who?", "The queen of hearts", "The king"),
        pair("3", "Who?", "The two", "The three"),
    ]
    judge = Judge(model, template=template, source_layers=(0, 2))
    judgements = judge.judge(pairs, tokenize(model, pairs))
    assert_judged_as_defined(model, judge, pairs, judgements)
    assert all(j.chosen[:, :, :4].min() > 0 for j in judgements)


def test_a_prompt_whose_answer_stands_where_the_sample_had_its_question(model, template):
    sample = [pair(str(i), f"Why\n[A]\nso {i}", "yes", "no") for i in range(2)]
    judge = Judge(model, template=template, source_layers=(0, 2))
    judge.fit([judge.prompter.build(p) for p in sample])
    odd = pair("odd", "Why", "so 1", "so 2")
    judgements = judge.judge([odd], tokenize(model, [odd]))
    assert_judged_as_defined(model, judge, [odd], judgements)


def test_rows_longer_than_any_in_the_sample(model, template):
    judge = Judge(model, template=template, source_layers=(2,))
    judge.fit([judge.prompter.build(p) for p in PAIRS[:1]])
    pairs = [PAIRS[0], pair("longer", "W" * 50, "c" * 70, "r" * 60)]
    judgements = judge.judge(pairs, tokenize(model, pairs))
    assert_judged_as_defined(model, judge, pairs, judgements)


def test_over_long_prompts_are_cut_and_the_rest_weighs_nothing(model, template):
    judge = Judge(
        model, template=template, max_length=80, max_answer_length=10, source_layers=(0, 2)
    )
    pairs = [PAIRS[0], pair("cut", "0123456789" * 3, "c" * 17, "r" * 9)]
    judgements = judge.judge(pairs, tokenize(model, pairs))
    assert text_lengths(judgements)[1] == (17, 9)
    assert_judged_as_defined(model, judge, pairs, judgements)
    assert judge.prompter.build(pairs[1]).truncated
    assert judgements[1].chosen[:, :, :10].min() > 0 and not judgements[1].chosen[:, :, 10:].any()


def test_both_orders_see_the_same_when_answers_trade_places(model, template):
    judge = Judge(model, template=template, source_layers=(0, 2))
    swapped = dataclasses.replace(
        PAIRS[3], id="swapped", chosen=PAIRS[3].rejected, rejected=PAIRS[3].chosen
    )
    pairs = [PAIRS[3], swapped]
    one, two = judge.judge(pairs, tokenize(model, pairs))
    np.testing.assert_allclose(one.chosen[::-1], two.rejected, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.rejected[::-1], two.chosen, rtol=0, atol=1e-6)
    np.testing.assert_allclose(one.verdict[::-1], -two.verdict, rtol=0, atol=1e-4)


def test_bfloat16_stays_near(model, template):
    small = dataclasses.replace(model, params=jax.tree.map(lambda p: p / 4, model.params))
    settings = {"template": template, "source_layers": (0, 2)}
    tokenized = tokenize(model, PAIRS)
    want = Judge(small, **settings).judge(PAIRS, tokenized)
    got = Judge(small, dtype=jnp.bfloat16, **settings).judge(PAIRS, tokenized)
    for a, b in zip(got, want, strict=True):
        assert a.chosen.dtype == a.verdict.dtype == np.float32
        np.testing.assert_allclose(a.chosen, b.chosen, rtol=0.1, atol=1e-4)
        np.testing.assert_allclose(a.verdict, b.verdict, atol=0.1)


def test_without_a_verdict_no_layer_above_the_last_source_runs(model, template):
    settings = {"template": template, "source_layers": (0, 1)}
    tokenized = tokenize(model, PAIRS)
    want = Judge(model, **settings).judge(PAIRS, tokenized)
    # Whatever runs through this layer is no number any more.
    poisoned = jax.tree.map(lambda p: p, model.params)
    poisoned["layers"] = jax.tree.map(lambda p: p.at[2].set(jnp.nan), poisoned["layers"])
    broken = dataclasses.replace(model, params=poisoned)
    got = Judge(broken, verdict=False, **settings).judge(PAIRS, tokenized)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a.chosen, b.chosen, atol=1e-6)
        np.testing.assert_allclose(a.rejected, b.rejected, atol=1e-6)
        assert np.isnan(a.verdict).all() and a.answer_ids.tolist() == [-1, -1]
    assert np.isnan(Judge(broken, **settings).judge(PAIRS, tokenized)[0].verdict).all()


def test_judging_a_handful_of_pairs(model, template):
    found = judge_pairs(model, PAIRS[:2], template=template, source_layers=(2,), **LENGTHS)
    assert [(t.id, j.id) for t, j in found] == [("short", "short"), ("spaces", "spaces")]
    judge = Judge(model, template=template, source_layers=(2,))
    assert_judged_as_defined(model, judge, PAIRS[:2], [j for _, j in found])
    assert judge_pairs(model, [], template=template) == []


def test_a_layer_that_the_model_lacks(model, template):
    for source, said in ((3, "3 layers"), ("-4:0", "3 layers"), ("2:6", "6 heads")):
        with pytest.raises(IndexError, match=said):
            Judge(model, template=template, source_layers=(source,))
