"""What a probe's choice comes to, in sentences."""

from attnpo_jax.judge.figures import VerdictFigures
from attnpo_jax.judge.summary import log_odds, percent
from attnpo_jax.probe.choice import LEAST, Choice, Comparison
from attnpo_jax.probe.figures import Alone
from attnpo_jax.runtime.intervals import Estimate


def sentences(
    choice: Choice | None, verdict: VerdictFigures | None, alone: Alone | None, groups: int
) -> list[str]:
    """What to set, and why.

    Args:
      choice: what the marks speak for; None where there are too few.
      verdict: the judge's verdicts.
      alone: of the picked layer, or else of the last; None where it was not measured.
      groups: marked items.
    """
    found = _of_choice(choice) if choice else [_too_few(groups)]
    if alone is not None:
        found.append(
            f"judged against itself, a wrong answer keeps {percent(alone.kept)} of the lift on its "
            "marks: that much is for what they say, and not for being wrong"
        )
    if verdict is not None:
        found.append(_of_verdict(verdict))
    return found


def _too_few(groups: int) -> str:
    return f"no recommendation: {groups} marked items; {2 * LEAST} are needed, for two halves"


def _of_choice(choice: Choice) -> list[str]:
    first, second = choice.halves
    last, picked = choice.over_last, f"layer {choice.picked}"
    if last.name == last.other:
        layer = f"the last layer is the best one of {first} items"
    elif last.better:
        layer = (
            f"{picked} is the best one of {first} items; on {second} others its AUC is "
            f"{number(last.auc)}, {signed(last.difference)} to the last layer's"
        )
    else:
        layer = (
            f"nothing better than the last layer: {picked}, the best one of {first} items, has "
            f"{signed(last.difference)} to its AUC on {second} others"
        )
    fix = choice.over_raw
    return [
        f"weighting.layer={choice.layer}: {layer}",
        f"weighting.fix_sink={choice.fix_sink}: AUC {signed(fix.difference)} to leaving it out",
        f"weights without attention: {_baselines(choice)}",
        f"with diff: {_compared(choice.over_diff)}",
        *([_of_heads(choice)] if choice.over_layer else []),
        f"position divided out: AUC of {picked} {number(choice.at_place)}, "
        + ("so it finds more than places" if choice.at_place.low > 0.5 else "so no more than 1/2"),
    ]


def _baselines(choice: Choice) -> str:
    """Which of them the picked layer is better than, and which not."""
    better = [one.other for one in choice.over_baselines if one.better]
    rest = [one for one in choice.over_baselines if not one.better]
    parts = [f"layer {choice.picked} is better than {' and '.join(better)}"] if better else []
    parts += [f"nothing better than {one.other} ({_compared(one)})" for one in rest]
    return "; ".join(parts)


def _of_heads(choice: Choice) -> str:
    """The best group of heads, and how to have it."""
    better = choice.over_layer.better
    how = f"; judge.layers and weighting.layer={choice.group}" if better else ""
    return f"single heads: {_compared(choice.over_layer)}{how}"


def _compared(one: Comparison) -> str:
    how = "better" if one.better else "worse" if one.worse else "no different"
    return f"{one.name} is {how}, {signed(one.difference)} to the AUC of {one.other}"


def _of_verdict(verdict: VerdictFigures) -> str:
    how = (
        "the verdicts carry something"
        if verdict.carries
        else "the verdicts carry nothing that these pairs show"
    )
    return (
        f"{how}: right in {percent(verdict.right)} by both orders together; "
        f"{log_odds(verdict.position_bias)} log-odds for A, {log_odds(verdict.signal)} for the "
        "chosen answer"
    )


def number(estimate: Estimate) -> str:
    """An AUC with its interval.

    >>> number(Estimate(0.915, 0.9, 0.93))
    '.915 (.900 to .930)'
    """
    value, low, high = (f"{x:.3f}".removeprefix("0") for x in estimate)
    return f"{value} ({low} to {high})"


def signed(estimate: Estimate) -> str:
    """A difference of AUCs with its interval.

    >>> signed(Estimate(0.081, -0.02, 0.1))
    '+.081 (-.020 to +.100)'
    """
    value, low, high = (f"{x:+.3f}".replace("0.", ".", 1) for x in estimate)
    return f"{value} ({low} to {high})"
