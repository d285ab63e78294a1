"""Which evaluation of a run is the best, and whether it still gets better; by one metric."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

_FORM = re.compile(r"(max|min):(eval_\S.*)")
ACCEPTED = "`max:` or `min:` and a metric of evaluations, as `max:eval_rewards/accuracies`"


@dataclasses.dataclass(frozen=True)
class Choice:
    """A metric, and which way it is better.

    Attributes:
      metric: its name in `metrics.jsonl`.
      highest: whether a higher value is better.
    """

    metric: str
    highest: bool

    @classmethod
    def parse(cls, text: str) -> "Choice":
        """Reads `max:METRIC` or `min:METRIC`.

        Raises:
          ValueError: it is neither.

        >>> Choice.parse("min:eval_loss")
        Choice(metric='eval_loss', highest=False)
        """
        found = _FORM.fullmatch(text)
        if found is None:
            raise ValueError(f"{text!r}; accepted: {ACCEPTED}")
        return cls(found[2], found[1] == "max")

    def scores(self, lines: Iterable[Mapping[str, Any]]) -> dict[int, float]:
        """By step, in order, the metric of lines that have it, turned so that higher is better.

        What is not finite is the worst there can be. Of two lines of one step the last one counts.
        """
        sign = 1.0 if self.highest else -1.0
        found = {
            line["step"]: sign * line[self.metric]
            if math.isfinite(line[self.metric])
            else -math.inf
            for line in lines
            if self.metric in line
        }
        return dict(sorted(found.items()))

    def value(self, score: float) -> float:
        """The metric's value of a score."""
        return score if self.highest else -score


def best(scores: Mapping[int, float]) -> int | None:
    """The step of the highest score after step 0, the first one of several; None without any.

    >>> best({0: 9.0, 10: 0.5, 20: 0.7, 30: 0.7})
    20
    """
    trained = {step: score for step, score in scores.items() if step > 0 and score > -math.inf}
    return max(trained, key=lambda step: (trained[step], -step), default=None)


def stalled(scores: Mapping[int, float], patience: int, min_gain: float) -> bool:
    """Whether `patience` scores in a row were not above the best before them by `min_gain`.

    A gain that small leaves the best as it was, so that small gains in a row add up. Step 0's score
    is one to be above.

    >>> stalled({0: 0.5, 10: 0.6, 20: 0.6, 30: 0.59}, patience=2, min_gain=0.0)
    True
    >>> stalled({0: 0.50, 10: 0.54, 20: 0.58}, patience=2, min_gain=0.05)
    False
    """
    reached, waited = -math.inf, 0
    for step in sorted(scores):
        if scores[step] > reached + min_gain:
            reached, waited = scores[step], 0
        else:
            waited += 1
        if waited == patience:
            return True
    return False
