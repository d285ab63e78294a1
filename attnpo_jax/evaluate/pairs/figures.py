"""From what is known of each pair to figures: accuracies, length, calibration, subsets."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from attnpo_jax.evaluate.evaluator import Figure, Result, Row, figure
from attnpo_jax.evaluate.pairs import rewardbench
from attnpo_jax.runtime import intervals

BINS = 10
_DETAIL = {"column": None, "detail": True}
_MOST_SHOWN = 12  # subsets; those of more are in the file alone


def row_of(id: str, subset: str | None, lengths: tuple[int, int], scores: dict[str, float]) -> Row:
    """What is known of a pair.

    Args:
      id: the pair's.
      subset: which it belongs to; None for none.
      lengths: tokens of the text of the chosen and of the rejected response.
      scores: by name, see `scores.fields`.

    Returns:
      All of this, and, plain and weighted: `brier`, (1 - p)^2 where p = sigmoid(margin) is how
      likely the model takes the chosen response to be the better one; `accuracy_against_length`,
      the accuracy where the rejected response is longer; `accuracy SUBSET`, that of the pair's
      subset; and `longer`: 1 where the chosen response is the longer one, 1/2 where both are as
      long, else 0.
    """
    chosen, rejected = lengths
    row: dict[str, Any] = {"id": id}
    if subset is not None:
        row["subset"] = subset
    row |= {"chosen_tokens": chosen, "rejected_tokens": rejected, **scores}
    row["longer"] = 0.5 * ((chosen > rejected) + (chosen >= rejected))
    for weighted in ("", "weighted_"):
        row[f"{weighted}brier"] = (1 - _sigmoid(scores[f"{weighted}margin"])) ** 2
        if rejected > chosen:
            row[f"{weighted}accuracy_against_length"] = scores[f"{weighted}accuracy"]
        if subset is not None:
            row[f"{weighted}accuracy {subset}"] = scores[f"{weighted}accuracy"]
    return row


def _sigmoid(x: Any) -> Any:
    return np.exp(-np.logaddexp(0.0, -x))


def result(rows: Sequence[Row], *, weighted: bool) -> Result:
    """The figures of pairs.

    Args:
      rows: see `row_of`.
      weighted: whether the weighted rewards are others than the plain ones.
    """
    figures: dict[str, Figure] = {}
    ways = {"": "", "weighted ": "weighted_"} if weighted else {"": ""}
    for way, of in ways.items():
        figures[f"{way}accuracy"] = figure(rows, f"{of}accuracy")
        figures[f"{way}ties"] = figure(rows, f"{of}tie")
        figures[f"{way}margin"] = figure(rows, f"{of}margin")
    figures["accuracy of the longer one"] = figure(rows, "longer")
    for way, of in ways.items():
        against = f"{way}accuracy where the longer one is rejected"
        figures[against] = figure(rows, f"{of}accuracy_against_length")
    for side in ("chosen", "rejected") if "chosen_kl" in rows[0] else ():
        figures[f"KL a token, {side}"] = figure(rows, f"{side}_kl")
        figures[f"log-ratio a token, {side}"] = figure(rows, f"{side}_log_ratio")
    for way, of in ways.items():
        figures[f"{way}Brier score"] = figure(rows, f"{of}brier")
        figures[f"{way}calibration error"] = _calibration_error(rows, of)
        figures |= {f"{way}{name}": of_bin for name, of_bin in _bins(rows, of).items()}
    subsets = [row.get("subset") for row in rows]
    if rewardbench.is_of(subsets):
        figures |= rewardbench.sections(subsets, [row["accuracy"] for row in rows])
    named = sorted({subset for subset in subsets if subset is not None})
    for way, of in ways.items():
        for subset in named:
            figures[f"{way}accuracy, {subset}"] = figure(
                rows, f"{of}accuracy {subset}", detail=len(named) > _MOST_SHOWN
            )
    return Result(rows, figures)


def _confidences(rows: Sequence[Row], of: str) -> tuple[np.ndarray, np.ndarray]:
    """Of each pair, how likely the model takes its own choice to be right, and whether it is."""
    margins = np.array([row[f"{of}margin"] for row in rows], np.float64)
    right = np.array([row[f"{of}accuracy"] + row[f"{of}tie"] / 2 for row in rows], np.float64)
    return _sigmoid(np.abs(margins)), right


def _bins(rows: Sequence[Row], of: str) -> dict[str, Figure]:
    """Pairs by how sure the model is of its choice, sigmoid(|margin|): its accuracy (a tie is half
    right) and mean confidence, in bins from 1/2 to 1 of the same width.
    """
    confidence, right = _confidences(rows, of)
    bins = _bin_of(confidence)
    found = {}
    for k in np.unique(bins).tolist():
        at = f"at confidence {0.5 + 0.5 * k / BINS:.2f} to {0.5 + 0.5 * (k + 1) / BINS:.2f}"
        for name, values in (("accuracy", right), ("mean confidence", confidence)):
            members = [{"value": value} for value in values[bins == k].tolist()]
            found[f"{name} {at}"] = dataclasses.replace(figure(members, "value"), **_DETAIL)
    return found


def _bin_of(confidence: np.ndarray) -> np.ndarray:
    return np.minimum((confidence - 0.5) * 2 * BINS, BINS - 1).astype(int)


def _calibration_error(rows: Sequence[Row], of: str) -> Figure:
    """The expected calibration error (Naeini et al. 2015): how far accuracy is from confidence in
    the bins of `_bins`, as a mean over the pairs.
    """
    confidence, right = _confidences(rows, of)
    bins = _bin_of(confidence)

    def error(chosen: np.ndarray) -> float:
        gaps = np.bincount(bins[chosen], (right - confidence)[chosen], BINS)
        return float(np.abs(gaps).sum() / len(chosen))

    low, high = intervals.bootstrap(len(rows), error)
    value = error(np.arange(len(rows)))
    # Resampled, it is larger, since chance adds to it: the interval must not leave it out.
    return Figure(value, min(low, value), max(high, value), len(rows))
