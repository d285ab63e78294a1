"""Writes the builtin prompts with checks, `data/builtin/checks-*.jsonl`: always the same.

python -m attnpo_jax.evaluate.checks.builtin FOLDER
"""

import pathlib
import random
import sys
from typing import Any

from attnpo_jax.evaluate.checks import own_tasks, tasks
from attnpo_jax.evaluate.checks.wordings import wording
from attnpo_jax.runtime import atomic

SPLITS = ("train", "eval")
# What may stand before the task, since its wordings point at nothing that was said; and how often.
_IN_FRONT = set(
    "bullets capitals distinct_words excludes json_list json_object lines paragraphs quoted "
    "sentence_length sentences small_letters table without word_length words".split()
)
_OFTEN = 0.4


def rows(split: str) -> list[dict[str, Any]]:
    """The prompts of a split with their checks, mixed, so that the first ones are of many kinds."""
    draw = random.Random(f"checks-{split}")
    general = tasks.GENERAL[split].strip().splitlines()
    forms = tasks.FORMS[split]
    if len(general) < len(forms):
        raise ValueError(f"{split}: {len(general)} general tasks for {len(forms)} forms")
    pairs = [*zip(draw.sample(general, len(forms)), forms, strict=True), *own_tasks.OWN[split]]
    seen: dict[str, int] = {}
    made = []
    for task, checks in pairs:
        if "repeats" in checks:
            checks = checks | {"repeats": {"text": task}}
        asked = []
        for kind, parameters in checks.items():
            seen[kind] = seen.get(kind, -1) + 1
            asked.append(wording(kind, parameters, seen[kind]))
        in_front = draw.random() < _OFTEN and _IN_FRONT.issuperset(checks)
        parts = [*asked, task] if in_front else [task, *asked]
        made.append(
            {
                "prompt": " ".join(parts),
                "checks": [{"kind": kind, **parameters} for kind, parameters in checks.items()],
            }
        )
    draw.shuffle(made)
    return [{"id": f"checks-{split}-{i:03}", **row} for i, row in enumerate(made, 1)]


def main(folder: str) -> None:
    """Writes both files into a folder."""
    for split in SPLITS:
        atomic.write_json_lines(pathlib.Path(folder) / f"checks-{split}.jsonl", rows(split))


if __name__ == "__main__":
    main(*sys.argv[1:])
