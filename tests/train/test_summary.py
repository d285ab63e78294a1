import io

from rich.console import Console

from attnpo_jax.train.summary import summary


def eval_line(step, **changes):
    kinds = ("accuracies", "ties", "margins")
    names = {f"rewards/{w}{k}": 0.0 for w in ("", "weighted_") for k in kinds}
    names |= {"loss": 0.6931, "unweighted_loss": 0.6931}
    return {"step": step} | {f"eval_{name}": value for name, value in (names | changes).items()}


AFTER = eval_line(
    2,
    **{
        "loss": 0.25,
        "unweighted_loss": 0.5,
        "rewards/accuracies": 0.8125,
        "rewards/ties": 0.125,
        "rewards/margins": 1.5,
        "rewards/weighted_accuracies": 0.875,
        "rewards/weighted_margins": 2.75,
    },
)


def printed(*lines):
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(*lines))
    return console.file.getvalue()


def test_it_shows_two_evaluations_side_by_side():
    text = printed(eval_line(0), AFTER)
    assert "after 2 steps" in text
    # Numbers of each row, from left to right: plain before and after, weighted before and after.
    rows = {}
    for line in text.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        rows[label] = [cell for cell in cells if cell]
    assert rows["loss"] == ["0.6931", "0.5000", "0.6931", "0.2500"]
    assert rows["reward accuracy"] == ["0.0000", "0.8125", "0.0000", "0.8750"]
    assert rows["reward ties"] == ["0.0000", "0.1250", "0.0000", "0.0000"]
    assert rows["reward margin"] == ["0.0000", "1.5000", "0.0000", "2.7500"]


def test_metrics_of_an_earlier_version_that_count_no_ties():
    lines = [{k: v for k, v in line.items() if "ties" not in k} for line in (eval_line(0), AFTER)]
    assert "reward accuracy" in printed(*lines) and "ties" not in printed(*lines)
