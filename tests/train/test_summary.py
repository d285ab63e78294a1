import io

from rich.console import Console

from attnpo_jax.train.summary import summary


def eval_line(step, **changes):
    names = {f"rewards/{w}{k}": 0.0 for w in ("", "weighted_") for k in ("accuracies", "margins")}
    names |= {"loss": 0.6931, "unweighted_loss": 0.6931}
    return {"step": step} | {f"eval_{name}": value for name, value in (names | changes).items()}


AFTER = eval_line(
    2,
    **{
        "loss": 0.25,
        "unweighted_loss": 0.5,
        "rewards/accuracies": 0.8125,
        "rewards/margins": 1.5,
        "rewards/weighted_accuracies": 0.875,
        "rewards/weighted_margins": 2.75,
    },
)


def test_it_shows_two_evaluations_side_by_side():
    console = Console(file=io.StringIO(), width=100)
    console.print(summary(eval_line(0), AFTER))
    text = console.file.getvalue()
    assert "after 2 steps" in text
    # Numbers of each row, from left to right: plain before and after, weighted before and after.
    rows = {}
    for line in text.splitlines():
        label, *cells = (cell.strip() for cell in line.strip("│").split("│"))
        rows[label] = [cell for cell in cells if cell]
    assert rows["loss"] == ["0.6931", "0.5000", "0.6931", "0.2500"]
    assert rows["reward accuracy"] == ["0.0000", "0.8125", "0.0000", "0.8750"]
    assert rows["reward margin"] == ["0.0000", "1.5000", "0.0000", "2.7500"]
