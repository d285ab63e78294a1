"""What the judge did on a prepared dataset, in numbers."""

import dataclasses

import numpy as np

from attnpo_jax.data import prepared


def shares(attention_2ST: np.ndarray) -> np.ndarray:
    """Each token's share of a response's raw attention (2, S, T), by layer: float64 (S, T).

    Each judge order's, uniform where there is no attention, then the mean of both.
    """
    attention = attention_2ST.astype(np.float64)
    total = attention.sum(axis=-1, keepdims=True)
    uniform = 1 / attention.shape[-1]
    return np.where(total > 0, attention / np.where(total > 0, total, 1), uniform).mean(axis=0)


@dataclasses.dataclass(frozen=True)
class JudgeFigures:
    """What the judge did on a dataset."""

    # Share of pairs whose verdict prefers the chosen response in (both orders, one order, none);
    # None if verdicts were not asked for.
    agreement: tuple[float, float, float] | None
    # Mean log-odds for the letter A over both orders; 0 for a judge that does not care where an
    # answer stands; None likewise.
    position_bias: float | None
    # Per layer, mean entropy of a response's weights before the sink fix, as a share of the uniform
    # weights' entropy (responses of one token left out).
    entropy: tuple[float, ...]
    first_token: tuple[float, ...]  # per layer, mean share of the weight that the first token has


def judge_figures(dataset: prepared.Prepared) -> JudgeFigures:
    """Sums up a prepared dataset's judgements."""
    verdicts = np.zeros((len(dataset), 2))
    entropies, firsts = [], []
    for i, row in enumerate(dataset):
        verdicts[i] = row.get("judge_verdict", np.nan)
        for side in ("judge_chosen", "judge_rejected"):
            share_ST = shares(row[side])
            firsts.append(share_ST[:, 0])
            if (n := share_ST.shape[1]) > 1:
                logs = np.log(share_ST, where=share_ST > 0, out=np.zeros_like(share_ST))
                entropies.append(-(share_ST * logs).sum(axis=-1) / np.log(n))
    right = (verdicts > 0).sum(axis=1)
    asked = not np.isnan(verdicts).all()
    return JudgeFigures(
        agreement=tuple(float(np.mean(right == k)) for k in (2, 1, 0)) if asked else None,
        # Order 0 has the chosen answer at A, order 1 at B.
        position_bias=float(np.mean(verdicts * [1, -1])) if asked else None,
        entropy=tuple(np.mean(entropies, axis=0).tolist()) if entropies else (),
        first_token=tuple(np.mean(firsts, axis=0).tolist()),
    )
