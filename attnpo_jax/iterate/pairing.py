"""From labels to pairs: pure functions."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.data.pair import NUMBERS
from attnpo_jax.iterate.labeler import Group, Label

BEST_REST = "best_rest"
# A pair's weight and margin, where the config has them read.
_PLAIN = {"weight": 1.0, "margin": 0.0}

# Why a prompt gives no pair.
ALIKE, TIE = "all answers alike", "none is better"


@dataclasses.dataclass(frozen=True)
class Chosen:
    """The pairs of a prompt.

    Attributes:
      places: of the chosen and the rejected answer, for each pair.
      why_none: why there is none; "" where there are some.
    """

    places: Sequence[tuple[int, int]]
    why_none: str = ""


def pairs_of(group: Group, label: Label, pairing: str) -> Chosen:
    """The pairs that a prompt's answers make.

    The best answer is the first one with the highest score, which has not failed; the worst the
    first of those with the lowest that it is better than. Blank answers are in no pair.

    Args:
      pairing: `best_worst` or `best_rest`.
    """
    places = [place for place, one in enumerate(group.answers) if not one.is_blank]
    if len(places) < 2:
        return Chosen((), ALIKE)
    sound = [place for place in places if not group.answers[place].failed]
    if not sound:
        return Chosen((), TIE)
    best = max(sound, key=lambda place: (label.rank(place), -place))
    worse = [place for place in places if label.is_better(best, place)]
    if not worse:
        return Chosen((), TIE)
    if pairing != BEST_REST:
        worse = [min(worse, key=lambda place: (label.rank(place), place))]
    return Chosen([(best, place) for place in worse])


def row_of(group: Group, chosen: int, rejected: int, fields: Mapping[str, str]) -> dict[str, Any]:
    """A pair as the line of a file, which the config reads pairs from.

    Args:
      chosen, rejected: places of the answers.
      fields: `config.data.fields`, which the held-out pairs are read by too.
    """
    pair = group.pair(chosen, rejected)
    values = {
        "id": pair.id,
        "prompt": list(pair.prompt),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        **({"tools": list(pair.tools)} if pair.tools else {}),
    }
    row = {fields.get(name) or name: value for name, value in values.items()}
    for name, column in fields.items():
        if column and name not in values:
            row[column] = _PLAIN[name] if name in NUMBERS else None
    for side, place in (("chosen", chosen), ("rejected", rejected)):
        row[f"{side}_sample"] = group.answers[place].samples[0]
    return row
