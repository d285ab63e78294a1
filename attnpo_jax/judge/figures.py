"""What a judge did on a prepared dataset, in numbers: its verdicts, and where it looked.

Shapes: S judge layers, T a response's text tokens.
"""

import dataclasses
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data.pair import SIDES
from attnpo_jax.runtime.intervals import Estimate
from attnpo_jax.weighting import MIN_TOKENS_FOR_SINK_FIX


def shares(attention_2ST: np.ndarray) -> np.ndarray:
    """Each token's share of a response's raw attention (2, S, T), by layer: float64 (S, T).

    Each judge order's, uniform where there is no attention, then the mean of both.
    """
    attention = attention_2ST.astype(np.float64)
    total = attention.sum(axis=-1, keepdims=True)
    uniform = 1 / attention.shape[-1]
    return np.where(total > 0, attention / np.where(total > 0, total, 1), uniform).mean(axis=0)


def fixed(share_ST: np.ndarray) -> np.ndarray:
    """The shares as `weighting.attention` has them by default: the first token's at the mean."""
    T = share_ST.shape[1]
    if T < MIN_TOKENS_FOR_SINK_FIX:
        return share_ST
    rest = share_ST[:, 1:]
    total = rest.sum(axis=1, keepdims=True)
    rest = np.where(total > 0, rest / np.where(total > 0, total, 1), 1 / (T - 1)) * (1 - 1 / T)
    return np.concatenate([np.full((len(share_ST), 1), 1 / T), rest], axis=1)


def effective_share(share_ST: np.ndarray) -> np.ndarray:
    """How many of T tokens count, as a share of them: exp(entropy) / T, (S,).

    1 where all weigh the same, 1/T where one token has it all.
    """
    logs = np.log(share_ST, where=share_ST > 0, out=np.zeros_like(share_ST))
    return np.exp(-(share_ST * logs).sum(axis=-1)) / share_ST.shape[1]


def gap(chosen_ST: np.ndarray, rejected_ST: np.ndarray) -> np.ndarray:
    """How far two responses' weights of the same tokens are apart, (S,): 0 alike, 1 on no token
    both.

    The sum of |w_c - w_r| over the sum of w_c + w_r; NaN without any weight. What both responses
    begin with drops out of DPO's loss. With token weights it drops out only where this is 0.
    """
    total = (chosen_ST + rejected_ST).sum(axis=1)
    apart = np.abs(chosen_ST - rejected_ST).sum(axis=1)
    return np.where(total > 0, apart / np.where(total > 0, total, 1), np.nan)


@dataclasses.dataclass(frozen=True)
class VerdictFigures:
    """What the judge answered."""

    # Share of pairs whose verdict prefers the chosen response in both orders, in one, in none.
    both: Estimate
    one: Estimate
    none: Estimate
    # Share of pairs where it does so by the sum of both orders, which an answer's place drops out
    # of; a sum of 0 counts half.
    right: Estimate
    signal: Estimate  # mean log-odds for the chosen response over both orders
    # Mean log-odds for the letter A over both orders; 0 for a judge that does not care where an
    # answer stands.
    position_bias: Estimate

    @property
    def carries(self) -> bool:
        """Whether the verdicts are right more often than a coin, as far as these pairs tell."""
        return self.right.low > 0.5


@dataclasses.dataclass(frozen=True)
class LayerFigures:
    """How a layer's weights lie, with the sink fix."""

    effective_share: Estimate  # of responses of two tokens or more; see the function
    first_token: Estimate  # share of the weight that the first token has before the sink fix
    # See `gap`: over the tokens that both responses begin with, as far as they do.
    prefix_gap: Estimate


@dataclasses.dataclass(frozen=True)
class JudgeFigures:
    """What the judge did on a dataset.

    Attributes:
      verdict: None if verdicts were not asked for.
      layers: one a judge layer.
      shared: how many pairs' responses begin with a token that both have.
    """

    verdict: VerdictFigures | None
    layers: tuple[LayerFigures, ...]
    shared: int


def judge_figures(
    dataset: Iterable[Mapping[str, Any]], groups: Sequence[Hashable] | None = None
) -> JudgeFigures:
    """Sums up judgements.

    Args:
      dataset: rows of a prepared dataset, at least one.
      groups: a row's group; rows of one are no independent pairs, so their mean counts once. None:
        each row is its own.
    """
    verdicts, layers, shared = [], [], 0
    for row in dataset:
        verdicts.append(row.get("judge_verdict", (np.nan, np.nan)))
        own = [shares(row[f"judge_{side}"]) for side in SIDES]
        weights = [fixed(share_ST) * share_ST.shape[1] for share_ST in own]
        long = [w_ST / w_ST.shape[1] for w_ST in weights if w_ST.shape[1] > 1]
        nothing = np.full(len(own[0]), np.nan)
        effective = np.mean([effective_share(w_ST) for w_ST in long], axis=0) if long else nothing
        first = np.mean([share_ST[:, 0] for share_ST in own], axis=0)
        n = _shared_tokens(row)
        shared += n > 0
        apart = gap(*(w_ST[:, :n] for w_ST in weights)) if n else nothing
        layers.append(np.stack([effective, first, apart]))
    verdict_N2, values_N3S = np.asarray(verdicts, np.float64), np.stack(layers)
    groups = range(len(verdict_N2)) if groups is None else groups

    def estimate(values) -> Estimate:
        return Estimate.of_mean(by_group(values, groups))

    by_layer = [
        LayerFigures(*(estimate(values_N3S[:, k, layer]) for k in range(3)))
        for layer in range(values_N3S.shape[2])
    ]
    asked = not np.isnan(verdict_N2).all()
    of_verdicts = _verdict_figures(verdict_N2, estimate) if asked else None
    return JudgeFigures(of_verdicts, tuple(by_layer), int(shared))


def _verdict_figures(verdict_N2: np.ndarray, estimate) -> VerdictFigures:
    right_N = (verdict_N2 > 0).sum(axis=1)
    together_N = verdict_N2.mean(axis=1)
    return VerdictFigures(
        *(estimate(right_N == k) for k in (2, 1, 0)),
        right=estimate((np.sign(together_N) + 1) / 2),
        signal=estimate(together_N),
        # Order 0 has the chosen answer at A, order 1 at B.
        position_bias=estimate((verdict_N2 * [1, -1]).mean(axis=1)),
    )


def by_group(values: np.ndarray, groups: Sequence[Hashable]) -> np.ndarray:
    """The groups' means (G, ...) of values (N, ...), in order of first appearance; NaNs are left
    out, and a group that has nothing else is NaN.

    >>> by_group(np.array([1.0, 2.0, 5.0]), ["a", "b", "a"]).tolist()
    [3.0, 2.0]
    """
    values = np.asarray(values, np.float64)
    places = {group: place for place, group in enumerate(dict.fromkeys(groups))}
    of_row = np.array([places[group] for group in groups])
    known = ~np.isnan(values)
    sums, counts = (np.zeros((len(places), *values.shape[1:])) for _ in range(2))
    np.add.at(sums, of_row, np.where(known, values, 0.0))
    np.add.at(counts, of_row, known)
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)


def _shared_tokens(row: Mapping[str, Any]) -> int:
    """How many text tokens both responses begin with."""
    texts = [row[f"{side}_ids"][: row[f"{side}_text_length"]] for side in SIDES]
    n = min(map(len, texts))
    differs = np.flatnonzero(texts[0][:n] != texts[1][:n])
    return int(differs[0]) if len(differs) else n
