"""Scorers of a tiny model's pairs: their numbers by hand, and what is computed when.

Run as a script, this file is a `prepare` that kills itself in the middle of a scorer's pass.
"""

import functools
import io
import os
import pathlib
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

from attnpo_jax import scorers, weighting
from attnpo_jax.data.batching import EvalBatches
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.prepare.reference import Reference
from attnpo_jax.prepare.scorer_forms import Prefix
from attnpo_jax.prepare.stage import prepare
from attnpo_jax.registry import RegistryError
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UserError
from tests import forked, tiny

SIDES = ("chosen", "rejected")
PLAIN = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
MERGES = [("e", "c"), ("a", "u"), ("au", "s"), ("l", "u"), ("lu", "e"), ("k", "e"), ("ke", "y")]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder with the model, the data and the template; another model, with longer tokens; an
    adapter; another chat template.
    """
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    tokenizer = tiny.byte_tokenizer(merges=MERGES)
    shape = tiny.HF_CONFIG | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
    tiny.write_model(folder / "coarse", shape, tokenizer, lambda p: tiny.larger(p, 4.0))
    (folder / "plain.jinja").write_text(PLAIN)
    rng = np.random.default_rng(0)
    name = "base_model.model.model.layers.1.mlp.down_proj.lora_"
    factors = {
        f"{name}A.weight": rng.normal(size=(2, 32)),
        f"{name}B.weight": rng.normal(size=(16, 2)),
    }
    (folder / "adapter").mkdir()
    save_file(
        {key: value.astype(np.float32) for key, value in factors.items()},
        folder / "adapter" / "adapter_model.safetensors",
    )
    (folder / "adapter" / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 4}'
    )
    return folder


def config_with(inputs, named, **changes):
    changes = {"data__eval": "", "judge__layers": "none", "weighting__name": "uniform"} | changes
    return tiny.small_config(inputs, prepare__scorers=named, **changes)


def run(config, workdir):
    prepare(Run.resolve(config, workdir), console=Console(file=io.StringIO(), width=200))
    return Run.resolve(config, workdir).open_prepared("train")


@pytest.fixture
def passed(monkeypatch):
    """The ids of the pairs that each pass is given from here on."""
    ids = {"judge": [], "reference": []}
    for kind, of, place in (("judge", Judge, 1), ("reference", Reference, 0)):

        def spy(self, *given, of=of.run, kind=kind, place=place):
            ids[kind] += [pair.id for pair in given[place]]
            return of(self, *given)

        monkeypatch.setattr(of, "run", spy)
    return ids


# --- The numbers ----------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0)
def all_logps(model, params, tokens):
    positions = jnp.arange(len(tokens))[None]
    hidden = decoder.forward(model, params, tokens[None], positions, jnp.ones_like(positions))
    return jax.nn.log_softmax(hidden[0] @ decoder.unembedding(params).T, axis=-1)


def logps_of(model, prompt, response, params=None):
    """A response's tokens and their log-probs, by one plain pass over the text."""
    ids = model.tokenizer.encode(prompt + response)[0]
    start = len(model.tokenizer.encode(prompt)[0])
    params = model.params if params is None else params
    logps = all_logps(model.config, params, np.pad(ids, (0, 160 - len(ids))))
    own = model.tokenizer.tokenizer.convert_ids_to_tokens(ids)[start:]
    return own, np.array(logps[np.arange(start, len(ids)) - 1, ids[start:]])


def chatml(*turns):
    return "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns)


def test_log_probs_are_those_of_the_named_model_prompt_and_template(inputs, tmp_path):
    named = {
        "same": {},
        "kind": {"prefix": "Be kind."},
        "plain": {"chat_template": str(inputs / "plain.jinja")},
        "tuned": {"adapter": str(inputs / "adapter")},
        "coarse": {"model": str(inputs / "coarse" / "model")},
        "new": {"function": "diff"},
    }
    tiny.write_lines(tmp_path / "two.jsonl", [tiny.ROWS[0], tiny.ROWS[4]])
    config = config_with(inputs, named, data__train=str(tmp_path / "two.jsonl"))
    dataset = run(config, tmp_path / "work")
    assert dataset.scorers == dataset.columns == tuple(sorted(named))

    own, coarse = (load_model(str(inputs / name)) for name in ("model", "coarse/model"))
    a, b = load_file(inputs / "adapter" / "adapter_model.safetensors").values()
    tuned = jax.tree.map(jnp.array, own.params)
    tuned["layers"]["down"] = tuned["layers"]["down"].at[1].add(4 / 2 * (b @ a).T)
    answer, end, fewer = "<|im_start|>assistant\n", "<|im_end|>\n", 0
    for row, example in zip(dataset, (tiny.ROWS[0], tiny.ROWS[4]), strict=True):
        question = example["prompt"]
        prompts = {
            "same": chatml(("user", question)) + answer,
            "kind": chatml(("system", "Be kind."), ("user", question)) + answer,
            "plain": f"[user]{question}<|im_end|>[assistant]",
        }
        for side in SIDES:
            found = dict(zip(dataset.scorers, row[f"scores_{side}"], strict=True))
            length, text = len(row[f"{side}_ids"]), example[side]
            assert all(scores.shape == (length,) for scores in found.values())
            np.testing.assert_array_equal(found["same"], row[f"ref_{side}_logps"])
            for name in ("same", "kind"):
                _, want = logps_of(own, prompts[name], text + end)
                np.testing.assert_allclose(found[name], want, atol=1e-4)
            _, want = logps_of(own, prompts["same"], text + end, tuned)
            np.testing.assert_allclose(found["tuned"], want, atol=1e-4)
            assert np.abs(found["tuned"] - found["same"]).max() > 0.01
            # This template closes with the same first token, and without the line's end.
            _, want = logps_of(own, prompts["plain"], text + "<|im_end|>")
            np.testing.assert_allclose(found["plain"][:-1], want, atol=1e-4)
            assert found["plain"][-1] == 0
            # Longer tokens spread over their characters, each of which is a token here.
            tokens, logps = logps_of(coarse, prompts["same"], text)
            fewer += len(text) - len(tokens)
            spread = [logp / len(t) for t, logp in zip(tokens, logps, strict=True) for _ in t]
            np.testing.assert_allclose(found["coarse"][: len(text)], spread, atol=1e-4)
            other = row[f"{SIDES[side == 'chosen']}_ids"]
            np.testing.assert_array_equal(found["new"], scorers.diff(row[f"{side}_ids"], other))

    assert fewer == 5
    # To a weighting they are columns, closing tokens included.
    batch = jax.tree.map(lambda x: x[0], EvalBatches(dataset, batch_size=2)[0])
    at = np.argwhere(batch.pair_BG == 1)[0]
    for r, side in enumerate(SIDES):
        scores = dataset[1][f"scores_{side}"]
        np.testing.assert_array_equal(batch.ready_BG2KT[*at, r, :, : scores.shape[1]], scores)


def test_a_prefix_goes_to_the_first_message_of_its_role():
    turns = [{"role": "system", "content": "Short."}, {"role": "user", "content": "Hi"}]
    turns += [{"role": "assistant", "content": "Ho"}, {"role": "user", "content": "Why?"}]

    def texts(role, messages):
        return [(m["role"], m["content"]) for m in Prefix("Kind", role).put_before(messages)]

    as_it_is = [(m["role"], m["content"]) for m in turns]
    assert texts("system", turns) == [("system", "Kind\n\nShort."), *as_it_is[1:]]
    assert texts("system", turns[1:]) == [("system", "Kind"), *as_it_is[1:]]
    assert texts("user", turns) == [as_it_is[0], ("user", "Kind\n\nHi"), *as_it_is[2:]]


def test_a_long_prompt_keeps_the_prefix_and_its_last_tokens(inputs, tmp_path):
    row = tiny.ROWS[0] | {"prompt": "Once upon a time " * 20 + "there was what?"}
    tiny.write_lines(tmp_path / "long.jsonl", [row])
    config = config_with(
        inputs,
        {"kind": {"prefix": "Be kind."}},
        data__train=str(tmp_path / "long.jsonl"),
        data__max_prompt_length=40,
    )
    (found,) = run(config, tmp_path / "work")
    model = load_model(str(inputs / "model"))
    kept = model.tokenizer.encode(chatml(("user", row["prompt"])) + "<|im_start|>assistant\n")[0]
    assert found["prompt_ids"].tolist() == kept[-40:]
    last = model.tokenizer.tokenizer.decode(kept[-40:])
    _, want = logps_of(model, "<|im_start|>system\nBe kind." + last, row["chosen"] + "<|im_end|>\n")
    np.testing.assert_allclose(found["scores_chosen"][0], want, atol=1e-4)


@pytest.mark.parametrize(
    ("truncation", "lengths", "kept"),
    [
        # 23 tokens of the prompt and 12 of the response.
        ("keep_start", (35, 30), slice(0, 12)),
        # The last 27 of the text and two that close the turn, behind one of the text.
        ("keep_end", (30, 29), slice(6, 33)),
    ],
)
def test_a_response_that_is_cut_for_training_is_scored_as_far(
    inputs, tmp_path, truncation, lengths, kept
):
    row = tiny.ROWS[0] | {"chosen": "Because of the clouds and the key"}
    tiny.write_lines(tmp_path / "long.jsonl", [row])
    changes = dict(zip(("data__max_length", "data__max_prompt_length"), lengths, strict=True))
    named = {"coarse": {"model": str(inputs / "coarse" / "model")}}
    config = config_with(
        inputs,
        named,
        data__train=str(tmp_path / "long.jsonl"),
        data__truncation=truncation,
        **changes,
    )
    (found,) = run(config, tmp_path / "work")
    assert found["chosen_text_length"] == kept.stop - kept.start
    model = load_model(named["coarse"]["model"])
    prompt = chatml(("user", row["prompt"])) + "<|im_start|>assistant\n"
    tokens, logps = logps_of(model, prompt, row["chosen"])
    spread = [logp / len(t) for t, logp in zip(tokens, logps, strict=True) for _ in t]
    scores = found["scores_chosen"][0][: found["chosen_text_length"]]
    np.testing.assert_allclose(scores, spread[kept], atol=1e-4)


def test_a_scorer_reads_the_empty_messages_that_are_trained_on(inputs, tmp_path):
    tiny.write_lines(tmp_path / "empty.jsonl", [tiny.ROWS[3] | {"rejected": ""}])
    config = config_with(
        inputs,
        {"asked": {"prefix": "Be kind.", "prefix_role": "user"}},
        data__train=str(tmp_path / "empty.jsonl"),
        data__empty_response="space",
        data__empty_system_message=True,
    )
    (found,) = run(config, tmp_path / "work")
    model = load_model(str(inputs / "model"))
    turns = ("system", ""), ("user", f"Be kind.\n\n{tiny.ROWS[3]['prompt']}")
    prompt = chatml(*turns) + "<|im_start|>assistant\n"
    for side, text in (("chosen", tiny.ROWS[3]["chosen"]), ("rejected", " ")):
        _, want = logps_of(model, prompt, text + "<|im_end|>\n")
        np.testing.assert_allclose(found[f"scores_{side}"][0], want[: len(text) + 2], atol=1e-4)


@pytest.mark.parametrize(
    ("template", "scorer", "message"),
    [
        (
            PLAIN.replace("m['content']", "m['content'] | replace('Because', 'As')"),
            {},
            "train.jsonl, example 1: config.prepare.scorers.x: `chosen`: the chat template of .*"
            "data.on_bad_row can't leave it out.*accepted: data without such pairs",
        ),
        (
            "{% for m in messages if m['role'] != 'system' %}" + PLAIN.split("%}", 1)[1],
            {"prefix": "Be kind."},
            "example 1: config.prepare.scorers.x: .* does not write the prefix .*prefix_role",
        ),
    ],
)
def test_what_can_not_be_aligned_is_refused_by_name(inputs, tmp_path, template, scorer, message):
    (tmp_path / "other.jinja").write_text(template)
    named = {"x": {"chat_template": str(tmp_path / "other.jinja"), **scorer}}
    with pytest.raises(UserError, match=message):
        run(config_with(inputs, named, data__on_bad_row="skip"), tmp_path / "work")


def test_the_extra_end_token_is_scored_where_it_is_the_same_token(inputs, tmp_path):
    """Here the template's end is the tokenizer's end token, which comes once more behind it."""
    tiny.write_lines(tmp_path / "one.jsonl", [tiny.ROWS[3]])
    for name, merges in (("model", ()), ("coarse", MERGES)):
        tokenizer = tiny.byte_tokenizer(merges=merges, eos_token="<|im_end|>")
        shape = tiny.HF_CONFIG | {"vocab_size": len(tokenizer), "num_hidden_layers": 2}
        tiny.write_model(tmp_path / name, shape, tokenizer, lambda p: tiny.larger(p, 4.0))
    named = {
        "asked": {"prefix": "Be kind.", "prefix_role": "user"},
        "coarse": {"model": str(tmp_path / "coarse" / "model")},
    }
    config = config_with(
        inputs,
        named,
        model__source=str(tmp_path / "model" / "model"),
        data__train=str(tmp_path / "one.jsonl"),
        data__extra_end_token=True,
    )
    (found,) = run(config, tmp_path / "work")
    own, coarse = (load_model(str(tmp_path / name / "model")) for name in ("model", "coarse"))
    question, end = tiny.ROWS[3]["prompt"], "<|im_end|>\n<|im_end|>"
    prompt = chatml(("user", question)) + "<|im_start|>assistant\n"
    asked = prompt.replace(question, f"Be kind.\n\n{question}")
    for side in SIDES:
        text, ids = tiny.ROWS[3][side], found[f"{side}_ids"]
        assert ids.tolist() == own.tokenizer.encode(text + end)[0]
        scores = dict(zip(("asked", "coarse"), found[f"scores_{side}"], strict=True))
        np.testing.assert_allclose(scores["asked"], logps_of(own, asked, text + end)[1], atol=1e-4)
        # Another vocabulary: what closes has no number there, and the text keeps its sum.
        of_text, closing = np.split(scores["coarse"], [len(text)])
        np.testing.assert_allclose(
            of_text.sum(), logps_of(coarse, prompt, text)[1].sum(), rtol=1e-4
        )
        assert len(closing) == 3 and not closing.any()


def test_diff_is_the_weighting_of_that_name():
    rng = np.random.default_rng(0)
    pairs = [
        [rng.integers(0, 4, rng.integers(1, 13)).astype(np.int32) for _ in SIDES] for _ in range(80)
    ]
    tokens, others = (
        np.stack([np.pad(pair[k], (0, 13 - len(pair[k])), constant_values=-1) for pair in pairs])
        for k in (0, 1)
    )
    want = weighting.diff(
        weighting.ResponseTokens.of(tokens >= 0, tokens_BT=tokens, partner_tokens_BT=others)
    )
    for (own, other), of_pair in zip(pairs, want, strict=True):
        np.testing.assert_array_equal(scorers.diff(own, other), of_pair[: len(own)])


def test_a_plugin_scores_and_is_computed_again_when_its_file_changes(inputs, tmp_path, monkeypatch):
    plugin = tmp_path / "mine.py"
    source = (
        "from attnpo_jax import scorers\n"
        "@scorers.register\n"
        "def place(tokens, others, *, scale: float = 1.0):\n"
        "    return [scale * i + len(others) for i in range(len(tokens))]\n"
    )
    plugin.write_text(source)
    named = {"p": {"function": "place", "scale": 0.5}}
    config = config_with(inputs, named, plugins=(str(plugin),))
    found = run(config, tmp_path / "work")[3]
    n, m = len(found["chosen_ids"]), len(found["rejected_ids"])
    np.testing.assert_array_equal(found["scores_chosen"], [[i / 2 + m for i in range(n)]])
    np.testing.assert_array_equal(found["scores_rejected"], [[i / 2 + n for i in range(m)]])
    before = scorers.identity("place")
    plugin.write_text(source.replace("scale * i", "scale * i * i"))
    assert scorers.identity("place") != before

    def wrong(tokens, others):
        return np.full(len(tokens), np.nan)

    with pytest.raises(RegistryError, match="scorer x: .*not all finite; accepted: finite numbers"):
        scorers.score(wrong, (np.arange(3), np.arange(2)), "scorer x")


# --- What is computed -----------------------------------------------------------------------------


def files_of(workdir):
    return {p: p.stat().st_mtime_ns for p in (workdir / "prepared").rglob("*") if p.is_file()}


def test_a_scorer_more_is_computed_alone_and_one_less_is_nothing(inputs, tmp_path, passed):
    judged = {"judge__layers": (0, 2), "weighting__name": "attention"}
    run(config_with(inputs, {}, **judged), tmp_path)
    assert {kind: len(ids) for kind, ids in passed.items()} == {"judge": 6, "reference": 6}
    before = files_of(tmp_path)

    def again(named, **changes):
        for ids in passed.values():
            ids.clear()
        dataset = run(config_with(inputs, named, **(judged | changes)), tmp_path)
        return dataset, {kind: len(ids) for kind, ids in passed.items()}

    one = {"kind": {"prefix": "Be kind."}}
    assert again(one)[1] == {"judge": 0, "reference": 6}
    two = one | {"new": {"function": "diff"}}
    dataset, counts = again(two)
    assert counts == {"judge": 0, "reference": 0} and dataset.scorers == ("kind", "new")
    both = dataset[0]["scores_chosen"]
    # Under other names, and fewer: nothing is computed.
    dataset, counts = again({"a": two["new"], "b": two["kind"]})
    assert counts == {"judge": 0, "reference": 0} and dataset.scorers == ("a", "b")
    np.testing.assert_array_equal(dataset[0]["scores_chosen"], both[::-1])
    dataset, counts = again({})
    assert counts == {"judge": 0, "reference": 0} and "scores_chosen" not in dataset[0]
    # Another meaning of a name is computed beside the first one's.
    dataset, counts = again({"kind": {"prefix": "Be rude."}})
    assert counts == {"judge": 0, "reference": 6}
    assert np.abs(dataset[0]["scores_chosen"][0] - both[0]).max() > 1e-3
    assert again(one)[1] == {"judge": 0, "reference": 0}
    now = files_of(tmp_path)
    assert {path: now[path] for path in before} == before


def test_more_layers_serve_who_asks_for_fewer_bit_for_bit(inputs, tmp_path, passed):
    def weights(config, workdir):
        dataset = run(config, workdir)
        batch = jax.tree.map(lambda x: x[0], EvalBatches(dataset, batch_size=6)[0])
        return dataset, batch

    both = {"judge__layers": (0, 2), "weighting__name": "attention"}
    named = {"new": {"function": "diff"}}
    run(config_with(inputs, named, **both), tmp_path / "both")
    for ids in passed.values():
        ids.clear()
    few = both | {"judge__layers": (2,), "judge__verdict": False}
    dataset, batch = weights(config_with(inputs, {}, **few), tmp_path / "both")
    assert passed == {"judge": [], "reference": []}
    alone, wanted = weights(config_with(inputs, {}, **few), tmp_path / "alone")
    assert dataset.source_layers == alone.source_layers == (2,)
    for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_array_equal(a, b)
    # A checkpoint of either continues on the other.
    assert dataset.identity == alone.identity
    # Without a judge there is nothing of it.
    dataset = run(config_with(inputs, {}), tmp_path / "both")
    assert dataset.source_layers == () and "judge_chosen" not in dataset[0]
    assert len(passed["judge"]) == 6


@pytest.mark.process
def test_a_kill_in_the_middle_of_a_scorers_pass_loses_less_than_a_shard(inputs, tmp_path, passed):
    named = {"kind": {"prefix": "Be kind."}}
    config = config_with(inputs, named)
    run(config, tmp_path / "undisturbed")
    run(config_with(inputs, {}), tmp_path / "killed")
    for ids in passed.values():
        ids.clear()
    command = [sys.executable, "-m", "tests.prepare.test_scorers", inputs, tmp_path / "killed"]
    output, code = forked.run(command, os.environ)
    assert code == -signal.SIGKILL, output

    def shards(workdir):
        (folder,) = (workdir / "prepared" / "train" / "columns").iterdir()
        return {f.name: f.read_bytes() for f in sorted(folder.glob("*.arrow"))}

    first = shards(tmp_path / "killed")
    assert list(first) == ["data-00000-of-00003.arrow"]
    with pytest.raises(FileNotFoundError, match="columns of the scorer 'kind'"):
        Run.resolve(config, tmp_path / "killed").open_prepared("train")
    run(config, tmp_path / "killed")
    assert passed == {"judge": [], "reference": ["row-2", "row-3", "row-4", "row-5"]}
    assert shards(tmp_path / "killed") == shards(tmp_path / "undisturbed")


def _prepare_and_die(inputs, workdir):
    """Dies when the scorer's second shard is written whole, before it gets its name."""
    original, renamed = os.replace, []

    def replace(source, target):
        if str(target).endswith(".arrow"):
            renamed.append(target)
            if len(renamed) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
        original(source, target)

    atomic.os.replace = replace
    named = {"kind": {"prefix": "Be kind."}}
    prepare(Run.resolve(config_with(pathlib.Path(inputs), named), workdir))


if __name__ == "__main__":
    _prepare_and_die(*sys.argv[1:])
