"""A finished run of a tiny model on hostile texts, and its page."""

import pytest
from rich.console import Console

from attnpo_jax import run as run_lib
from attnpo_jax.evaluate.evaluator import Figure, Result
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.report import curves, report, stage
from attnpo_jax.run import Run
from attnpo_jax.runtime import history, metrics
from tests import tiny
from tests.report.hostile import STRINGS

QUIET = Console(quiet=True)
STEPS = 3


def rows(strings):
    """Pairs whose ids, prompts and responses are hostile."""
    return [
        {
            "id": f"{k} {text}",
            "prompt": text,
            "chosen": f"{text} yes",
            "rejected": f"no {text}"[:60],
        }
        for k, text in enumerate(strings)
    ]


@pytest.fixture(scope="session", autouse=True)
def few_figures():
    """Each takes a sixth of a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curves, "_MOST_FIGURES", 8)
        yield


@pytest.fixture(scope="session")
def run(tmp_path_factory):
    """A finished run."""
    folder = tmp_path_factory.mktemp("report")
    tiny.write_small_inputs(folder, rows(STRINGS), rows(STRINGS[:8]))
    config = tiny.small_config(
        folder,
        report__enabled=True,
        prepare__rows_per_shard=64,
        train__steps=STEPS,
        train__batch_size=8,
        train__microbatch_size=8,
        optim__learning_rate=1e-2,
        optim__warmup_ratio=0.0,
    )
    found = Run.resolve(config, folder / "work <b>&amp;")
    run_lib.run(found, console=QUIET)
    return found


@pytest.fixture(scope="session")
def hostile(run):
    """The same with hostile names of metrics, evaluations, figures, models, stages and prompts."""
    workdir = run.workdir
    with metrics.MetricsWriter(workdir, STEPS) as writer:
        for name in STRINGS:
            writer.write(STEPS, {name: 1.0})
    for k, name in enumerate(STRINGS[:12]):
        result = Result([{"id": name, "x": 1.0}], {name: Figure(1.0, 0.5, 1.0, 1, "x")})
        folder = workdir / "evaluations" / f"e{k}"
        folder.mkdir(parents=True)
        for model in ("base", "step-3"):
            Evaluation(name, model, {}, result).write(folder)
            prompt = [{"role": name, "content": name}]
            sample = {"id": name, "sample": 0, "prompt": prompt, "response": f"{model} {name}"}
            tiny.write_lines(folder / f"{model}.samples.jsonl", [sample])
    for name in STRINGS:
        with history.recorded(
            workdir, name, {"devices": name, "model": name, "versions": {name: name}}
        ):
            pass
    return report(run, console=QUIET).read_text()


@pytest.fixture(scope="session")
def plain(run):
    """The page that the run itself has written; before `hostile` changes what it is of."""
    return (run.workdir / stage.FILE).read_text()
