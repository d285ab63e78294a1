"""`train.evaluations`: the policy in training is evaluated as its checkpoint is afterwards."""

import json

import pytest
from rich.console import Console

from attnpo_jax import evaluate, prepare, train
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import UsageError
from tests import tiny

QUIET = Console(quiet=True)


@pytest.mark.parametrize(
    "changes", [{"lora__rank": 2}, {"parallel__backend": "pmap"}], ids=["lora", "pmap"]
)
def test_figures_are_those_of_the_checkpoint(tmp_path, changes):
    """`pairs` passes over rows and `versus` samples and judges: with adapters, and with pmap."""
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, train__steps=2, optim__learning_rate=0.05, **changes)
    config.evaluate.versus.max_new_tokens, config.evaluate.versus.judge = 5, "trained"
    config.train.evaluations.names = names = ("pairs", "versus")
    workdir = tmp_path / "work"
    run = Run.resolve(config, workdir)
    prepare.prepare(run, console=QUIET)
    train.train(run, console=QUIET)
    for name in names:
        # Its settings and the model's digest are the same, so that it is taken for finished.
        [kept] = evaluate.evaluate(Run.resolve(config, workdir), name=name, console=QUIET)
        out = tmp_path / name
        [again] = evaluate.evaluate(Run.resolve(config, workdir), name=name, out=out, console=QUIET)
        assert kept.model == again.model == "step-2"
        assert len(kept.result.rows) == 2
        for row, other in zip(kept.result.rows, again.result.rows, strict=True):
            assert row.keys() == other.keys()
            for field, value in row.items():
                if isinstance(value, (float, list)):
                    value, other[field] = (pytest.approx(value, abs=1e-4), other[field])
                assert other[field] == value, field
    margins = [row["margin"] for row in json_rows(workdir / "evaluations/pairs/step-2.rows.jsonl")]
    assert all(abs(margin) > 1e-3 for margin in margins), "it has learned nothing"


def json_rows(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_pairs_are_missed_before_anything_is_trained(tmp_path):
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, data__eval="")
    config.train.evaluations.names = ("pairs",)
    run = Run.resolve(config, tmp_path / "work")
    prepare.prepare(run, console=QUIET)
    with pytest.raises(UsageError, match="train.evaluations.names: 'pairs', but config.data.eval"):
        train.train(run, console=QUIET)
    assert not (tmp_path / "work" / "checkpoints").exists()
