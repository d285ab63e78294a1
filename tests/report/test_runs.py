"""Several runs side by side, from what their workdirs hold."""

import json

import pytest

from attnpo_jax import cli
from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.report import at_end, report, runs
from attnpo_jax.run import Run
from attnpo_jax.runtime import exit_codes, metrics
from attnpo_jax.runtime.errors import UserError
from tests import tiny
from tests.report.conftest import QUIET
from tests.report.test_page import Parsed

# By weighting and seed: what each of four pairs got. Means .75, .5, .25 and 1, 1, .75.
ROWS = {
    ("uniform", 0): [1.0, 1.0, 1.0, 0.0],
    ("uniform", 1): [1.0, 1.0, 0.0, 0.0],
    ("uniform", 2): [1.0, 0.0, 0.0, 0.0],
    ("attention", 0): [1.0, 1.0, 1.0, 1.0],
    ("attention", 1): [1.0, 1.0, 1.0, 1.0],
    ("attention", 2): [1.0, 1.0, 1.0, 0.0],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Workdirs of six runs, two weightings at three seeds, in a folder of a sweep."""
    folder = tmp_path_factory.mktemp("sweep")
    tiny.write_small_inputs(folder)
    lines = []
    for (name, seed), values in ROWS.items():
        config = tiny.small_config(folder, seed=seed, report__enabled=True)
        config_lib.complete_sections(config, weighting=name)
        workdir = folder / "runs" / f"{name},seed={seed}"
        workdir.mkdir(parents=True)
        (workdir / "config.json").write_text(config_lib.to_json(config))
        with metrics.MetricsWriter(workdir, 0) as writer:
            writer.write(0, {"eval_loss": 0.7})
            writer.write(1, {"loss": 0.6})
            writer.write(1, {"eval_loss": 0.5 + 0.1 * seed})
        rows = [{"id": str(k), "accuracy": value} for k, value in enumerate(values)]
        mean = Figure(sum(values) / 4, 0.0, 1.0, 4, "accuracy")
        pairs = workdir / "evaluations" / "pairs"
        pairs.mkdir(parents=True)
        Evaluation("pairs", "step-1", {}, Result(rows, {"accuracy": mean})).write(pairs)
        line = {"folder": f"runs/{workdir.name}", "group": f"{name} <b>", "failed": None}
        lines.append(line | {"seed": seed})
    lines.append({"folder": "runs/gone", "group": "gone", "failed": "no room"})
    tiny.write_lines(folder / "results.jsonl", lines)
    return folder


def test_runs_that_differ_in_their_seed_alone_are_a_group(folder):
    workdirs = [folder / "runs" / f"{name},seed={seed}" for name, seed in ROWS]
    members = runs.members(runs.sources(workdirs))
    names = list(dict.fromkeys(one.group for one in members))
    assert len(names) == 2 and names[0].startswith("weighting.name=uniform")
    assert [one.seed for one in members] == [0, 1, 2, 0, 1, 2]
    tables = {block.caption: block for block in runs.blocks(members) if block.kind == "table"}
    # Best first; means .9167 and .5; at the same seeds the differences are .25, .5 and .5.
    (best, worst) = tables["pairs/accuracy"].rows
    assert best[0] == names[1] and best[1:3] == ["3", "0.917"] and worst[2] == "0.5"
    assert worst[3] == "-0.121 to 1.12"  # .5 +- 4.3027 * .25 / sqrt(3)
    assert best[4] == "= +0.417" and best[6] == "4" and worst[4:] == ["", "", ""]
    assert tables["loss"].rows[0][2] == "0.6"
    told = runs.what_differs(members)
    assert told.heads[:2] == ("run", "seed") and "weighting.name" in told.heads
    # One run twice: each is a group of its own.
    twice = runs.members(runs.sources([workdirs[0], str(workdirs[0])]))
    assert len({one.group for one in twice}) == 1 or twice[0].source.name == twice[1].source.name


def test_programs_that_a_workdir_names_are_run_where_that_is_asked_for_alone(tmp_path, capsys):
    tiny.write_small_inputs(tmp_path)
    run = Run.resolve(tiny.small_config(tmp_path), tmp_path / "runs" / "work")
    plugin = tmp_path / "plugin.py"
    plugin.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    config = json.loads(config_lib.to_json(run.config)) | {"plugins": [str(plugin)]}
    run.workdir.mkdir(parents=True)
    (run.workdir / "config.json").write_text(json.dumps(config))
    line = {"folder": "runs/work", "group": "a", "failed": None}
    tiny.write_lines(tmp_path / "results.jsonl", [line])
    for named in (run.workdir, [run.workdir, tmp_path], tmp_path):
        with pytest.raises(UserError, match=f"{plugin}, Python files, which would be run as you"):
            report(named, out=tmp_path / "page.html", console=QUIET)
    assert cli.main(["report", str(run.workdir), "--tokens"]) == exit_codes.USAGE
    assert "accepted: --run-plugins" in capsys.readouterr().err
    assert not (tmp_path / "ran").exists() and not (tmp_path / "page.html").exists()
    report(run.workdir, out=tmp_path / "page.html", run_plugins=True, console=QUIET)
    assert (tmp_path / "ran").exists()
    report(tmp_path, out=tmp_path / "page.html", console=QUIET)  # this process has run it


def test_the_page_of_a_sweep(folder):
    run = Run.of_workdir(folder / "runs" / "uniform,seed=0")
    sweep = Run(run.config, folder, run.template)
    path = at_end(sweep, of_sweep=True)
    assert path == folder / "report.html"
    parsed = Parsed(path.read_text())
    text = "".join(parsed.texts)
    assert "6 runs in 2 groups: uniform <b>; attention <b>." in text
    assert "differences to the first group, “uniform <b>”" in text
    alts = [image["alt"] for image in parsed.all("img")]
    assert any(alt.startswith("pairs/accuracy by group: attention <b> 0.917 in ") for alt in alts)
    loss = next(alt for alt in alts if alt.startswith("loss by step"))
    # Means over the three seeds; of the first step, all are alike.
    assert "attention <b>, held-out pairs, steps 0 to 1: from 0.7 to 0.6" in loss
    assert "uniform <b>, training, steps 1 to 1: from 0.6" in loss and "a band from" in text
    # Named one by one, their page goes to the folder that all are in.
    workdirs = [folder / "runs" / f"uniform,seed={seed}" for seed in range(2)]
    assert report(workdirs, pairs=0, console=QUIET) == folder / "runs" / "report.html"
    (folder / "results.jsonl").write_text(
        json.dumps({"folder": "../x", "group": "a", "failed": None})
    )
    with pytest.raises(UserError, match="line 1: folder is '../x'; accepted: the folder of a run"):
        report(folder, console=QUIET)
