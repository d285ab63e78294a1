"""The shown pairs as JSON values, which `assets/page.js` shows token by token.

`codes` has the form of the numbers. Of a response, null for what is not known:

- `n` tokens, of which the first `text` are its text;
- `tokens`: their places in `vocabulary`;
- `attention`, by layer: the judge's shares of the text tokens times their number, with the chosen
  response first; then how much more they are with it last, so that what sets the orders apart is
  kept as exactly as they are;
- `views`: weights by view;
- `reference`: the reference's log-probs; `ratio`: the trained model's less these, or, without the
  reference, `policy`: these themselves.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data.pair import SIDES
from attnpo_jax.report import codes
from attnpo_jax.report.facts import SPLITS
from attnpo_jax.report.numbers import FIGURES, PairNumbers
from attnpo_jax.report.page import as_json
from attnpo_jax.report.shown import Shown, TokenTexts, common_ends, spread, without
from attnpo_jax.report.views import View
from attnpo_jax.runtime.printable import printable
from attnpo_jax.weighting import MIN_TOKENS_FOR_SINK_FIX

_LONGEST_PROMPT = 2000  # characters; of a longer prompt, the last ones


def estimate(shown: Shown, num_views: int) -> np.ndarray:
    """Bytes that each pair takes in a page, at most for texts in English: int (pairs,)."""
    of = shown.lengths()
    numbers = 2 * len(shown.source_layers) + 2 + num_views
    tokens = of["chosen"] + of["rejected"]
    return 400 + np.minimum(_LONGEST_PROMPT, 5 * of["prompt"]) + (3 + 2 * numbers) * tokens


def fitting(sizes: np.ndarray, room: int) -> np.ndarray:
    """Which pairs fit in so many bytes, spread evenly over all of them: int, ascending.

    >>> fitting(np.array([5, 5, 5, 5, 5]), 16).tolist()
    [0, 2, 4]
    """
    most = len(sizes)
    while most and sizes[places := spread(len(sizes), most)].sum() > room:
        # At least one less each time, and about as many less as there are bytes too many.
        share = room / max(sizes[places].sum(), 1)
        most = max(0, min(most - 1, math.floor(most * share) + 1))
    return spread(len(sizes), most)


def page_data(
    shown: Shown,
    views: Sequence[View],
    numbers: Sequence[PairNumbers],
    texts: TokenTexts,
    policy: str,
    room: int,
) -> dict[str, Any]:
    """All that the page's script reads; fewer pairs where they would take more than `room` bytes.

    Args:
      shown: the pairs, at least one.
      views: the weightings, each with numbers or the reason why there are none.
      numbers: of each pair.
      texts: what tokens say.
      policy: what the trained model is called; "" where it is not at hand.
      room: for it in the page.
    """
    vocabulary: dict[str, int] = {}
    rows = [shown[place] for place in range(len(shown))]
    ends = common_ends([row["prompt_ids"] for row in rows])
    entries = [
        _entry(split, row, views, of_pair, ends, texts, vocabulary)
        for (split, _), row, of_pair in zip(shown.places, rows, numbers, strict=True)
    ]
    opening, closing = map(texts.joined, ends)
    data = {
        "layers": list(shown.source_layers),
        "sink": MIN_TOKENS_FOR_SINK_FIX,
        "views": [_view(view) for view in views],
        "policy": printable(policy),
        "opening": opening,
        "closing": closing,
        "vocabulary": list(vocabulary),
    }
    sizes = np.array([_size(one) + 1 for one in entries])
    kept = fitting(sizes, room - _size(data) - len(',"pairs":[]'))
    return data | {"pairs": [entries[place] for place in kept]}


def _size(value: Any) -> int:
    """The bytes that JSON takes in a page."""
    return len(as_json(value).encode())


def _view(view: View) -> dict[str, Any]:
    texts = {name: getattr(view, name) for name in ("key", "label", "about", "missing")}
    return {name: text and printable(text) for name, text in texts.items()}


def _entry(
    split: str,
    row: Mapping[str, Any],
    views: Sequence[View],
    numbers: PairNumbers,
    ends: tuple[list[int], list[int]],
    texts: TokenTexts,
    vocabulary: dict[str, int],
) -> dict[str, Any]:
    prompt = texts.joined(without(row["prompt_ids"].tolist(), *ends))
    if len(prompt) > _LONGEST_PROMPT:
        prompt = f"…{prompt[-_LONGEST_PROMPT:]}"
    verdict = row.get("judge_verdict")
    return {
        "id": printable(row["id"]),
        "split": SPLITS[split],
        "prompt": prompt,
        "verdict": None if verdict is None else _known(verdict),
        "figures": _figures(row, numbers),
        "responses": [_response(side, row, views, numbers, texts, vocabulary) for side in (0, 1)],
    }


def _figures(row: Mapping[str, Any], numbers: PairNumbers) -> dict[str, float | None]:
    """The pair's loss and margin, of the trained model where it is at hand, and its change: the
    mean size of the tokens' log-ratios of the trained model to the reference.
    """
    found = numbers.before if numbers.after is None else numbers.after
    named = {} if found is None else dict(zip(FIGURES, found.tolist(), strict=True))
    apart = _log_ratios(row, numbers)
    change = None if apart is None else float(np.abs(np.concatenate(apart)).mean())
    values = {
        "loss": named.get("loss"),
        "margin": named.get("rewards/margins"),
        "weighted": named.get("rewards/weighted_margins"),
        "change": change,
    }
    return {name: None if x is None else _known([x])[0] for name, x in values.items()}


def _log_ratios(row: Mapping[str, Any], numbers: PairNumbers) -> list[np.ndarray] | None:
    """The tokens' log-ratios of the trained model to the reference, of both responses."""
    if numbers.policy is None or f"ref_{SIDES[0]}_logps" not in row:
        return None
    return [numbers.policy[k] - row[f"ref_{side}_logps"] for k, side in enumerate(SIDES)]


def _known(values: Any) -> list[float | None]:
    """Numbers to four digits, null for what is none."""
    return [float(f"{x:.4g}") if math.isfinite(x) else None for x in map(float, values)]


def _response(
    side: int,
    row: Mapping[str, Any],
    views: Sequence[View],
    numbers: PairNumbers,
    texts: TokenTexts,
    vocabulary: dict[str, int],
) -> dict[str, Any]:
    name = SIDES[side]
    ids = row[f"{name}_ids"].tolist()
    places = [vocabulary.setdefault(texts(token), len(vocabulary)) for token in ids]
    weights = [numbers.weights.get(view.key) for view in views]
    reference, apart, policy = (
        row.get(f"ref_{name}_logps"),
        _log_ratios(row, numbers),
        numbers.policy,
    )
    return {
        "n": len(ids),
        "text": row[f"{name}_text_length"],
        "tokens": codes.indices(np.array(places)),
        "attention": [codes.numbers(x) for x in attention_weights(row.get(f"judge_{name}"))],
        "views": [None if both is None else codes.numbers(both[side]) for both in weights],
        "reference": None if reference is None else codes.numbers(reference),
        "ratio": None if apart is None else codes.numbers(apart[side]),
        "policy": None if apart is not None or policy is None else codes.numbers(policy[side]),
    }


def attention_weights(attention_2ST: np.ndarray | None) -> np.ndarray:
    """The shares of the raw attention times the number of tokens, by layer: of order 0, then those
    of order 1 less these: (2 S, T).

    Where a row has no attention, all are 1, as weightings have it.
    """
    if attention_2ST is None:
        return np.zeros((0, 0))
    attention = attention_2ST.astype(np.float64)
    total = attention.sum(axis=-1, keepdims=True)
    tokens = attention.shape[-1]
    first, second = np.where(total > 0, attention * tokens / np.where(total > 0, total, 1), 1.0)
    return np.concatenate([first, second - first])
