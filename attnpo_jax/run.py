"""`attnpo run`: prepare, train, evaluate and export, and a table of what came of it."""

import os
import pathlib

from ml_collections import config_dict
from rich.console import Console
from rich.table import Table

from attnpo_jax.export.stage import export
from attnpo_jax.parallel import processes
from attnpo_jax.parallel.checkpoint import folder_of
from attnpo_jax.prepare import stage as prepare
from attnpo_jax.runtime import metrics
from attnpo_jax.train import loop

# Rows of the table: what is shown, and the metric's name plain and weighted.
_ROWS = (
    ("loss", "eval_unweighted_loss", "eval_loss"),
    ("reward accuracy", "eval_rewards/accuracies", "eval_rewards/weighted_accuracies"),
    ("reward margin", "eval_rewards/margins", "eval_rewards/weighted_margins"),
)


def run(
    config: config_dict.ConfigDict, workdir: str | os.PathLike, *, console: Console | None = None
) -> None:
    """Does everything that a config asks for; what an earlier run has finished is not done again.

    Args:
      config: see `attnpo_jax.config.default_config`.
      workdir: the run's folder.
      console: where the closing table goes; None for standard output.

    Raises:
      As `prepare.prepare`, `train.loop.train` and `export.export` do.
    """
    workdir = pathlib.Path(workdir)
    prepare.prepare(config, workdir)
    loop.train(config, workdir)
    exported = export(config, workdir)
    if not processes.is_first():
        return

    console = console or Console()
    lines = [line for line in metrics.read(workdir) if "eval_loss" in line]
    if lines:
        console.print(summary(lines[0], lines[-1]))
    for what, path in (
        ("model (Hugging Face)", exported),
        ("metrics", workdir / metrics.FILE),
        ("checkpoints", folder_of(config, workdir)),
        ("prepared data", workdir / "prepared"),
        ("config", workdir / "config.json"),
    ):
        console.print(f"{what:<21} {path}", highlight=False, soft_wrap=True)


def summary(before: metrics.Line, after: metrics.Line) -> Table:
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
        cells = (line[name] for name in (plain, weighted) for line in (before, after))
        table.add_row(label, *(f"{cell:.4f}" for cell in cells))
    return table
