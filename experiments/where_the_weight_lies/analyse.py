"""Tables and a plot from the committed runs; see README.md.

python -m experiments.where_the_weight_lies.analyse
python -m experiments.where_the_weight_lies.analyse --workdir=DIR      # and where the weights lie
python -m experiments.where_the_weight_lies.analyse --against=RESULTS  # a rerun with what is here
"""

import argparse
import json
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy import stats

from attnpo_jax.runtime import figures, intervals
from experiments.where_the_weight_lies.arms import ARMS, PRIMARY, SECONDARY, SEEDS
from experiments.where_the_weight_lies.results import Results, write_json

HERE = pathlib.Path(__file__).parent
_SHOWN = ("pass", "finished", "tokens", "violations")


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p-values of several comparisons (Holm 1979), in their order.

    >>> [round(p, 3) for p in holm([0.01, 0.04, 0.03])]
    [0.03, 0.06, 0.06]
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, k in enumerate(np.argsort(p_values, kind="stable")):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[k]))
        adjusted[k] = least
    return adjusted


def compared(baseline: np.ndarray, arm: np.ndarray) -> dict[str, Any]:
    """Two arms at the same seeds, on the same prompts.

    Args:
      baseline, arm: (seeds, prompts), pass rates from 0 to 1.

    Returns:
      `difference` of the means; `interval`, Student's over seeds; `p`, of the paired t-test over
      seeds; `interval_with_prompts`, of seeds and prompts resampled.
    """
    by_seed = (arm - baseline).mean(axis=1)
    spread = float(by_seed.std(ddof=1)) if len(by_seed) > 1 else 0.0
    t = by_seed.mean() / (spread / math.sqrt(len(by_seed))) if spread else math.nan
    return {
        "difference": float(by_seed.mean()),
        "by_seed": by_seed.tolist(),
        "interval": intervals.student(by_seed),
        "p": float(2 * stats.t.sf(abs(t), len(by_seed) - 1)) if spread else 1.0,
        "interval_with_prompts": intervals.crossed_difference(baseline, arm),
    }


def summary(results: Results, task: str, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """What the runs on the held-out prompts come to; arms that lack a seed are left out.

    Args:
      results: the runs.
      task: whose.
      chosen: the settings, see `run.best_setting`.

    Returns:
      `arms`: of each its setting and the means over seeds; `missing`: those not finished;
      `primary`, `secondary`: see `compared`, with `p_holm` in the secondary ones.
    """
    arms, passes, missing = {}, {}, []
    for arm in ARMS:
        setting = chosen.get(f"{task}/{arm}")
        rows = [_row(results, task, arm, setting, seed) for seed in SEEDS if setting]
        if not rows or None in rows:
            missing.append(arm)
            continue
        means = {name: float(np.mean([row[name] for row in rows])) for name in _SHOWN}
        spread = intervals.student([row["pass"] for row in rows])
        arms[arm] = {**setting, **means, "pass_interval": spread}
        arms[arm]["passes_by_seed"] = [row["pass"] for row in rows]
        passes[arm] = np.array([row["passes"] for row in rows]) / rows[0]["samples"]
    known = [pair for pair in SECONDARY if set(pair) <= set(passes)]
    secondary = [{"baseline": a, "arm": b, **compared(passes[a], passes[b])} for a, b in known]
    for one, p in zip(secondary, holm([one["p"] for one in secondary]), strict=True):
        one["p_holm"] = p
    a, b = PRIMARY
    primary = None
    if {a, b} <= set(passes):
        primary = {"baseline": a, "arm": b, **compared(passes[a], passes[b])}
    base = results.find(task=task, arm="base", beta=0.0, learning_rate=0.0, seed=0, split="test")
    return {
        "task": task,
        "base": base and {name: base[name] for name in _SHOWN},
        "arms": arms,
        "missing": missing,
        "primary": primary,
        "secondary": secondary,
    }


def _row(results: Results, task: str, arm: str, setting: Mapping[str, float], seed: int):
    key = {"beta": setting["beta"], "learning_rate": setting["learning_rate"]}
    return results.find(task=task, arm=arm, seed=seed, split="test", **key)


@figures.style()
def plot(found: Mapping[str, Any], file: pathlib.Path) -> None:
    """Pass rates by arm: a dot a seed, the mean with its interval, the base model as a line."""
    figure, (axes,) = figures.new_figure(height=3.2)
    names = list(found["arms"])
    for place, name in enumerate(names):
        arm = found["arms"][name]
        axes.plot(
            arm["passes_by_seed"], [place] * len(SEEDS), "o", color=figures.COLOURS[0], alpha=0.5
        )
        axes.plot(arm["pass_interval"], [place, place], color="black", lw=1.5)
        axes.plot(arm["pass"], place, "|", color="black", ms=14, mew=2)
    if found["base"]:
        axes.axvline(found["base"]["pass"], color=figures.GREY, ls="--", lw=1)
        above = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text(found["base"]["pass"], 1.0, "base", color=figures.GREY, **above)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlabel(f"share of held-out answers that pass ({found['task']})")
    figures.save(figure, file)


def show(found: Mapping[str, Any]) -> None:
    """Prints a summary as tables in Markdown."""
    print("| arm | beta | rate | pass | 95% over seeds | finished | tokens | violations |")
    print("|---|---|---|---|---|---|---|---|")
    for name, arm in found["arms"].items():
        low, high = arm["pass_interval"]
        print(
            f"| {name} | {arm['beta']:g} | {arm['learning_rate']:g} | {arm['pass']:.3f} "
            f"| {low:.3f} to {high:.3f} | {arm['finished']:.3f} | {arm['tokens']:.1f} "
            f"| {arm['violations']:.2f} |"
        )
    for one in [found["primary"], *found["secondary"]]:
        if one:
            low, high = one["interval"]
            adjusted = f", Holm {one['p_holm']:.4f}" if "p_holm" in one else " (primary)"
            print(
                f"{one['arm']} against {one['baseline']}: {one['difference']:+.3f} "
                f"({low:+.3f} to {high:+.3f}), p {one['p']:.4f}{adjusted}"
            )
    if found["missing"]:
        print(f"not finished: {', '.join(found['missing'])}")


def same(mine: Results, theirs: Results) -> bool:
    """Prints how the runs that both have compare.

    Logits round otherwise on another kind of processor, so that runs of two kinds are shown and
    decide nothing.

    Returns:
      Whether there are runs of the same device, and all their figures are the same.
    """
    held = []
    for key in sorted(set(mine.rows) & set(theirs.rows), key=str):
        one, other = mine.rows[key], theirs.rows[key]
        agree = one["passes"] == other["passes"] and all(one[n] == other[n] for n in _SHOWN)
        shown = "the same" if agree else f"pass {one['pass']} here, {other['pass']} there"
        if one.get("device") == other.get("device"):
            held.append(agree)
        else:
            shown += f", on {one.get('device')} here and {other.get('device')} there"
        print(*key, shown, sep="  ")
    if not held:
        print("no run of the same device to hold against each other")
    return bool(held) and all(held)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--task", default="no_the")
    parser.add_argument("--against", type=pathlib.Path, help="another folder of results")
    parser.add_argument("--workdir", type=pathlib.Path, help="of the runs, for their weights")
    options = parser.parse_args(arguments)
    results = Results(options.results)
    if options.against:
        raise SystemExit(0 if same(results, Results(options.against)) else 1)
    if options.workdir:
        from experiments.where_the_weight_lies import places

        found = places.places(options.workdir, options.task)
        write_json(options.results / "places.json", found)
        places.show(found)
    path = options.results / "chosen.json"
    chosen = json.loads(path.read_text()) if path.exists() else {}
    found = summary(results, options.task, chosen)
    write_json(options.results / "summary.json", found)
    show(found)
    if found["arms"]:
        plot(found, options.results / "plot.svg")


if __name__ == "__main__":
    main()
