"""What came of a training run, as a table."""

from typing import Any

from rich.table import Table

# Rows of the table: what is shown, and the metric's name plain and weighted.
_ROWS = (
    ("loss", "eval_unweighted_loss", "eval_loss"),
    ("reward accuracy", "eval_rewards/accuracies", "eval_rewards/weighted_accuracies"),
    ("reward ties", "eval_rewards/ties", "eval_rewards/weighted_ties"),
    ("reward margin", "eval_rewards/margins", "eval_rewards/weighted_margins"),
)


def summary(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """The evaluation before the first step beside that after the last.

    Args:
      before: the first line of `metrics.jsonl` that has evaluation metrics.
      after: the last one.
    """
    table = Table(title=f"held-out pairs, before training and after {after['step']} steps")
    table.add_column("")
    for name in ("before", "after", "weighted, before", "weighted, after"):
        table.add_column(name, justify="right")
    for label, plain, weighted in _ROWS:
        cells = [line.get(name) for name in (plain, weighted) for line in (before, after)]
        if None not in cells:  # earlier versions counted no ties
            table.add_row(label, *(f"{cell:.4f}" for cell in cells))
    return table
