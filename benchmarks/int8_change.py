"""What int8 projections change of a prepared dataset, against the same prepared in full."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.judge.figures import shares

Row = Mapping[str, Any]


def change(full: Iterable[Row], other: Iterable[Row], layers: Sequence[int]) -> dict[str, Any]:
    """Differences between two prepared datasets of the same pairs.

    Args:
      full, other: their rows, in the same order.
      layers: the layers whose attention both kept.

    Returns:
      `figures`: the magnitude of the change of log-probs (nats a token: mean and 99th percentile;
      of the difference between a pair's responses) and of verdicts (nats), and how many verdicts
      change their letter. `points`, by layer: the share of a response's weight that lies on
      other tokens (half the sum of the magnitudes), and the correlation of its weights.
    """
    logps, margins, verdicts, letters = [], [], [], []
    moved: list[list[float]] = [[] for _ in layers]
    correlations: list[list[float]] = [[] for _ in layers]
    for a, b in zip(full, other, strict=True):
        by_side = [b[name] - a[name] for name in ("ref_chosen_logps", "ref_rejected_logps")]
        logps += [np.abs(difference) for difference in by_side]
        margins.append(abs(float(by_side[0].sum() - by_side[1].sum())))
        verdicts.append(np.abs(b["judge_verdict"] - a["judge_verdict"]))
        letters.append((b["judge_verdict"] > 0) != (a["judge_verdict"] > 0))
        for side in ("judge_chosen", "judge_rejected"):
            weights = shares(a[side]), shares(b[side])
            for layer, (before, after) in enumerate(zip(*weights, strict=True)):
                moved[layer].append(float(np.abs(after - before).sum()) / 2)
                if before.std() > 0 and after.std() > 0:
                    correlations[layer].append(float(np.corrcoef(before, after)[0, 1]))
    tokens = np.concatenate(logps)
    figures = {
        "nats_a_token": float(tokens.mean()),
        "nats_a_token_99th_percentile": float(np.percentile(tokens, 99)),
        "nats_a_pairs_difference": statistics.mean(margins),
        "nats_a_verdict": float(np.concatenate(verdicts).mean()),
        "verdicts": int(np.concatenate(letters).size),
        "verdicts_changed": int(np.concatenate(letters).sum()),
    }
    points = [
        {
            "layer": number,
            "share_moved": statistics.mean(moved[k]),
            "share_moved_at_most": max(moved[k]),
            "correlation": statistics.mean(correlations[k]),
            "correlation_at_least": min(correlations[k]),
        }
        for k, number in enumerate(layers)
    ]
    return {"figures": figures, "points": points}
