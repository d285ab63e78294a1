"""Sweeps over a tiny random model, judged, prepared, trained and evaluated for real."""

import csv
import io
import json
import os
import pathlib
import re

import pytest
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import prepare, report, train
from attnpo_jax.config import ConfigError
from attnpo_jax.evaluate import evaluator
from attnpo_jax.evaluate.evaluator import Evaluator, Figure, Result
from attnpo_jax.run import Run
from attnpo_jax.runtime import exit_codes, metrics
from attnpo_jax.runtime.errors import UsageError, UserError
from attnpo_jax.runtime.lock import LockedError
from attnpo_jax.sweep import at_once, running, stage
from attnpo_jax.sweep.stage import RunsFailed, sweep
from attnpo_jax.train.hooks import NonFiniteError
from tests import tiny

VARIANTS = [
    "dpo=weighting.name=uniform",
    "attention=",
    "first=weighting.layer=0 objective.beta=0.5",
]
SEEDS = ["seed=0,1,2"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    tiny.write_small_inputs(folder)
    return folder


def run_of(inputs, workdir, **changes):
    small = {"train__batch_size": 2, "train__microbatch_size": 2, "train__steps": 2}
    small |= {"optim__learning_rate": 1e-2, "optim__warmup_ratio": 0.0}
    return Run.resolve(tiny.small_config(inputs, **(small | changes)), workdir)


def quiet():
    return Console(file=io.StringIO(), width=200)


@pytest.mark.process
def test_three_seeds_of_three_variants_killed_once_and_resumed(inputs, tmp_path, monkeypatch):
    prepared, trained = [], []
    of_prepare, of_train = prepare.prepare, train.train

    def counted_prepare(run, **options):
        prepared.append(run.workdir)
        of_prepare(run, **options)

    def counted(run, **options):
        trained.append(run.workdir.name)
        if len(trained) == 5:
            raise KeyboardInterrupt
        of_train(run, **options)

    monkeypatch.setattr(prepare, "prepare", counted_prepare)
    monkeypatch.setattr(train, "train", counted)
    run, console = run_of(inputs, tmp_path), quiet()
    with pytest.raises(KeyboardInterrupt):
        sweep(run, axes=SEEDS, variants=VARIANTS, console=quiet())
    outcomes = sweep(run, axes=SEEDS, variants=VARIANTS, checkpoints="drop", console=console)

    names = [f"{v},seed={s}" for v in ("dpo", "attention", "first") for s in range(3)]
    assert [outcome.point.name for outcome in outcomes] == names
    assert trained == [*names[:5], *names[4:]] and set(prepared) == {tmp_path}
    folders = [tmp_path / "runs" / name for name in names]
    assert all((one / "prepared").samefile(tmp_path / "prepared") for one in folders)
    assert not any(list((one / "checkpoints").glob("[0-9]*")) for one in folders)
    # What a run reports of itself is what the results have.
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row, folder in zip(rows, folders, strict=True):
        last = metrics.read(folder)[-1]
        assert row["figures"]["loss"] == last["eval_loss"]
        for name, of in (("accuracy", "accuracies"), ("margin", "margins")):
            assert row["figures"][f"pairs/{name}"] == pytest.approx(last[f"eval_rewards/{of}"])
    assert len({row["figures"]["pairs/margin"] for row in rows}) == len(rows)
    lines = {
        line["group"]: line
        for line in map(json.loads, (tmp_path / "comparison.jsonl").read_text().splitlines())
        if line["figure"] == "pairs/margin"
    }
    by_name = {row["run"]: row["figures"]["pairs/margin"] for row in rows}
    gain = sum(by_name[f"first,seed={s}"] - by_name[f"dpo,seed={s}"] for s in range(3)) / 3
    assert lines["first"]["difference"]["value"] == pytest.approx(gain)
    assert lines["first"]["seeds"] == 3 and lines["dpo"]["difference"] is None
    text = console.file.getvalue()
    assert "pairs/accuracy" in text and "differences to 'dpo', paired" in text

    # All is known now: nothing is done for tables of it, with another baseline.
    monkeypatch.setattr(train, "train", None)
    console = quiet()
    sweep(run, axes=SEEDS, variants=VARIANTS, baseline="first", console=console)
    assert "differences to 'first'" in console.file.getvalue()
    sweep(run, axes=SEEDS, variants=VARIANTS[:1], only_show=True, console=quiet())
    assert len((tmp_path / "results.jsonl").read_text().splitlines()) == 3


def test_runs_that_fail_are_told_of_and_tried_again_and_the_others_go_on(
    inputs, tmp_path, monkeypatch
):
    failures = {"0.1": NonFiniteError(3, {"loss": float("nan"), "grad_norm": 1.0}, ["p"], 2)}
    failures["0.2"] = AttributeError("a bug")

    def fake(run, point):
        if error := failures.get(point.values["objective.beta"]):
            raise error
        (run.workdir / running.RESULT).write_text(
            json.dumps({"config": running._config_of(point), "step": 2, "loss": 0.5}
                       | {"evaluations": []})
        )  # fmt: skip

    monkeypatch.setattr(running, "_train_and_evaluate", fake)
    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: None)
    run, console = run_of(inputs, tmp_path), quiet()
    axes = ["objective.beta=0.1,0.2,0.3"]
    with pytest.raises(RunsFailed, match=r"2 of 3 runs failed, the first one objective.beta=0.1"):
        sweep(run, axes=axes, console=console)
    assert "objective.beta=0.1: failed: step 3: loss is nan" in console.file.getvalue()
    shown = [one.failed for one in sweep_shown(run, axes)]
    assert shown[1:] == ["a bug", None]
    # One task of an array fails alone.
    with pytest.raises(RunsFailed, match="1 of 1 runs failed"):
        stage._one(run, stage.grid(run.config, axes), 1, "keep", quiet())
    failures.clear()
    assert [one.failed for one in sweep(run, axes=axes, console=quiet())] == [None] * 3


def test_the_page_of_all_runs_is_told_of(inputs, tmp_path, monkeypatch):
    def at_end(run, of_sweep):
        assert of_sweep and (run.workdir / "results.jsonl").is_file()
        return run.workdir / "report.html"

    outcome = running.Outcome(stage.grid(run_of(inputs, tmp_path).config, ["seed=0"])[0], 2, 0.5)
    monkeypatch.setattr(report, "at_end", at_end)
    monkeypatch.setattr(stage, "outcome_of", lambda *_: outcome)
    console = quiet()
    sweep(run_of(inputs, tmp_path), axes=["seed=0"], only_show=True, console=console)
    assert f"report: {tmp_path / 'report.html'}\n" in console.file.getvalue()


def sweep_shown(run, axes):
    console = quiet()
    with pytest.raises(RunsFailed):
        sweep(run, axes=axes, only_show=True, console=console)
    return [running.outcome_of(run.workdir, point) for point in stage.grid(run.config, axes)]


def test_other_evaluations_are_columns_and_the_best_checkpoint_is_what_counts(
    inputs, tmp_path, monkeypatch
):
    def count(task):
        return Result([], {"layers": Figure(float(task.sampled().model.config.num_layers))})

    monkeypatch.setitem(evaluator._registered, "layers", Evaluator("layers", count))
    best = {"train__keep_best": "max:eval_loss", "train__eval_every": 1, "train__steps": 3}
    run = run_of(inputs, tmp_path, evaluate__names=("layers",), **best)
    (outcome,) = sweep(run, axes=["seed=1"], checkpoints="best", console=quiet())
    folder = tmp_path / "runs" / "seed=1"
    losses = {
        line["step"]: line["eval_loss"] for line in metrics.read(folder) if "eval_loss" in line
    }
    assert outcome.step == max((1, 2, 3), key=losses.get) and outcome.loss == losses[outcome.step]
    assert [one.name for one in (folder / "checkpoints").glob("[0-9]*")] == [str(outcome.step)]
    assert outcome.evaluations["layers"].result.figures["layers"].value == 3
    with (tmp_path / "results.csv").open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert (row["layers/layers"], row["step"]) == ("3.0", str(outcome.step))


def test_an_array_s_task_does_its_run_alone(inputs, tmp_path, monkeypatch):
    done = []
    monkeypatch.setattr(
        stage, "run_point", lambda _, point: done.append(point.name) or running.Outcome(point, 1)
    )
    states = iter([False, False, True])
    monkeypatch.setattr(stage, "_is_prepared", lambda _: next(states, True))
    monkeypatch.setattr(stage, "_WAIT_SECONDS", 0)

    def locked(*_, **__):
        raise stage.LockedError("by another task")

    monkeypatch.setattr(prepare, "prepare", locked)
    run = run_of(inputs, tmp_path)
    (outcome,) = sweep(run, axes=SEEDS, variants=VARIANTS, index=4, console=quiet())
    assert done == ["attention,seed=1"] == [outcome.point.name]
    with pytest.raises(UsageError, match="--index=9; accepted: 0 to 8"):
        sweep(run, axes=SEEDS, variants=VARIANTS, index=9, console=quiet())


def test_what_is_wrong_with_a_sweep_is_told_before_anything_is_written(inputs, tmp_path):
    run = run_of(inputs, tmp_path / "work")
    for options, error, message in (
        ({"axes": ["weighting.layer=0,1"]}, ConfigError, "layer 1"),
        ({"axes": SEEDS, "checkpoints": "some"}, UsageError, "accepted: keep, drop, best"),
        ({"axes": SEEDS, "checkpoints": "best"}, UsageError, "has no config.train.keep_best"),
        ({"axes": SEEDS, "baseline": "x"}, UsageError, "accepted: as the config says"),
        ({"axes": SEEDS[:1], "variants": ["a=", "b=", "c=x.y=1"]}, UsageError, "c: x.y: all runs"),
        ({"variants": ["a=", "a,b="]}, UsageError, "NAME="),
        ({"axes": ["seed=1,01"]}, UsageError, "has the seed 1 too"),
        ({"axes": SEEDS, "metrics": ["checks/x"]}, UsageError, "figure of pairs"),
    ):
        with pytest.raises(error, match=message):
            sweep(run, **options, console=quiet())
    names = run_of(inputs, tmp_path / "work", evaluate__names=("nothing",))
    with pytest.raises(UsageError, match="no evaluation 'nothing'"):
        sweep(names, axes=SEEDS, console=quiet())
    assert not (tmp_path / "work").exists()


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_second_sweep_at_the_same_time_changes_nothing(inputs, tmp_path, at_once):
    first, second = (run_of(inputs, tmp_path / "work", seed=seed) for seed in (0, 1))
    with first.writing():
        (tmp_path / "work" / "config.json").write_text("{}")
        with pytest.raises(LockedError, match="is being written by"):
            sweep(second, axes=SEEDS, at_once=at_once, console=quiet())
        assert (tmp_path / "work" / "config.json").read_text() == "{}"


def test_runs_at_once_are_done_by_processes_after_the_prepared_set(inputs, tmp_path, monkeypatch):
    asked = {}

    def run_all(setup, tasks, most, ended, first):
        asked.update(setup=setup, most=most, first=first, tasks=tasks)
        for task in tasks:
            # The set is there, and the runs are not: their processes are killed.
            ended(task.name, *((None, None) if task.name == "prepare" else ("", -9)))

    monkeypatch.setattr(at_once, "run_all", run_all)
    run, console = run_of(inputs, tmp_path), quiet()
    with pytest.raises(RunsFailed, match=r"2 of 2 .* ended with code -9, see .*log.txt"):
        sweep(run, axes=["seed=0,1"], variants=["a="], at_once=2, console=console)
    assert (asked["most"], asked["first"]) == (2, "prepare")
    assert [(task.name, task.kind) for task in asked["tasks"]] == [
        ("prepare", ""), ("0", "a"), ("1", "a"),
    ]  # fmt: skip
    assert asked["tasks"][2].log == tmp_path / "runs" / "a,seed=1" / "log.txt"
    assert asked["setup"] | {"level": ""} == {
        "config": str(tmp_path / "config.json"), "workdir": str(tmp_path), "level": "",
        "axes": ["seed=0,1"], "variants": ["a="],
    }  # fmt: skip
    assert not config_lib.diff(config_lib.load_config(asked["setup"]["config"]), run.config)
    assert "[2/2] a,seed=1: failed: its process ended" in console.file.getvalue()

    def fails(setup, tasks, most, ended, first):
        ended("prepare", "the disk is full", None)

    monkeypatch.setattr(at_once, "run_all", fails)
    with pytest.raises(UserError, match="preparing failed: the disk is full"):
        sweep(run, axes=["seed=0,1"], at_once=2, console=quiet())


@pytest.mark.process
def test_a_process_prepares_and_does_a_run(inputs, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(prepare, "prepare", None)
    monkeypatch.setattr(train, "train", None)  # it is not this one that does anything
    caplog.set_level("INFO", "attnpo_jax")  # of the process too
    console = quiet()
    run = run_of(inputs, tmp_path, train__steps=1)
    (outcome,) = sweep(run, axes=["seed=3"], at_once=2, checkpoints="drop", console=console)
    assert (outcome.failed, outcome.step) == (None, 1)
    assert "[1/1] seed=3: done" in console.file.getvalue()
    folder = tmp_path / "runs" / "seed=3"
    assert re.search(r"^\d\d:\d\d:\d\d INFO step 1/1 ", (folder / "log.txt").read_text(), re.M)
    assert "prepared: train" in (tmp_path / "prepare.log").read_text()
    assert not list((folder / "checkpoints").glob("[0-9]*"))
    assert not list(tmp_path.rglob(".attnpo.lock"))
    # What is kept of finished runs may be asked for later.
    assert sweep(run, axes=["seed=3"], at_once=2, console=quiet()) == [outcome]


def test_what_stops_a_sweep_is_told_as_others_are(inputs, tmp_path, capsys, monkeypatch):
    root = pathlib.Path(__file__).parents[2]
    monkeypatch.syspath_prepend(root / "launch")
    import sweep as door

    config = tmp_path / "config.json"
    config.write_text(config_lib.to_json(run_of(inputs, tmp_path).config))
    arguments = [f"--config={config}", "--set", "seed=1,2"]
    assert door.main([*arguments, "--workdir=gs://bucket/x"]) == exit_codes.USAGE
    assert "attnpo: error: --workdir=gs://bucket/x" in capsys.readouterr().err
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert door.main([*arguments, f"--workdir={tmp_path}"]) == exit_codes.USAGE
    assert "a sweep runs in one" in capsys.readouterr().err
    assert "prepared" not in os.listdir(tmp_path)
