import io

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import run as run_lib
from attnpo_jax.runtime import metrics


def eval_line(**changes):
    names = {f"rewards/{w}{k}": 0.0 for w in ("", "weighted_") for k in ("accuracies", "margins")}
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

    def train(config, workdir):
        calls.append("train")
        with metrics.MetricsWriter(workdir, 0) as writer:
            for step, values in lines:
                writer.write(step, values)

    def export(config, workdir):
        calls.append("export")
        return workdir / "export"

    monkeypatch.setattr(run_lib.prepare, "prepare", lambda *_: calls.append("prepare"))
    monkeypatch.setattr(run_lib.loop, "train", train)
    monkeypatch.setattr(run_lib, "export", export)
    text = io.StringIO()
    console = Console(file=text, width=100)
    run_lib.run(config_lib.default_config(), tmp_path, console=console)
    return calls, text.getvalue()


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
