"""Figures of AlpacaEval from its annotations."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.evaluate.alpaca_eval import files, length_control
from attnpo_jax.evaluate.alpaca_eval.annotate import TIE
from attnpo_jax.evaluate.alpaca_eval.length_control import LengthData
from attnpo_jax.evaluate.evaluator import Figure, Result, figure

NO_LENGTH_DATA = (
    f"not computed: it needs {length_control.WHERE}, as evaluate.alpaca_eval.length_data"
)


def score(
    annotations: Sequence[Mapping[str, Any]], length_data: LengthData | None = None
) -> Result:
    """Win rates, 0 to 1, of the model (`output_2`) against the baseline (`output_1`).

    Args:
      annotations: rows of AlpacaEval's annotations, in its order.
      length_data: what the length-controlled win rate needs; without it, it is left out.

    Returns:
      A row an annotation, whose `win` is the preference less 1; None, and left out of the win
      rates, where the preference is none from 1 to 2 (0 is an old form of a tie).

    Raises:
      UserError: see `length_control.length_controlled`.
    """
    rows = []
    ids = files.ids([one["instruction"] for one in annotations])
    for id, one in zip(ids, annotations, strict=True):
        preference = one["preference"]
        preference = TIE if preference == 0 else preference
        known = preference is not None and 1 <= preference <= 2
        rows.append(
            {
                "id": id,
                "win": preference - 1 if known else None,
                "discrete_win": _discrete(preference) if known else None,
                "length": float(len(one["output_2"])),
                "baseline_length": float(len(one["output_1"])),
            }
        )
    figures = {"win_rate": figure(rows, "win")}
    about = _about(annotations, rows)
    if length_data is None:
        about["length_controlled_win_rate"] = NO_LENGTH_DATA
    elif not figures["win_rate"].count:
        about["length_controlled_win_rate"] = "not computed: no preference is readable"
    else:
        controlled, facts = _length_controlled(annotations, rows, length_data)
        figures["length_controlled_win_rate"] = controlled
        about |= facts
    figures["discrete_win_rate"] = figure(rows, "discrete_win")
    figures["length"] = figure(rows, "length")
    figures["baseline_length"] = figure(rows, "baseline_length")
    return Result(rows, figures, about)


def _discrete(preference: float) -> float:
    return 0.5 if preference == TIE else float(preference > TIE)


def _about(
    annotations: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    wins = [row["win"] for row in rows if row["win"] is not None]
    return {
        "baseline": annotations[0].get("generator_1"),
        "generator": annotations[0].get("generator_2"),
        "annotator": annotations[0].get("annotator"),
        "standard_error": _standard_error(np.array(wins)),
        "wins": sum(win > 0.5 for win in wins),
        "losses": sum(win < 0.5 for win in wins),
        "draws": sum(win == 0.5 for win in wins),
        "unreadable": len(rows) - len(wins),
    }


def _length_controlled(
    annotations: Sequence[Mapping[str, Any]],
    rows: list[dict[str, Any]],
    data: LengthData,
) -> tuple[Figure, dict[str, Any]]:
    """The figure, and what is said of it; each row gets its part."""
    wins = np.array([math.nan if row["win"] is None else row["win"] for row in rows])
    of_itself = annotations[0].get("generator_1") is not None and (
        annotations[0]["generator_1"] == annotations[0].get("generator_2")
    )
    if of_itself:  # As the package has it, a model against itself.
        for row in rows:
            row["length_controlled_win"] = 0.5
        return Figure(0.5, 0.5, 0.5, len(rows)), {"length_controlled_standard_error": 0.0}
    lengths = np.array([[row["baseline_length"], row["length"]] for row in rows])
    found = length_control.length_controlled(wins, lengths, data)
    for row, win in zip(rows, found.wins_R, strict=True):
        row["length_controlled_win"] = float(win)
    # Its rows lean on one fit, so that their spread is not that of the figure: no column.
    controlled = Figure(float(found.wins_R.mean()), found.low, found.high, len(rows))
    return controlled, {
        "length_controlled_standard_error": _standard_error(found.wins_R),
        "length_controlled_fit": dict(
            zip(("length", "difficulty", "model"), found.coefficients, strict=True)
        ),
        "length_controlled_penalty": found.penalty,
        "length_controlled_without_penalty": found.unpenalized,
    }


def _standard_error(values: np.ndarray) -> float | None:
    """Of a mean, as the package has it."""
    return float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else None
