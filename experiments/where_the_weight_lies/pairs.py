"""From the pool of samples to preference pairs, each with the oracle's weights as a column."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.where_the_weight_lies.prompts import Task

MOST_A_PROMPT = 3


def make_pairs(records: Sequence[Mapping[str, Any]], task: Task) -> list[dict[str, Any]]:
    """Pairs of a passing and a failing answer to the same prompt.

    Only finished answers of enough words are paired, each at most once, those first whose lengths
    are closest: otherwise the pairs would mostly teach to answer briefly.

    Args:
      records: of a samples file.
      task: the constraint.

    Returns:
      Rows of a pairs file, with the column `oracle`, see `oracle_column`.
    """
    by_prompt = defaultdict(list)
    for record in records:
        if task.long_enough(record["response"]) and record["finish_reason"] == "stop":
            by_prompt[record["id"]].append(record)
    pairs = []
    for id, answers in by_prompt.items():
        good = [a for a in answers if not task.violations(a["response"])]
        bad = [a for a in answers if task.violations(a["response"])]
        by_distance = sorted(
            ((g, b) for g in good for b in bad),
            key=lambda pair: (
                abs(len(pair[0]["tokens"]) - len(pair[1]["tokens"])),
                pair[0]["sample"],
                pair[1]["sample"],
            ),
        )
        used, of_prompt = set(), 0
        for g, b in by_distance:
            if of_prompt < MOST_A_PROMPT and not used & {g["sample"], b["sample"]}:
                used |= {g["sample"], b["sample"]}
                of_prompt += 1
                pairs.append(_row(f"{id}#{g['sample']}-{b['sample']}", g, b, task))
    return pairs


def _row(id: str, good: Mapping[str, Any], bad: Mapping[str, Any], task: Task) -> dict[str, Any]:
    row = {"id": id, "prompt": good["prompt"]}
    for side, answer in (("chosen", good), ("rejected", bad)):
        row[side] = answer["response"].strip()
        row[f"{side}_tokens"], row[f"{side}_weights_oracle"] = oracle_column(row[side], task)
    return row


def oracle_column(text: str, task: Task) -> tuple[list[str], list[float]]:
    """A text in pieces, and their weights: 1 on violations, 0 elsewhere.

    A text without a violation has weights of 0 alone, which the weighting `column` takes for
    uniform ones.
    """
    pieces, weights, end = [], [], 0
    for start, stop in task.violations(text):
        pieces += [text[end:start], text[start:stop]]
        weights += [0.0, 1.0]
        end = stop
    pieces.append(text[end:])
    weights.append(0.0)
    kept = [(piece, weight) for piece, weight in zip(pieces, weights, strict=True) if piece]
    return [piece for piece, _ in kept], [weight for _, weight in kept]
