"""A sweep over a tiny random model, judged, prepared and trained for real."""

import importlib.util
import io
import json
import pathlib
import sys

import pytest
from rich.console import Console

from attnpo_jax.config import ConfigError
from attnpo_jax.runtime import exit_codes
from attnpo_jax.runtime.errors import UsageError
from tests import tiny

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = """
from attnpo_jax.config import default_config

def get_config():
    config = default_config()
    config.model.source = {model!r}
    config.data.train = config.data.eval = {data!r}
    config.data.num_buckets = config.judge.num_buckets = 1
    config.train.batch_size = config.train.microbatch_size = 2
    config.optim.learning_rate = 1e-2
    config.log.progress = False
    return config
"""


@pytest.fixture(scope="module")
def sweep():
    spec = importlib.util.spec_from_file_location("sweep", ROOT / "launch" / "sweep.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["sweep"] = module  # where dataclasses look it up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def config_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    shape = tiny.HF_CONFIG | {
        "vocab_size": 258,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    tokenizer = tiny.byte_tokenizer(use_regex=True, eos_token="<|im_end|>")
    model = tiny.write_model(folder, shape, tokenizer)
    pairs = [
        {"prompt": f"Spell {word}.", "chosen": word, "rejected": word[::-1]}
        for word in ("house", "river", "cloud", "stone")
    ]
    data = folder / "pairs.json"
    data.write_text(json.dumps(pairs))
    config = folder / "tiny.py"
    config.write_text(CONFIG.format(model=str(model), data=str(data)))
    return str(config)


def test_grid_has_every_combination_and_keeps_what_is_not_swept(sweep, config_file):
    axes = ["weighting.name=attention,uniform", "objective.beta=0.1,0.5"]
    runs = sweep.grid(config_file, axes, ["--config.train.epochs=3"])
    assert [(r.config.weighting.name, r.config.objective.beta) for r in runs] == [
        ("attention", 0.1), ("attention", 0.5), ("uniform", 0.1), ("uniform", 0.5),
    ]  # fmt: skip
    assert runs[0].name == "weighting.name=attention,objective.beta=0.1"
    shaped = sweep.grid(config_file, ["shaping.mix=0.0,0.5", "shaping.floor=None,0.1"])
    assert [(r.config.shaping.mix, r.config.shaping.floor) for r in shaped] == [
        (0.0, None), (0.0, 0.1), (0.5, None), (0.5, 0.1),
    ]  # fmt: skip
    assert {(r.config.train.epochs, r.config.optim.learning_rate) for r in runs} == {(3, 1e-2)}


@pytest.mark.process
def test_prepares_once_trains_each_point_ranks_and_does_not_repeat(
    sweep, config_file, tmp_path, monkeypatch
):
    runs = sweep.grid(config_file, ["weighting.name=attention,uniform"])
    trained = []
    train = sweep.train.train

    def counted(run, console):
        trained.append(run.workdir.name)
        if len(trained) == 2:
            raise KeyboardInterrupt
        train(run, console=console)

    monkeypatch.setattr(sweep.train, "train", counted)
    console = Console(file=io.StringIO(), width=200)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep(runs, tmp_path, console)
    outcomes = sweep.sweep(runs, tmp_path, console)

    names = [run.name for run in runs]
    assert trained == [names[0], names[1], names[1]]
    prepared = tmp_path / "prepared"
    assert all((tmp_path / "runs" / name / "prepared").samefile(prepared) for name in names)
    # What a run reports of itself is what the ranking shows.
    accuracies = [outcome.evaluation["eval_rewards/accuracies"] for outcome in outcomes]
    assert accuracies == sorted(accuracies, reverse=True)
    for outcome in outcomes:
        lines = (tmp_path / "runs" / outcome.point.name / "metrics.jsonl").read_text().splitlines()
        last = json.loads(lines[-1])
        assert {name: last[name] for name in last if name not in ("line", "check")} == (
            outcome.evaluation
        )
    # Uniform weights make no difference between weighted and plain; attention does.
    same = {
        outcome.point.name: outcome.evaluation["eval_rewards/margins"]
        == pytest.approx(outcome.evaluation["eval_rewards/weighted_margins"])
        for outcome in outcomes
    }
    assert [same[name] for name in names] == [False, True]
    console.print(sweep.ranking(outcomes))
    assert "uniform" in console.file.getvalue()


def test_a_run_that_diverges_is_listed_last_and_the_others_go_on(
    sweep, config_file, tmp_path, monkeypatch, capsys
):
    def train(run, console):
        if run.config.objective.beta == 0.1:
            raise sweep.NonFiniteError(3, {"loss": float("nan"), "grad_norm": 1.0}, ["p"], 2)
        line = {"step": 2} | dict.fromkeys(sweep.COLUMNS.values(), 0.75)
        (run.workdir / "metrics.jsonl").write_text(json.dumps(line) + "\n")

    monkeypatch.setattr(sweep.train, "train", train)
    monkeypatch.setattr(sweep.prepare, "prepare", lambda *_, **__: None)
    arguments = [f"--config={config_file}", f"--workdir={tmp_path}"]
    assert sweep.main([*arguments, "--set", "objective.beta=0.1,0.5"]) == 1
    printed = capsys.readouterr().out
    assert printed.index("0.7500") < printed.index("stopped") < printed.index("step 3: loss is nan")


def test_what_stops_a_sweep_is_told_as_attnpo_tells_it(
    sweep, config_file, tmp_path, capsys, monkeypatch
):
    arguments = [f"--config={config_file}", "--set", "seed=1,2"]
    assert sweep.main([*arguments, "--workdir=gs://bucket/x"]) == exit_codes.USAGE
    assert "sweep: error: --workdir=gs://bucket/x" in capsys.readouterr().err
    # An error of the package that is no OSError and has no class of its own in the sweep.
    mesh = "--config.parallel.mesh.fsdp=3"
    assert sweep.main([*arguments, f"--workdir={tmp_path}", mesh]) == exit_codes.FAILED
    assert "sweep: error: parallel.mesh.data = -1" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert sweep.main([*arguments, f"--workdir={tmp_path}"]) == exit_codes.USAGE
    assert "a sweep runs in one" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        (["data.max_length=64,128"], "share one prepared dataset"),
        (["objective.beta"], "FIELD=VALUE,VALUE"),
        (["objective.beta="], "FIELD=VALUE,VALUE"),
        (["objective.beta=0.1,0.1"], "a value is there twice"),
        (["objective.beta=0.1", "objective.beta=0.2"], "--set objective.beta is there twice"),
        (["objective.gamma=1,2"], "config.objective.gamma: unknown field"),
    ],
)
def test_axes_that_cannot_be_swept(sweep, config_file, axes, message):
    with pytest.raises(UsageError, match=message):
        sweep.grid(config_file, axes)


def test_every_point_is_checked_before_anything_runs(sweep, config_file, tmp_path):
    with pytest.raises(ConfigError, match=r"objective.beta = -1.0"):
        sweep.grid(config_file, ["objective.beta=0.1,-1.0"])
    with pytest.raises(ConfigError, match=r"data.eval"):
        sweep.grid(config_file, ["seed=1,2"], ["--config.data.eval="])
    runs = sweep.grid(config_file, ["weighting.layer=0,5"])
    with pytest.raises(ConfigError, match="layer 5"):
        sweep.sweep(runs, tmp_path / "work", Console(file=io.StringIO()))
    assert not (tmp_path / "work").exists()


def test_values_with_commas_of_their_own(sweep):
    assert sweep.parse_axis("weighting.layer=-1,(0,1),[2, 3]") == (
        "weighting.layer", ["-1", "(0,1)", "[2, 3]"],
    )  # fmt: skip
