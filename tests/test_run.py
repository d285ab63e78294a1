import collections
import inspect
import io

import pytest
from rich.console import Console

from attnpo_jax import cli, export, prepare
from attnpo_jax import config as config_lib
from attnpo_jax import run as run_lib
from attnpo_jax import train as training
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.prompt import JudgeTemplate
from attnpo_jax.models.io import hf_folder
from attnpo_jax.run import Run
from attnpo_jax.runtime import metrics
from tests import tiny


def eval_line(**changes):
    names = {
        f"rewards/{w}{k}": 0.0 for w in ("", "weighted_") for k in ("accuracies", "ties", "margins")
    }
    names |= {"loss": 0.6931, "unweighted_loss": 0.6931}
    return {f"eval_{name}": value for name, value in (names | changes).items()}


AFTER = eval_line(
    **{
        "loss": 0.25,
        "unweighted_loss": 0.5,
        "rewards/accuracies": 0.8125,
        "rewards/margins": 1.5,
        "rewards/weighted_accuracies": 0.875,
        "rewards/weighted_margins": 2.75,
    }
)


def run_with(tmp_path, monkeypatch, lines):
    """`run` with stand-ins for its four parts; returns their order and what was printed."""
    calls = []

    def train(run):
        calls.append("train")
        with metrics.MetricsWriter(run.workdir, 0) as writer:
            for step, values in lines:
                writer.write(step, values)

    def export_to(run):
        calls.append("export")
        return run.workdir / "export"

    monkeypatch.setattr(prepare, "prepare", lambda *_, **__: calls.append("prepare"))
    monkeypatch.setattr(training, "train", train)
    monkeypatch.setattr(export, "export", export_to)
    text = io.StringIO()
    console = Console(file=text, width=100)
    run_lib.run(Run.resolve(config_lib.default_config(), tmp_path), console=console)
    return calls, text.getvalue()


def test_closing_table_of_metrics_that_count_no_ties(tmp_path, monkeypatch):
    lines = [(step, {k: v for k, v in AFTER.items() if "ties" not in k}) for step in (0, 8)]
    _, printed = run_with(tmp_path, monkeypatch, lines)
    assert "reward accuracy" in printed and "ties" not in printed
    _, printed = run_with(tmp_path / "new", monkeypatch, [(0, AFTER), (8, AFTER)])
    assert "reward ties" in printed


def test_closing_table_compares_the_first_with_the_last_evaluation(tmp_path, monkeypatch):
    lines = [
        (0, eval_line()),
        (1, {"loss": 0.5}),
        (1, eval_line(loss=0.4)),
        (2, {"loss": 0.3}),
        (2, AFTER),
    ]
    calls, text = run_with(tmp_path, monkeypatch, lines)
    assert calls == ["prepare", "train", "export"]
    assert "after 2 steps" in text
    # Numbers of each row, from left to right: plain before and after, weighted before and after.
    rows = {}
    for line in text.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        rows[label] = [cell for cell in cells if cell]
    assert rows["loss"] == ["0.6931", "0.5000", "0.6931", "0.2500"]
    assert rows["reward accuracy"] == ["0.0000", "0.8125", "0.0000", "0.8750"]
    assert rows["reward margin"] == ["0.0000", "1.5000", "0.0000", "2.7500"]
    for name in ("export", "metrics.jsonl", "checkpoints", "prepared", "config.json"):
        assert str(tmp_path / name) in text


def test_without_held_out_pairs_only_the_artefacts_are_listed(tmp_path, monkeypatch):
    _, text = run_with(tmp_path, monkeypatch, [(1, {"loss": 0.5})])
    assert "held-out" not in text and str(tmp_path / "export") in text


@pytest.mark.process
def test_everything_is_resolved_once(tmp_path, monkeypatch):
    tiny.write_small_inputs(tmp_path)
    config = tiny.small_config(tmp_path, train__batch_size=4, train__microbatch_size=2)
    (tmp_path / "config.json").write_text(config_lib.to_json(config))
    (tmp_path / "config.py").write_text(
        "import pathlib\nfrom attnpo_jax import config\n"
        "def get_config():\n"
        "    file = pathlib.Path(__file__).with_suffix('.json')\n"
        "    return config.from_json(file.read_text())\n"
    )
    counts = collections.Counter()

    def count(owner, name):
        original = inspect.getattr_static(owner, name)
        function = getattr(original, "__func__", original)

        def counted(*args, **kwargs):
            counts[name if owner not in (ChatTokenizer, JudgeTemplate) else owner.__name__] += 1
            return function(*args, **kwargs)

        kind = type(original) if isinstance(original, classmethod) else lambda f: f
        monkeypatch.setattr(owner, name, kind(counted))

    for name in ("resolve", "load_config", "weights_digest", "load_params"):
        count(hf_folder, name)
    count(ChatTokenizer, "load")
    count(JudgeTemplate, "load")
    count(config_lib, "validate")
    arguments = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'work'}"]
    assert cli.main(["run", *arguments]) == 0
    names = ("resolve", "load_config", "weights_digest", "load_params", "validate")
    assert counts == dict.fromkeys((*names, "ChatTokenizer", "JudgeTemplate"), 1)
    assert (tmp_path / "work" / "export" / "model.safetensors").exists()
