"""The evaluation `pairs` on a tiny model: its scores, its sources, its errors."""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import evaluate
from attnpo_jax import run as run_lib
from attnpo_jax.data.batching import EvalBatches
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.evaluate.pairs import scores
from attnpo_jax.generate import model as models
from attnpo_jax.models import decoder
from attnpo_jax.parallel.backend import Sharded
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metrics import read as read_metrics
from attnpo_jax.train.step import make_eval_step
from tests import tiny

QUIET = Console(quiet=True)
HELD_OUT = [row | {"subset": f"s{i % 2}"} for i, row in enumerate(tiny.ROWS)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, another model of the same tokenizer, and the evaluations of both."""
    folder = tmp_path_factory.mktemp("pairs")
    tiny.write_small_inputs(folder, held_out=HELD_OUT)
    shape = json.loads((folder / "model" / "config.json").read_text())
    change = functools.partial(tiny.larger, factor=5.0)
    tiny.write_model(folder / "other", shape, tiny.byte_tokenizer(), change)
    for model in ("base", str(folder / "other" / "model")):
        evaluate.evaluate(
            run_of(folder), name="pairs", model=model, label=label(model), console=QUIET
        )
    return folder


def label(model):
    return "base" if model == "base" else "other"


def config_of(folder, **changes):
    return tiny.small_config(folder, **{"train__eval_batch_size": 4} | changes)


def run_of(folder, **changes):
    return Run.resolve(config_of(folder, **changes), folder / "work")


def found(folder, name):
    of = folder / "work" / "evaluations" / "pairs"
    rows = [json.loads(line) for line in (of / f"{name}.rows.jsonl").read_text().splitlines()]
    return rows, json.loads((of / f"{name}.json").read_text())["figures"]


def test_the_reference_itself_ties_with_itself(folder):
    rows, figures = found(folder, "base")
    assert [row["id"] for row in rows] == [row["id"] for row in HELD_OUT]
    assert figures["ties"]["value"] == figures["weighted ties"]["value"] == 1
    assert figures["accuracy"]["value"] == 0
    assert abs(figures["KL a token, chosen"]["value"]) < 1e-9
    assert figures["Brier score"]["value"] == pytest.approx(0.25, abs=1e-5)


def test_scores_are_those_of_each_response_by_itself(folder):
    """One plain sequence at a time, with neither packing nor branches."""
    rows, figures = found(folder, "other")
    other = models.load(run_of(folder), str(folder / "other" / "model")).model
    dataset = Prepared.open(folder / "work" / "prepared" / "eval")
    beta = config_of(folder).objective.beta

    @functools.partial(jax.jit, static_argnums=0)
    def logits(length, tokens):
        places = jnp.arange(length)[None]
        hidden = decoder.forward(
            other.config, other.params, tokens[None], places, jnp.ones_like(places)
        )
        return hidden[0] @ decoder.unembedding(other.params).T

    for row, pair in zip(rows, dataset, strict=True):
        ratios = {}
        for side in ("chosen", "rejected"):
            prompt, response = pair["prompt_ids"], pair[f"{side}_ids"]
            tokens = (
                jnp.zeros(256, jnp.int32)
                .at[: len(prompt) + len(response)]
                .set(np.concatenate([prompt, response]))
            )
            logps = jax.nn.log_softmax(np.asarray(logits(256, tokens), np.float64))
            predicted = np.arange(len(prompt) - 1, len(prompt) + len(response) - 1)
            ratios[side] = np.asarray(logps)[predicted, response] - pair[f"ref_{side}_logps"]
            kl = np.mean(np.exp(-ratios[side]) - 1 + ratios[side])
            assert row[f"{side}_kl"] == pytest.approx(kl, rel=1e-3)
            assert row[f"{side}_log_ratio"] == pytest.approx(ratios[side].mean(), abs=1e-4)
        margin = beta * (ratios["chosen"].sum() - ratios["rejected"].sum())
        assert row["margin"] == pytest.approx(margin, rel=1e-3, abs=1e-4)
        assert row["accuracy"] == float(margin > 0)
        assert row["chosen_tokens"] == pair["chosen_text_length"]
    assert {row["accuracy"] for row in rows} == {0.0, 1.0}, "models too alike to test anything"
    mean = np.mean([row["accuracy"] for row in rows if row["subset"] == "s1"])
    assert figures["accuracy, s1"]["value"] == pytest.approx(mean)


def scored(folder, sampled, run):
    dataset = Prepared.open(folder / "work" / "prepared" / "eval")
    settings = config_lib.step_settings(run.config, sampled.model.config, (0, 2), "xla")
    options = {"batch_size": 4, "num_buckets": 1, "bar": False}
    return scores.score(sampled, settings, dataset, **options), settings, dataset


def test_on_a_mesh_and_in_training_they_are_the_same(folder):
    rows, _ = found(folder, "other")
    run = run_of(folder)
    sampled = models.load(run, str(folder / "other" / "model"))
    mesh = Sharded(sampled.model.config, {"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    placed = jax.device_put(sampled.model.params, mesh.parameter_shardings())
    model = dataclasses.replace(sampled.model, params=placed)
    spread = dataclasses.replace(sampled, model=model, backend=mesh)
    values, settings, dataset = scored(folder, spread, run)
    expected = [[row[name] for name in scores.FIELDS] for row in rows]
    np.testing.assert_allclose(values, expected, rtol=1e-3, atol=2e-5)
    batches = EvalBatches(dataset, batch_size=6, num_buckets=1)
    sums = jax.jit(make_eval_step(settings))(sampled.model.params, batches[0])
    for name, metric in scores._METRICS.items():
        mean = np.mean([row[name] for row in rows])
        assert float(sums[metric]) / 6 == pytest.approx(mean, rel=1e-3, abs=1e-5), name


def test_another_source_is_prepared_beside_the_figures(folder, tmp_path):
    """RewardBench's columns, in a Parquet file."""
    subsets = ["math-prm", "hep-cpp", "donotanswer"]
    rows = [
        row | {"id": i, "subset": subset, "chosen_model": "m", "rejected_model": "n"}
        for i, (row, subset) in enumerate(zip(tiny.ROWS, subsets, strict=False))
    ]
    source = tmp_path / "reward bench.parquet"
    pq.write_table(pa.Table.from_pylist(rows), source)
    config = config_of(folder)
    config.evaluate.pairs.source = str(source)
    out = tmp_path / "out"
    for _ in range(2):
        [one] = evaluate.evaluate(
            Run.resolve(config),
            name="pairs",
            model=str(folder / "other" / "model"),
            label="other",
            out=out,
            console=QUIET,
        )
        assert [row["id"] for row in one.result.rows] == ["0", "1", "2"]
        assert [row["subset"] for row in one.result.rows] == subsets
        (out / "other.json").unlink()
    prepared = list(out.glob("*/prepared/*"))
    assert [path.name for path in prepared] == ["eval"] and "reward-bench" in str(prepared[0])
    assert one.result.about == {"pairs of": str(source)}
    accuracies = [row["accuracy"] for row in one.result.rows]
    score = one.result.figures["RewardBench, Reasoning"].value
    assert score == pytest.approx(np.average(accuracies[:2], weights=[984, 164]))
    assert one.result.figures["accuracy, donotanswer"].value == accuracies[2]
    expected = [row["margin"] for row in found(folder, "other")[0][:3]]
    assert [row["margin"] for row in one.result.rows] == pytest.approx(expected, rel=1e-3)


def test_what_can_t_be_evaluated_is_told(folder, tmp_path):
    shape = json.loads((folder / "model" / "config.json").read_text())
    strange = tiny.byte_tokenizer(chat_template=tiny.CHATML.replace("assistant", "bot"))
    model = tiny.write_model(tmp_path / "strange", shape, strange)
    with pytest.raises(UserError, match="tokenizer or chat template is not that of"):
        evaluate.evaluate(run_of(folder), name="pairs", model=str(model), console=QUIET)
    config = config_of(folder)
    config.evaluate.pairs.subset = "failure"
    run = Run.resolve(config, folder / "work")
    with pytest.raises(UserError, match="example 1: no `failure`, which evaluate.pairs.subset"):
        evaluate.evaluate(run, name="pairs", model="base", label="x", console=QUIET)
    config = config_of(folder, data__eval="")
    with pytest.raises(UserError, match="config.data.eval names no pairs"):
        evaluate.evaluate(Run.resolve(config, tmp_path), name="pairs", model="base", console=QUIET)
    sampled = models.load(run_of(folder), "base")
    nan = jax.tree.map(lambda x: x * jnp.nan, sampled.model.params)
    broken = dataclasses.replace(sampled.model, params=nan)
    broken = dataclasses.replace(sampled, model=broken)
    with pytest.raises(UserError, match="of 6 of 6 pairs are no numbers.*the first one row-0"):
        scored(folder, broken, run_of(folder))


def test_figures_of_other_rewards_are_not_taken_for_these(folder):
    run = run_of(folder, objective__beta=0.5)
    with pytest.raises(evaluate.EvaluationMismatch, match="objective.beta = .*, now 0.5"):
        evaluate.evaluate(run, name="pairs", model="base", console=QUIET)


@pytest.mark.parametrize("rank", [0, 2])
def test_a_run_s_figures_are_those_of_its_own_evaluation(folder, tmp_path, rank):
    """While training, of the policy as it lies, adapters or not; at the end, of the checkpoint."""
    config = config_of(folder, train__steps=2, optim__learning_rate=0.05, lora__rank=rank)
    config.train.evaluations.names = config.evaluate.names = ("pairs",)
    workdir = tmp_path / "work"
    run_lib.run(Run.resolve(config, workdir), console=QUIET)
    lines = {}
    for line in read_metrics(workdir):
        lines.setdefault(line["step"], {}).update(line)
    for name in ("accuracy", "margin", "weighted accuracy", "weighted margin"):
        weighted, _, of = name.rpartition(" ")
        own = f"eval_rewards/{weighted}{'_' if weighted else ''}{_PLURALS[of]}"
        assert lines[2][f"eval_pairs/{name}"] == pytest.approx(lines[2][own], rel=1e-3), name
    of = workdir / "evaluations" / "pairs"
    in_training, base = (json.loads((of / f"{x}.json").read_text()) for x in ("step-2", "base"))
    [again] = evaluate.evaluate(
        Run.resolve(config, workdir), name="pairs", label="again", console=QUIET
    )
    for name, figure in in_training["figures"].items():
        assert again.result.figures[name].value == pytest.approx(figure["value"], rel=1e-2), name
    assert base["figures"]["ties"]["value"] == 1 and in_training["figures"]["ties"]["value"] < 1


_PLURALS = {"accuracy": "accuracies", "margin": "margins"}
