"""Annotations as AlpacaEval's weighted annotator makes them, by any endpoint.

The judge says one token, the letter of the better output; how likely it was to say either is the
preference. Which output stands first is drawn from the instruction, as the package draws it: its
annotations and these are interchangeable.
"""

import math
import random
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.evaluate.alpaca_eval.files import JudgePrompt
from attnpo_jax.evaluate.endpoint import Answer, Ask, Endpoint

FIRST, SECOND = "m", "M"  # how the package's prompt calls the outputs
TIE = 1.5
_TOP = 5


def swapped(instruction: str, seed: int) -> bool:
    """Whether the model's output stands first in the judge's prompt."""
    return random.Random(f"is_switched_outputs{instruction}{seed}").choices([False, True])[0]


def preference(top: Mapping[str, float], swap: bool) -> float | None:
    """From 1, the baseline is better, to 2, the model is.

    Args:
      top: log-probs of the likeliest tokens; one that is not there has none.
      swap: whether the outputs were shown in the other order.

    Returns:
      It; None where neither letter is there.
    """
    first, second = top.get(FIRST, -math.inf), top.get(SECOND, -math.inf)
    if first == second == -math.inf:
        return None
    # p(M) / (p(m) + p(M)), each from the one that can't overflow.
    likelier = max(first, second)
    second_wins = math.exp(second - likelier)
    second_wins /= second_wins + math.exp(first - likelier)
    return 2 - second_wins if swap else 1 + second_wins


def annotate(
    pairs: Sequence[Mapping[str, Any]],
    prompt: JudgePrompt,
    judge: Endpoint,
    *,
    annotator: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Annotates pairs; equal outputs are a tie, and the same pair is asked for once.

    Args:
      pairs: see `files.joined`.
      annotator: its name in the annotations.
      seed: of the order of outputs.

    Returns:
      The pairs with `annotator`, `preference` (None where the judge said neither letter) and
      `preference_raw_completion`, in the forms that the package reads.
    """
    asks: dict[tuple[str, str, str], Ask] = {}
    for pair in pairs:
        first, second = pair["output_1"], pair["output_2"]
        if first == second:
            continue
        key = (pair["instruction"], first, second)
        if swapped(pair["instruction"], seed):
            first, second = second, first
        asks.setdefault(
            key,
            Ask(
                id=str(len(asks)),
                messages=prompt.messages(
                    instruction=pair["instruction"], output_1=first, output_2=second
                ),
                max_tokens=1,
                # As the package asks. It leaves the log-probs as they are, where 0 does not for
                # every server.
                temperature=1.0,
                top_logprobs=_TOP,
            ),
        )
    answers = dict(zip(asks, judge.ask(list(asks.values())), strict=True))
    annotations = []
    for pair in pairs:
        answer = answers.get((pair["instruction"], pair["output_1"], pair["output_2"]))
        found: float | None = TIE
        if answer is not None:
            top = answer.top_logprobs[0] if answer.top_logprobs else {}
            found = preference(top, swapped(pair["instruction"], seed))
        annotations.append(
            {
                **pair,
                "annotator": annotator,
                "preference": found,
                "preference_raw_completion": None if answer is None else _completion(answer),
            }
        )
    return annotations


def _completion(answer: Answer) -> dict[str, Any]:
    """An answer as the package keeps it, which can read the preference out of it again."""
    content = [
        {
            "token": answer.text,
            "logprob": top.get(answer.text),
            "top_logprobs": [{"token": one, "logprob": value} for one, value in top.items()],
        }
        for top in answer.top_logprobs
    ]
    return {
        "finish_reason": answer.finish_reason,
        "logprobs": {"content": content},
        "text": answer.text,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
