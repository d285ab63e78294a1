"""`attnpo evaluate` with an evaluation of a plugin: its files, resuming, training, `attnpo run`."""

import io
import json
import subprocess
import sys

import pytest
from rich.console import Console

from attnpo_jax import cli, evaluate, train
from attnpo_jax import run as run_lib
from attnpo_jax.evaluate import Evaluator, Result, figure, register
from attnpo_jax.evaluate.stage import evaluate_one
from attnpo_jax.generate import stage as generate
from attnpo_jax.parallel import preemption
from attnpo_jax.run import Run
from attnpo_jax.runtime.errors import Preempted, UsageError, UserError
from attnpo_jax.runtime.lock import LockedError
from attnpo_jax.runtime.metrics import read as read_metrics
from tests import tiny

QUIET = Console(quiet=True)
HOLDS = """
import sys
with lock.held(pathlib.Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
PLUGIN = """
from attnpo_jax.data.prompts import load_prompts
from attnpo_jax.evaluate import Evaluator, Figure, Result, figure, register

calls = []


def run(task):
    prompts, _ = load_prompts(task.run.config.data.eval)
    records = task.responses(prompts, max_new_tokens=6)
    calls.append(task.model)
    rows = [{"id": r["id"], "e": float("e" in r["response"])} for r in records]
    return Result(rows, {"with e": figure(rows, "e"), "none": Figure(float("nan"))}, {"asked": 2})


register(Evaluator("letters", run))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Inputs, the plugin, and a run that evaluates while it trains and at its end."""
    folder = tmp_path_factory.mktemp("evaluate")
    tiny.write_small_inputs(folder)
    (folder / "letters.py").write_text(PLUGIN)
    config = config_of(folder)
    config.train.evaluations.names, config.train.evaluations.every = ("letters",), 2
    config.evaluate.names = ("letters",)
    said = io.StringIO()
    run_lib.run(Run.resolve(config, folder / "work"), console=Console(file=said, width=150))
    (folder / "said.txt").write_text(said.getvalue())
    return folder


def config_of(folder, **changes):
    config = tiny.small_config(
        folder, **{"train__steps": 3, "optim__learning_rate": 0.05} | changes
    )
    config.plugins = (str(folder / "letters.py"),)
    return config


def read_json(file):
    return json.loads(file.read_text())


def lines_of(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_ends_with_both_models_side_by_side(folder):
    of = folder / "work" / "evaluations" / "letters"
    assert sorted(file.name for file in of.glob("*.json")) == [
        "base.json",
        "step-2.json",
        "step-3.json",
    ]
    said = (folder / "said.txt").read_text()
    for name in ("base", "step-3"):
        facts = read_json(of / f"{name}.json")
        assert facts["evaluation"] == "letters" and facts["about"] == {"asked": 2}
        assert facts["figures"]["none"]["value"] is None
        rows, samples = (lines_of(of / f"{name}.{kind}.jsonl") for kind in ("rows", "samples"))
        assert [row["e"] for row in rows] == [float("e" in one["response"]) for one in samples]
        mean = sum(row["e"] for row in rows) / 2
        found = facts["figures"]["with e"]
        assert (found["value"], found["count"], found["column"]) == (mean, 2, "e")
        assert found["low"] < mean < found["high"] or mean in (found["low"], found["high"])
        assert name in said
    assert f"rows, figures and samples in {folder / 'work' / 'evaluations'}" in said


def test_figures_of_training_are_metrics(folder):
    lines = [line for line in read_metrics(folder / "work") if "eval_letters/with e" in line]
    assert [line["step"] for line in lines] == [2, 3]
    for line in lines:
        facts = read_json(folder / f"work/evaluations/letters/step-{line['step']}.json")
        assert line["eval_letters/with e"] == facts["figures"]["with e"]["value"]


def test_the_policy_in_training_answers_as_its_checkpoint_does(folder, tmp_path):
    run = Run.resolve(config_of(folder, generate__max_new_tokens=6), folder / "work")
    path = generate.generate(run, out=tmp_path / "s.jsonl", console=QUIET)
    of_step = lines_of(folder / "work/evaluations/letters/step-3.samples.jsonl")
    assert [line | {"model": "work/step-3"} for line in of_step] == lines_of(path)
    (model,) = {line["model"] for line in of_step}
    assert model.startswith("work/step-3 (")


def test_what_is_finished_is_not_done_again_and_says_when_settings_differ(folder):
    from attnpo_jax.registry import load_plugins

    (plugin,) = load_plugins([folder / "letters.py"])
    before = len(plugin.calls)
    run = Run.resolve(config_of(folder), folder / "work")
    [again] = evaluate.evaluate(run, name="letters", console=QUIET)
    assert len(plugin.calls) == before
    assert again.model == "step-3" and again.result.rows
    # By another name it is the same model, which the file calls by its step.
    for name in ("trained@3", "trained@newest"):
        [same] = evaluate.evaluate(run, name="letters", model=name, console=QUIET)
        assert (same.model, same.settings) == ("step-3", again.settings)
    assert list(same.settings["sha256 of models"]) == ["trained@3"]
    assert len(plugin.calls) == before
    hot = Run.resolve(config_of(folder, generate__temperature=0.5), folder / "work")
    with pytest.raises(evaluate.EvaluationMismatch, match="generate.temperature = None, now 0.5"):
        evaluate.evaluate(hot, name="letters", console=QUIET)
    [other] = evaluate.evaluate(hot, name="letters", label="hot", console=QUIET)
    assert other.model == "hot" and len(plugin.calls) == before + 1


def test_told_to_stop_while_evaluating_it_goes_on(folder, tmp_path, monkeypatch):
    """The next run does it, and writes one line of metrics."""
    from attnpo_jax.generate import respond

    config = config_of(folder)
    config.train.evaluations.names = ("letters",)
    workdir = tmp_path / "work"
    (workdir).mkdir()
    (workdir / "prepared").symlink_to(folder / "work" / "prepared")
    answer = respond._sample

    def stops(*arguments):
        answer(*arguments)
        return [], True

    monkeypatch.setattr(respond, "_sample", stops)
    with pytest.raises(Preempted, match="step 3 of 3 is saved"):
        train.train(Run.resolve(config, workdir), console=QUIET)
    monkeypatch.undo()
    assert not any("eval_letters/with e" in line for line in read_metrics(workdir))
    for _ in range(2):
        train.train(Run.resolve(config, workdir), console=QUIET)
    lines = [line for line in read_metrics(workdir) if "eval_letters/with e" in line]
    assert [line["step"] for line in lines] == [3]
    rows = "evaluations/letters/step-3.rows.jsonl"
    assert (workdir / rows).read_text() == (folder / "work" / rows).read_text()


def test_all_processes_stop_when_one_is_told_to(folder, tmp_path, monkeypatch):
    """As where the first one alone asks a judge."""
    monkeypatch.setattr(preemption, "agreed", lambda stops: True)
    run = Run.resolve(config_of(folder, generate__max_new_tokens=6), folder / "work")
    mine = Evaluator("mine", lambda task: Result([{"id": "a"}], {}))
    subject = evaluate.Subject(run, "base")
    with pytest.raises(Preempted, match="told to stop while evaluating; the same command goes on"):
        evaluate_one(run, mine, subject, tmp_path, QUIET)
    assert not list(tmp_path.iterdir())


def test_a_folder_is_written_by_one_run_at_a_time(folder, tmp_path):
    """Without a workdir, too."""
    run = Run.resolve(config_of(folder))
    script = f"import pathlib, time; from attnpo_jax.runtime import lock\n{HOLDS}"
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(LockedError, match="is being written by"):
            evaluate.evaluate(run, name="letters", model="base", out=tmp_path, console=QUIET)
        other.terminate()


def test_the_command_line(folder, tmp_path, capsys):
    model = str(folder / "model")
    options = [f"--config.data.eval={folder / 'eval.jsonl'}", f"--model={model}", "--json"]
    config = tmp_path / "c.py"
    config.write_text(
        "from attnpo_jax.config import default_config\n"
        "def get_config():\n"
        "    config = default_config()\n"
        f"    config.plugins = ({str(folder / 'letters.py')!r},)\n"
        "    return config\n"
    )
    command = ["evaluate", "letters", f"--config={config}", f"--out={tmp_path / 'out'}", *options]
    assert cli.main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model"] == "model" and (tmp_path / "out" / "model.rows.jsonl").exists()
    assert cli.main(["evaluate", "lettres", f"--config={config}"]) == 2
    assert "no evaluation 'lettres'; accepted: " in capsys.readouterr().err
    assert cli.main(["evaluate", "lettres"]) == 2
    assert "one of a plugin, with a --config=FILE" in capsys.readouterr().err
    assert cli.main(["evaluate", "letters", f"--config={config}", *options]) == 2
    assert "needs --workdir=DIR or --out=DIR" in capsys.readouterr().err


def test_what_is_damaged_or_missing_is_named(folder, tmp_path):
    run = Run.resolve(config_of(folder), tmp_path / "none")
    with pytest.raises(UserError, match="no checkpoint in .*none"):
        evaluate.evaluate(run, name="letters", console=QUIET)
    out = tmp_path / "out"
    [found] = evaluate.evaluate(run, name="letters", model="base", out=out, console=QUIET)
    (out / "base.json").write_text('{"evaluation": "letters"}')
    with pytest.raises(UserError, match="base.json: damaged, or not written by attnpo"):
        evaluate.evaluate(run, name="letters", model="base", out=out, console=QUIET)
    found.write(out)
    (out / "base.rows.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="base.rows.jsonl, line 1: no row"):
        evaluate.evaluate(run, name="letters", model="base", out=out, console=QUIET)


def test_names_are_checked_before_anything_is_computed(folder, tmp_path):
    config = config_of(folder)
    config.evaluate.names = ("lettres",)
    with pytest.raises(UsageError, match="no evaluation 'lettres'"):
        run_lib.run(Run.resolve(config, tmp_path / "work"), console=QUIET)
    assert not (tmp_path / "work" / "prepared").exists()
    with pytest.raises(ValueError, match="registered already"):
        register(Evaluator("letters", lambda task: Result([], {})))
    with pytest.raises(ValueError, match="accepted: a name such as"):
        register(Evaluator("Letters!", lambda task: Result([], {})))


def test_a_figure_is_taken_over_the_rows_that_have_it():
    rows = [{"id": "a", "x": 1}, {"id": "b"}, {"id": "c", "x": 0}, {"id": "d", "x": None}]
    found = figure(rows, "x")
    assert (found.value, found.count) == (0.5, 2)
    assert figure([], "x").count == 0


def test_a_report_has_paired_differences_of_several_workdirs(folder, tmp_path, capsys):
    """Two workdirs; by hand: of three shared rows one is gained, none lost."""
    figures = {"base": [0, 1, 1, 0], "step-9": [1, 1, 1]}
    for name, values in figures.items():
        rows = [{"id": f"r{i}", "hit": v} for i, v in enumerate(values)]
        of = tmp_path / f"of-{name}" / "evaluations" / "hits"
        of.mkdir(parents=True)
        result = Result(rows, {"hits": figure(rows, "hit")})
        settings = {"generate.seed": len(name), "data.eval": name, "sha256 of data.eval": "0"}
        settings["sha256 of models"] = {name: name}
        evaluate.Evaluation("hits", name, settings, result).write(of)
    workdirs = f"--workdirs={tmp_path / 'of-base'},{tmp_path / 'of-step-9'}"
    assert cli.main(["evaluate", "report", workdirs, "--json"]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["model"], first["value"], first["difference"]) == ("of-base/base", 0.5, None)
    assert second["model"] == "of-step-9/step-9"
    found = second["difference"]
    # Differences 1, 0, 0, with 1 and -1 added: mean 1/5, variance 3/5 - 1/25.
    half = 1.959964 * (0.56 / 5) ** 0.5
    assert (found["value"], found["count"]) == (pytest.approx(1 / 3), 3)
    assert (found["low"], found["high"]) == pytest.approx((0.2 - half, 0.2 + half), abs=1e-6)
    assert cli.main(["evaluate", "report", workdirs]) == 0
    # The files are alike, whatever they are called, and models differ as they must.
    assert (first["settings"], second["settings"]) == ({}, {"generate.seed": [4, 6]})
    shown = capsys.readouterr().out
    assert "= +0.333" in shown
    assert "other settings, of-step-9/step-9: generate.seed = 6, not 4\n" in shown
    assert cli.main(["evaluate", "report", workdirs, "--baseline=step-9"]) == 2
    assert "accepted: of-base/base, of-step-9/step-9" in capsys.readouterr().err
    assert cli.main(["evaluate", "report", f"--workdirs={folder}"]) == 2
    assert "no evaluations in" in capsys.readouterr().err
