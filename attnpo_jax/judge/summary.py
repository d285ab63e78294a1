"""What a judge did, in words."""

from collections.abc import Sequence

from attnpo_jax.judge.figures import JudgeFigures
from attnpo_jax.runtime.intervals import Estimate
from attnpo_jax.weighting.sources import ROLLOUT, Source, head_of


def percent(estimate: Estimate) -> str:
    """A share with its interval.

    >>> percent(Estimate(0.25, 0.102, 0.5))
    '25% (10 to 50)'
    """
    value, low, high = (100 * x for x in estimate)
    return f"{value:.0f}%" + (f" ({low:.0f} to {high:.0f})" if low == low else "")


def log_odds(estimate: Estimate) -> str:
    """Log-odds with their interval."""
    value, low, high = estimate
    return f"{value:+.2f}" + (f" ({low:+.2f} to {high:+.2f})" if low == low else "")


def summary_lines(figures: JudgeFigures, layers: Sequence[Source]) -> list[tuple[str, str]]:
    """What is measured and what came of it, line by line; in brackets 95% intervals over pairs.

    Of single heads, of which there may be hundreds, it says nothing.
    """
    lines = []
    if (verdict := figures.verdict) is not None:
        agrees = f"both orders {percent(verdict.both)}, one {percent(verdict.one)}"
        lines += [
            ("verdict agrees with the label", f"{agrees}, none {percent(verdict.none)}"),
            ("by both orders together", f"right in {percent(verdict.right)}"),
            ("log-odds for the chosen answer", log_odds(verdict.signal)),
            ("position bias, log-odds for A", log_odds(verdict.position_bias)),
        ]
    for layer, of_layer in zip(layers, figures.layers, strict=True):
        if head_of(layer) is not None:
            continue
        parts = [
            f"effective share {of_layer.effective_share.value:.0%}",
            f"first token {of_layer.first_token.value:.0%}",
        ]
        if figures.shared:
            parts.append(f"apart on shared starts {of_layer.prefix_gap.value:.0%}")
        name = ROLLOUT if layer == ROLLOUT else f"layer {layer}"
        lines.append((f"weights of {name}", ", ".join(parts)))
    return lines
