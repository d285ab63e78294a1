"""Prompts that ask for one thing which a program checks: kinds, tasks, wordings.

Tasks are the general ones of the builtin checks: those of `train` to train on, those of `eval` held
out. The held-out prompts ask for other values of the parameters too, where a kind has some.
"""

import random
from typing import Any

from attnpo_jax.evaluate.checks import tasks
from attnpo_jax.evaluate.checks.wordings import wording

# By kind, the parameters that training prompts ask for, and those of the held-out ones. Eight are
# taken, by their rates.
CANDIDATES: dict[str, dict[str, list[dict[str, Any]]]] = {
    "without": {"train": [{"characters": ","}], "eval": [{"characters": ","}]},
    "words": {"train": [{"most": 40}, {"most": 60}], "eval": [{"most": 50}]},
    "sentences": {
        "train": [{"least": 2, "most": 2}, {"least": 4, "most": 4}],
        "eval": [{"least": 3, "most": 3}],
    },
    "bullets": {
        "train": [{"least": 3, "most": 3}, {"least": 5, "most": 5}],
        "eval": [{"least": 4, "most": 4}],
    },
    "numbered": {"train": [{"items": 3}, {"items": 5}], "eval": [{"items": 4}]},
    "lines": {
        "train": [{"least": 3, "most": 3}, {"least": 5, "most": 5}],
        "eval": [{"least": 4, "most": 4}],
    },
    "questions": {"train": [{"least": 1}, {"least": 2}], "eval": [{"least": 1, "most": 2}]},
    "starts_with": {
        "train": [{"text": "Well"}, {"text": "To begin with"}],
        "eval": [{"text": "First of all"}],
    },
    "ends_with": {"train": [{"text": "Enjoy!"}], "eval": [{"text": "Good luck!"}]},
    "excludes": {
        "train": [{"phrases": ["is"]}, {"phrases": ["and"]}],
        "eval": [{"phrases": ["to"]}],
    },
    "sentence_length": {"train": [{"most": 12}, {"most": 16}], "eval": [{"most": 14}]},
    "capital_words": {"train": [{"least": 1}, {"least": 2}], "eval": [{"least": 1, "most": 3}]},
}
PER_KIND = {"train": 30, "eval": 12, "rates": 6}
KINDS = 8


def rows(split: str, kinds: list[str] | None = None, most: int | None = None) -> list[dict]:
    """The prompts of a split with their checks, mixed; always the same.

    Args:
      split: `train`, `eval`, or `rates`: training prompts that say which kinds are taken.
      kinds: those to ask for; None for all candidates.
      most: prompts of each kind, at most.
    """
    of = "train" if split == "rates" else split
    draw = random.Random(f"iterate-{split}")
    made = []
    for kind in kinds or CANDIDATES:
        chosen = CANDIDATES[kind][of]
        for k, task in enumerate(draw.sample(_tasks(of), min(PER_KIND[split], most or 10**6))):
            parameters = chosen[k % len(chosen)]
            asked = wording(kind, parameters, k)
            text = f"{task} {asked}" if draw.random() < 0.5 else f"{asked} {task}"
            row = {"id": f"{split}-{kind}-{k:02}", "prompt": text}
            made.append(row | {"checks": [{"kind": kind, **parameters}]})
    draw.shuffle(made)
    return made


def _tasks(split: str) -> list[str]:
    return tasks.GENERAL[split].strip().splitlines()


def chosen(rates: dict[str, float]) -> list[str]:
    """The kinds that are taken: those whose rates are nearest one half, in the candidates' order.

    >>> chosen({kind: 0.5 if kind != "words" else 0.0 for kind in CANDIDATES})[:2]
    ['without', 'sentences']
    """
    nearest = sorted(rates, key=lambda kind: abs(rates[kind] - 0.5))[:KINDS]
    return [kind for kind in CANDIDATES if kind in nearest]
