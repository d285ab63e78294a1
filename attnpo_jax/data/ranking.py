"""Pairs of more than two answers to one prompt."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.data.harmless import is_harmless
from attnpo_jax.data.pair import BadExample

BEST_WORST, BEST_REST, ALL = "best_worst", "best_rest", "all"
CHOICES = (BEST_WORST, BEST_REST, ALL)
"""The best answer against the worst; against each that is worse; each against each worse one."""

_TEXTS = ("answer", "response", "completion", "output", "text", "content", "value")
_SCORES = ("score", "rating", "reward", "overall_score")
Candidate = tuple[Any, Any, str]  # chosen, rejected, and what tells the pair's id


def of_answers(answers: Any, ranked: str) -> list[Candidate]:
    """The pairs of a list of answers, each an object of a text and a rank (1 is best) or a score.

    Answers of one rank make no pair. Of several that are best, or worst, the first stands for them.

    Raises:
      BadExample: it is no such list, or all have one rank.
    """
    if not isinstance(answers, list) or len(answers) < 2:
        raise BadExample(
            "`answers` is no list of two or more; accepted: objects of `answer`, `rank`"
        )
    if not all(isinstance(answer, dict) for answer in answers):
        raise BadExample(
            "`answers` holds something else than objects; accepted: objects of `answer` and `rank` "
            "(1 is best), or `score`"
        )
    text = _key(answers, _TEXTS, "text")
    rank = _key(answers, ("rank", *_SCORES), "rank or score")
    sign = 1 if rank == "rank" else -1
    places = []
    for number, answer in enumerate(answers, 1):
        found = answer[rank]
        if isinstance(found, bool) or not isinstance(found, (int, float)) or math.isnan(found):
            raise BadExample(f"`{rank}` of answer {number} is {found!r}; accepted: a number")
        if not isinstance(answer[text], str):
            raise BadExample(f"`{text}` of answer {number} is {answer[text]!r}; accepted: a text")
        for name, value in answer.items():
            if name not in (text, rank) and not is_harmless(name, value, ()):
                raise BadExample(
                    f"`{name}` of answer {number} is neither used nor known to be harmless"
                )
        places.append(sign * found)
    if len(set(places)) == 1:
        raise BadExample(f"all `answers` have the same {rank}, {answers[0][rank]!r}")
    texts = [answer[text] for answer in answers]
    return _pairs(texts, places, ranked)


def of_rejected(chosen: Any, rejected: Sequence[Any], ranked: str) -> list[Candidate]:
    """The pairs of a chosen response and several rejected ones, of which none is better than
    another; the last one counts as the worst.

    Raises:
      BadExample: there are no rejected ones.
    """
    if not rejected:
        raise BadExample("`rejected` is an empty list")
    if ranked == BEST_WORST:
        return [(chosen, rejected[-1], "")]
    return _pairs([chosen, *rejected], [0] + [1] * len(rejected), ranked)


def _pairs(answers: Sequence[Any], places: Sequence[float], ranked: str) -> list[Candidate]:
    best, worst = places.index(min(places)), places.index(max(places))
    if ranked == BEST_WORST:
        return [(answers[best], answers[worst], "")]
    # The places in the list name a pair, so that it has the same id whatever else is listed.
    every = itertools.product(range(len(answers)), repeat=2)
    return [
        (answers[i], answers[j], f"/{i + 1}-{j + 1}")
        for i, j in every
        if places[i] < places[j] and (ranked == ALL or i == best)
    ]


def _key(answers: Sequence[Mapping[str, Any]], known: Sequence[str], what: str) -> str:
    """The first of the known keys that all answers have."""
    for key in known:
        if all(answer.get(key) is not None for answer in answers):
            return key
    found = ", ".join(sorted({str(key) for answer in answers for key in answer}))
    raise BadExample(
        f"`answers` have no {what} in common; keys found: {found}; accepted: {', '.join(known)}"
    )
