"""The embedded model against figures from PyTorch: judge weights, logits, and a training run.

`goldens/` holds what transformers and the method's public PyTorch code gave on the same weights.
"""

import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from attnpo_jax import losses, weighting
from attnpo_jax.config import default_config
from attnpo_jax.data.batching import Example, RowShape, TrainBatches, fill_rows
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.prepared_writer import PreparedWriter
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import tokenize_pair
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import load_model
from attnpo_jax.models import decoder
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.scoring import response_logps
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel.state import create
from attnpo_jax.train import optim
from attnpo_jax.train.step import make_train_step

pytestmark = pytest.mark.golden

GOLDENS = pathlib.Path(__file__).parent / "goldens"
LAYERS = (0, 6, 14, 21, 29)


@pytest.fixture(scope="module")
def model(smollm2_folder):
    return load_model(str(smollm2_folder))


@pytest.fixture(scope="module")
def pairs():
    return load_pairs(str(GOLDENS / "judge_weights.jsonl")).pairs


@pytest.fixture(scope="module")
def tokenized(model, pairs):
    return [
        tokenize_pair(model.tokenizer, pair, max_length=2048, max_prompt_length=1800)
        for pair in pairs
    ]


@pytest.fixture(scope="module")
def bucketed(model, pairs, tokenized):
    return Judge(model, source_layers=LAYERS).judge(pairs, tokenized)


def golden_weights():
    lines = (GOLDENS / "judge_weights.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_weights_are_golden(model, tokenized, judgements, places):
    rows = golden_weights()
    letters = model.tokenizer.tokenizer
    for i, judgement in zip(places, judgements, strict=True):
        golden, pair = rows[i], tokenized[i]
        for side, attention in (("chosen", judgement.chosen), ("rejected", judgement.rejected)):
            ids = getattr(pair, f"{side}_ids")[: getattr(pair, f"{side}_text_length")]
            assert ids.tolist() == golden[f"{side}_tokens"]
            weights = (attention / attention.sum(axis=-1, keepdims=True)).mean(axis=0)
            for source, layer in enumerate(LAYERS):
                np.testing.assert_allclose(
                    weights[source],
                    golden[f"{side}_weights_{layer}"],
                    rtol=0,
                    atol=1e-5,
                    err_msg=f"pair {i}, {side}, layer {layer}",
                )
        answers = [letters.decode([int(token)]) for token in judgement.answer_ids]
        assert answers == [golden["cr_last_token"], golden["rc_last_token"]]
        # The log-odds agree with the verdict where that is a letter.
        for answer, chosen_letter, log_odds in zip(answers, "AB", judgement.verdict, strict=True):
            if answer in ("A", "B"):
                assert (log_odds > 0) == (answer == chosen_letter)


def test_judge_weights_in_buckets(model, tokenized, bucketed):
    assert_weights_are_golden(model, tokenized, bucketed, range(12))


def test_judge_weights_alone(model, pairs, tokenized):
    places = range(12)
    judge = Judge(model, source_layers=LAYERS, batch_size=1)
    assert_weights_are_golden(model, tokenized, judge.judge(pairs, tokenized), places)


def test_rollout_is_that_of_whole_attention_matrices(model, pairs, tokenized):
    """`rollout.json` says how its figures were made."""
    golden = json.loads((GOLDENS / "rollout.json").read_text())["weights"]
    places = [row["pair"] for row in golden]
    judge = Judge(model, source_layers=("rollout", 29))
    found = judge.judge([pairs[i] for i in places], [tokenized[i] for i in places])
    for judgement, row in zip(found, golden, strict=True):
        for side in ("chosen", "rejected"):
            # By order and source; sources are layers first.
            attention = getattr(judgement, side)[:, judge.source_layers.index("rollout")]
            weights = (attention / attention.sum(axis=-1, keepdims=True)).mean(axis=0)
            wanted = row[f"{side}_weights_attention_rollout"]
            np.testing.assert_allclose(weights, wanted, rtol=0, atol=1e-5)


def test_judge_weights_padded_to_2048(model, pairs, tokenized):
    places = (1, 10)  # the longest and the shortest
    judge = Judge(model, source_layers=LAYERS, batch_size=1)
    some = [pairs[i] for i in places]
    judge.fit([judge.prompter.build(pair) for pair in some], row_lengths=(2048,))
    found = judge.judge(some, [tokenized[i] for i in places])
    assert_weights_are_golden(model, tokenized, found, places)


# --- Logits -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def logits(model):
    """Logits of a token sequence, on one padded shape."""

    @jax.jit
    def run(params, tokens_BL):
        positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1]), tokens_BL.shape)
        # What follows a token does not change its logits.
        hidden = decoder.forward(
            model.config, params, tokens_BL, positions, jnp.ones_like(tokens_BL)
        )
        return hidden @ decoder.unembedding(params).T

    def logits(sequences):
        tokens = np.zeros((len(sequences), LENGTH), np.int32)
        for row, ids in zip(tokens, sequences, strict=True):
            row[: len(ids)] = ids
        return [
            np.asarray(x[: len(ids)])
            for x, ids in zip(run(model.params, tokens), sequences, strict=True)
        ]

    return logits


LENGTH = 128


def golden_logits():
    return json.loads((GOLDENS / "smollm2_logits.json").read_text())


def test_chat_prompts_and_their_logits(model, logits):
    rows = golden_logits()
    for row in rows:
        text = model.tokenizer.render(
            [{"role": "user", "content": row["user"]}], generation_prompt=True
        )
        assert list(model.tokenizer.encode(text)[0]) == row["input_ids"]
    for row, found in zip(rows, logits([row["input_ids"] for row in rows]), strict=True):
        last = found[-1]
        assert np.argsort(-last)[:8].tolist() == row["top_ids"]
        np.testing.assert_allclose(last[row["top_ids"]], row["top_logits"], rtol=0, atol=1e-3)
        logps = np.asarray(jax.nn.log_softmax(found, axis=-1))
        picked = logps[np.arange(len(found) - 1), row["input_ids"][1:]]
        np.testing.assert_allclose(picked, row["token_logps"], rtol=0, atol=1e-3)


def test_greedy_continuations(logits):
    rows = golden_logits()
    # One pass over prompt and continuation: by induction, each token is the argmax at the one
    # before it exactly where greedy decoding gives the continuation.
    sequences = [row["input_ids"] + row["greedy_24"] for row in rows]
    for row, found in zip(rows, logits(sequences), strict=True):
        start = len(row["input_ids"]) - 1
        greedy = found.argmax(axis=-1)[start : start + len(row["greedy_24"])]
        assert greedy.tolist() == row["greedy_24"]


# --- Training -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(model, tokenized, bucketed, tmp_path_factory):
    """The twelve pairs as a prepared dataset, as `prepare` would write it."""
    examples = [
        Example(
            i,
            t.prompt_ids,
            (t.chosen_ids, t.rejected_ids),
            (t.chosen_text_length, t.rejected_text_length),
        )
        for i, t in enumerate(tokenized)
    ]
    batch = fill_rows([[e] for e in examples], RowShape(224, 160, 96), num_sources=0)
    logps = jax.jit(functools.partial(response_logps, model.config))(model.params, batch)
    path = tmp_path_factory.mktemp("prepared") / "train"
    components = {"source_layers": list(LAYERS), "num_layers": model.config.num_layers}
    writer = PreparedWriter(path, components, len(tokenized), len(tokenized))
    writer.write(
        0,
        [
            {
                "id": t.id,
                "prompt_ids": t.prompt_ids,
                "chosen_ids": t.chosen_ids,
                "rejected_ids": t.rejected_ids,
                "chosen_text_length": t.chosen_text_length,
                "rejected_text_length": t.rejected_text_length,
                "judge_chosen": j.chosen,
                "judge_rejected": j.rejected,
                "judge_verdict": j.verdict,
                "ref_chosen_logps": np.asarray(logps[i, 0, 0, : len(t.chosen_ids)]),
                "ref_rejected_logps": np.asarray(logps[i, 0, 1, : len(t.rejected_ids)]),
            }
            for i, (t, j) in enumerate(zip(tokenized, bucketed, strict=True))
        ],
    )
    writer.finish({})
    return Prepared.open(path)


def test_six_steps_of_training(model, prepared):
    golden = json.loads((GOLDENS / "train_trajectory.json").read_text())
    config = default_config()
    config.optim.learning_rate = 1e-5
    config.optim.warmup_ratio = 1 / len(golden)
    batches = TrainBatches(
        prepared,
        batch_size=4,
        microbatch_size=4,
        shuffle=False,
        seed=0,
        epochs=2,
        num_buckets=1,
    )
    assert len(batches) == len(golden)
    schedule = optim.make_schedule(config.optim, len(golden))
    optimizer = optim.make_optimizer(config.optim, schedule)
    settings = StepSettings(
        model=model.config,
        weighting=functools.partial(weighting.get("attention"), layer=-1, fix_sink=True),
        objective=functools.partial(losses.get("sigmoid"), beta=0.1),
        beta=0.1,
        source_layers=prepared.source_layers,
        attention=implementations.BLOCKS,
    )
    step = jax.jit(make_train_step(settings, optimizer, schedule), donate_argnums=0)
    state = create(jax.tree.map(jnp.copy, model.params), optimizer)
    for i, want in enumerate(golden):
        state, metrics = step(state, batches[i])
        found = {name: float(value) for name, value in metrics.items() if value.ndim == 0}
        where = f"step {i + 1}: "
        close(found, want, "loss", where, relative=0.005)
        close(found, want, "learning_rate", where, relative=1e-5)
        close(found, want, "grad_norm", where, relative=0.01)
        weighted = [name for name in want if "/weighted_" in name]
        assert len(weighted) == 6
        for name in weighted:
            # While the policy is the reference, the sign of its rewards is a matter of rounding.
            if want["rewards/weighted_margins"] or not name.endswith("accuracies"):
                close(found, want, name, where, relative=0.01, absolute=0.01)


def close(found, want, name, where, *, relative, absolute=0.0):
    allowed = max(relative * abs(want[name]), absolute)
    assert abs(found[name] - want[name]) <= allowed, f"{where}{name} {found[name]}, {want[name]}"
