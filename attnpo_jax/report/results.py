"""What came of a run: held-out pairs before and after, evaluations, and answers side by side."""

import math
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.evaluate import files
from attnpo_jax.evaluate import report as evaluate_report
from attnpo_jax.evaluate.evaluator import Figure
from attnpo_jax.evaluate.files import Evaluation
from attnpo_jax.generate.model import BASE
from attnpo_jax.report.blocks import Answer, Answers, Paragraph, Picture, Table
from attnpo_jax.report.numbers import FIGURES, PairNumbers
from attnpo_jax.runtime import figures, intervals
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import samples

_CALLED = {
    "loss": "loss",
    "unweighted_loss": "loss with uniform weights",
    "rewards/weighted_accuracies": "weighted reward accuracy",
    "rewards/accuracies": "reward accuracy",
    "rewards/weighted_margins": "weighted reward margin",
    "rewards/margins": "reward margin",
}
TIES = (
    "Before the first step policy and reference are one model: all rewards tie, which is no win, "
    "and accuracies begin at 0."
)
_NOTE = "Differences are paired, row by row, with 95% intervals; = where the interval holds 0."
# Answers of a source that are shown, and characters of each text.
_MOST_ANSWERS, _LONGEST = 12, 2000
_TRAINING = re.compile(r"train-step-(\d+)")
_STEP = re.compile(r"step-(\d+)")


def logged(lines: Sequence[Mapping[str, Any]]) -> Table | None:
    """The first evaluation of the held-out pairs in the metrics, beside the last one."""
    found = [line for line in lines if "eval_loss" in line]
    if not found:
        return None
    before, after = found[0], found[-1]
    rows = []
    for name in FIGURES:
        a, b = (line.get(f"eval_{name}") for line in (before, after))
        if a is not None and b is not None:
            rows.append((_CALLED[name], f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}"))
    heads = ("", f"step {before['step']}", f"step {after['step']}", "difference")
    return Table("Held-out pairs, all of them, as logged", heads, rows)


def scored(numbers: Sequence[PairNumbers], name: str) -> Table | None:
    """The held-out pairs that are shown, with the reference as policy and with the trained model.

    Args:
      numbers: of the pairs.
      name: what the trained model is called.
    """
    both = [(one.before, one.after) for one in numbers if one.before is not None]
    if not both or any(after is None for _, after in both):
        return None
    rows = []
    for place, figure in enumerate(FIGURES):
        a, b = ([float(side[k][place]) for side in both] for k in (0, 1))
        if not np.isfinite([a, b]).all():
            continue
        mean = Figure(math.fsum(b) / len(b), *intervals.mean(b))
        change = Figure(mean.value - math.fsum(a) / len(a), *intervals.paired_difference(a, b))
        cells = f"{math.fsum(a) / len(a):.4f}", *mean.cells(), *marked(change)
        rows.append((_CALLED[figure], *cells))
    heads = ("", "before", name, "95% interval", "difference", "95% interval")
    caption = f"Held-out pairs, the {len(both)} that are shown below, with intervals over pairs"
    return Table(caption, heads, rows)


def marked(difference: Figure | None) -> tuple[str, str]:
    """A difference and its interval as tables show them; = before one whose interval holds 0."""
    if difference is None:
        return "", ""
    value, interval = difference.cells()
    same = not (difference.low > 0 or difference.high < 0)
    sign = "+" if difference.value > 0 else ""
    return f"{'= ' if same else ''}{sign}{value}", interval


def evaluations(found: Sequence[Evaluation]) -> list[Any]:
    """Tables of all evaluations, the model that training starts from first, and their differences.

    Of a run's own checkpoints the newest is shown alone.
    """
    shown = _newest(found)
    lines = evaluate_report.compare([(one.model, one) for one in shown]) if shown else []
    blocks: list[Any] = []
    for name in dict.fromkeys(line.evaluation for line in lines):
        own = [line for line in lines if line.evaluation == name and not line.figure.detail]
        if own:
            blocks.append(_by_model(name, own))
    if (picture := _differences(lines)) is not None:
        blocks.insert(0, picture)
        blocks.insert(1, Paragraph(_NOTE))
    return blocks


def _by_model(evaluation: str, lines: Sequence[evaluate_report.Line]) -> Table:
    """A row a figure, and in it, model by model, the value and how it differs."""
    models = list(dict.fromkeys(line.model for line in lines))
    compared = {line.model for line in lines if line.difference is not None}
    by_place = {(line.name, line.model): line for line in lines}
    heads, rows = ["figure", "rows"], []
    for model in models:
        heads += [model, "95% interval", *(["difference", "95% interval"] * (model in compared))]
    for name in dict.fromkeys(line.name for line in lines):
        counts = {line.figure.count for line in lines if line.name == name}
        row = [name, ", ".join(map(str, sorted(counts)))]
        for model in models:
            line = by_place.get((name, model))
            row += ["", ""] if line is None else line.figure.cells()
            if model in compared:
                row += marked(None if line is None else line.difference)
        rows.append(row)
    return Table(f"Evaluation {evaluation}", heads, rows)


def _newest(found: Sequence[Evaluation]) -> list[Evaluation]:
    """Without those of checkpoints that have a newer one."""
    last: dict[str, int] = {}
    for one in found:
        if (step := _STEP.fullmatch(one.model)) is not None:
            last[one.name] = max(last.get(one.name, 0), int(step[1]))
    steps = {name: f"step-{step}" for name, step in last.items()}
    return [
        one for one in found if not _STEP.fullmatch(one.model) or one.model == steps.get(one.name)
    ]


def _differences(lines: Sequence[evaluate_report.Line]) -> Picture | None:
    """Figures from 0 to 1 of both models, with their differences' intervals."""
    rows = [
        line
        for line in lines
        if line.difference is not None
        and not line.figure.detail
        and math.isfinite(line.difference.low)
        and max(abs(line.difference.low), abs(line.difference.high)) <= 1
    ][:24]
    if not rows:
        return None
    figure, (axes,) = figures.new_figure(height=0.8 + 0.24 * len(rows))
    axes.set_title("differences to the base, with 95% intervals")
    axes.axvline(0, color=figures.GREY, linewidth=1)
    places = range(len(rows))
    values = np.array([line.difference.value for line in rows])
    ends = np.array([(line.difference.low, line.difference.high) for line in rows])
    errors = np.maximum(0, np.abs(ends.T - values))
    axes.errorbar(values, places, xerr=errors, fmt="o", color=figures.COLOURS[0], markersize=4)
    models = {line.model for line in rows}
    names = [f"{line.evaluation}: {line.name}" for line in rows]
    if len(models) > 1:
        names = [f"{name} ({line.model})" for name, line in zip(names, rows, strict=True)]
    axes.set_yticks(places, [figures.label(name, width=60, lines=1) for name in names])
    axes.invert_yaxis()
    told = "; ".join(
        f"{name} {line.difference.value:+.3g} ({line.difference.low:.3g} to "
        f"{line.difference.high:.3g})"
        for name, line in zip(names, rows, strict=True)
    )
    return Picture(figures.svg_text(figure, "differences"), f"Differences to the base: {told}")


def answers(workdir: pathlib.Path) -> tuple[list[Answers], list[str]]:
    """Answers before and after, by where they are from; and what could not be read, and why."""
    found, notes = [], []
    for caption, before, after in _files(workdir):
        try:
            sides = [{(r["id"], r["sample"]): r for r in samples.read(f)} for f in (before, after)]
        except (UserError, OSError) as error:
            notes.append(str(error))
            continue
        shared = [key for key in sides[0] if key in sides[1]]
        rows = [_answer(sides[0][key], sides[1][key]) for key in shared]
        # Those that say something else now are worth seeing first.
        rows.sort(key=lambda row: row.before == row.after)
        same = sum(row.before == row.after for row in rows)
        if rows:
            told = f"{caption}: {min(len(rows), _MOST_ANSWERS)} of {len(rows)}"
            told += f", of which {same} are the same" if same else ""
            names = before.name.partition(".")[0], after.name.partition(".")[0]
            found.append(Answers(told, names, rows[:_MOST_ANSWERS]))
    return found, notes


def _files(workdir: pathlib.Path) -> list[tuple[str, pathlib.Path, pathlib.Path]]:
    """Pairs of samples files, of the model that training started from and of the newest one."""
    found = []
    folder = workdir / "samples"
    steps = {int(m[1]): f for f in folder.glob("*.jsonl") if (m := _TRAINING.fullmatch(f.stem))}
    if len(steps) > 1:
        found.append(("samples while training", steps[min(steps)], steps[max(steps)]))
    if (pair := _pair(folder, "")) is not None:
        found.append(("samples of `attnpo generate`", *pair))
    for evaluation in sorted((workdir / files.FOLDER).glob("*/")):
        for tag in sorted({file.name.partition(".")[2] for file in evaluation.glob("*.*.jsonl")}):
            pair = _pair(evaluation, tag.removesuffix("jsonl").rstrip("."))
            if tag != "rows.jsonl" and pair is not None:
                found.append((f"evaluation {evaluation.name}", *pair))
    return found


def _pair(folder: pathlib.Path, tag: str) -> tuple[pathlib.Path, pathlib.Path] | None:
    ending = f".{tag}.jsonl" if tag else ".jsonl"
    named = {f.name.removesuffix(ending): f for f in folder.glob(f"*{ending}")}
    steps = {int(m[1]): f for name, f in named.items() if (m := _STEP.fullmatch(name))}
    return (named[BASE], steps[max(steps)]) if BASE in named and steps else None


def _answer(before: Mapping[str, Any], after: Mapping[str, Any]) -> Answer:
    messages = before["prompt"] if isinstance(before.get("prompt"), list) else []
    prompt = "\n\n".join(
        f"{m.get('role', '')}: {m.get('content', '')}" for m in messages if isinstance(m, dict)
    )
    texts = (prompt, before.get("response", ""), after.get("response", ""))
    id = before["id"] if not before["sample"] else f"{before['id']}, {before['sample']}"
    return Answer(id, *(_cut(str(text)) for text in texts))


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def trained(found: Sequence[Evaluation]) -> dict[str, Evaluation]:
    """Of each evaluation, that of the newest checkpoint."""
    return {one.name: one for one in _newest(found) if _STEP.fullmatch(one.model)}
