"""Runs the experiment, or what is left of it; see README.md.

    python -m experiments.iterate.run --workdir=DIR

What `--results` has is not done again; what was interrupted goes on. Everything is in float32.
"""

import argparse
import json
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from attnpo_jax import Run
from attnpo_jax.config import from_json, load_file, to_json
from attnpo_jax.evaluate import evaluate, files
from attnpo_jax.evaluate.checks.rows import Check
from attnpo_jax.evaluate.files import FOLDER
from attnpo_jax.generate.stage import generate
from attnpo_jax.iterate import iterate
from attnpo_jax.runtime import atomic, figures, intervals
from experiments.iterate import prompts

HERE = pathlib.Path(__file__).parent
CONFIG = HERE.parents[1] / "configs" / "iterate_checks.py"
ARMS = {
    "rounds": {"rounds": 3, "reference": "round"},
    "once": {"rounds": 1, "reference": "round"},
    "first": {"rounds": 3, "reference": "first"},
}
SEEDS = (0, 1, 2)
ROUNDS, PAIRS = 3, 36  # pairs that a round trains on
_QUIET = Console(quiet=True)
_LOG = logging.getLogger("iterate")


def config_of(arm: str, seed: int, workdir: pathlib.Path, most: int | None = None) -> Any:
    """The config of an arm: the same answers in all, and the same pairs and steps.

    Args:
      most: prompts of each kind, at most, and pairs, for a trial.
    """
    config = from_json(to_json(load_file(str(CONFIG))))
    rounds = ARMS[arm]["rounds"]
    config.seed = seed
    config.generate.seed = 1000 * seed
    config.generate.max_new_tokens = config.evaluate.checks.max_new_tokens = 128
    config.iterate.rounds = rounds
    config.iterate.reference = ARMS[arm]["reference"]
    config.iterate.prompts = str(workdir / "train.jsonl")
    per_kind = min(prompts.PER_KIND["train"], most or 10**6)
    config.iterate.prompts_per_round = prompts.KINDS * per_kind // rounds
    config.iterate.samples_per_prompt = 4
    config.iterate.checkpoints = "drop"
    config.train.pairs = min(PAIRS, most or PAIRS) * ROUNDS // rounds
    config.train.batch_size = config.train.microbatch_size = 6
    config.optim.learning_rate = 1e-5
    # Of rounds that each warm up and cool down, the steps would count less than of one.
    config.optim.schedule, config.optim.warmup_ratio = "constant", 0.0
    config.evaluate.checks.prompts = str(workdir / "eval.jsonl")
    return config


def rates(workdir: pathlib.Path, most: int | None) -> dict[str, float]:
    """By kind, how often the first model passes, eight answers to each prompt."""
    source = workdir / "rates.jsonl"
    asked = prompts.rows("rates", most=most)
    atomic.write_json_lines(source, asked)
    config = config_of("once", 0, workdir)
    config.generate.samples = 8
    run = Run.resolve(config, workdir / "rates")
    path = generate(run, model="base", prompts=str(source), console=_QUIET)
    check = {row["id"]: Check.of(row["checks"][0]) for row in asked}
    passed: dict[str, list[float]] = {}
    for record in map(json.loads, path.read_text().splitlines()):
        good = record["finish_reason"] == "stop" and check[record["id"]].passes(record["response"])
        passed.setdefault(check[record["id"]].kind, []).append(float(good))
    return {kind: float(np.mean(values)) for kind, values in passed.items()}


def evaluated(workdir: pathlib.Path) -> dict[str, float]:
    """By held-out prompt, whether the model of a round passes."""
    (file,) = (workdir / FOLDER / "checks").glob("step-*.json")
    return {row["id"]: row["strict"] for row in files.read(file).result.rows}


def run_arm(arm: str, seed: int, workdir: pathlib.Path, most: int | None) -> list[dict[str, Any]]:
    """An arm at a seed: figures of each round, and which held-out prompts its model passes."""
    folder = workdir / f"{arm}-{seed}"
    done = iterate(Run.resolve(config_of(arm, seed, workdir, most), folder), console=_QUIET)
    return [
        {"arm": arm, "seed": seed, "round": number, "figures": result["figures"]}
        | {"held out": evaluated(folder / "rounds" / str(number))}
        for number, result in enumerate(done, 1)
    ]


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Pass rates on the held-out prompts by arm and round, and `rounds` and `first` less `once`."""
    by_arm: dict[str, dict[int, dict[int, dict[str, float]]]] = {}
    for one in results:
        by_arm.setdefault(one["arm"], {}).setdefault(one["round"], {})[one["seed"]] = one[
            "held out"
        ]
    told: dict[str, Any] = {"pass rates": {}, "less once": {}}

    def table(of: dict[int, dict[str, float]]) -> np.ndarray:
        ids = sorted(next(iter(of.values())))
        return np.array([[of[seed][id] for id in ids] for seed in sorted(of)])

    for arm, rounds in by_arm.items():
        for number, of in sorted(rounds.items()):
            means = table(of).mean(axis=1)
            low, high = intervals.student(means)
            told["pass rates"][f"{arm}, round {number}"] = [means.mean(), low, high]
    for arm in set(by_arm) - {"once"} if "once" in by_arm else ():
        last, once = by_arm[arm][max(by_arm[arm])], by_arm["once"][1]
        if last.keys() == once.keys():
            difference = (table(last) - table(once)).mean()
            interval = intervals.crossed_difference(table(once), table(last))
            told["less once"][arm] = [difference, *interval]
    return json.loads(json.dumps(told, default=float).replace("NaN", "null"))


@figures.style()
def plot(told: dict[str, Any], base: float, file: pathlib.Path) -> None:
    """Pass rates by arm and answers sampled so far, with intervals over seeds.

    Args:
      told: what `summary` gives.
      base: the first model's pass rate.
    """
    figure, (axes,) = figures.new_figure(height=3.0)
    for place, arm in enumerate(ARMS):
        named = {int(key.rpartition(" ")[2]): of for key, of in told["pass rates"].items()
                 if key.startswith(f"{arm}, round ")}  # fmt: skip
        if not named:
            continue
        rounds = ARMS[arm]["rounds"]
        xs = [0] + [ROUNDS // rounds * number + 0.04 * (place - 1) for number in sorted(named)]
        ys = [base] + [named[number][0] for number in sorted(named)]
        color = figures.COLOURS[place]
        axes.plot(xs, ys, color=color, marker=figures.MARKERS[place], label=arm)
        for x, (_, low, high) in zip(xs[1:], (named[n] for n in sorted(named)), strict=True):
            if low is not None:
                axes.plot([x, x], [low, high], color=color, lw=1)
    axes.axhline(base, color=figures.GREY, ls="--", lw=1)
    axes.set_xticks(range(ROUNDS + 1), ["base", "a third", "two thirds", "all answers"])
    axes.set_ylabel("held-out prompts that pass")
    axes.legend()
    figures.save(figure, file)


def main(arguments: Sequence[str] | None = None) -> None:
    """Does what `--results` lacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--results", type=pathlib.Path, default=HERE / "results")
    parser.add_argument("--arms", default="rounds,once")
    parser.add_argument("--most", type=int, help="prompts of each kind, at most, for a trial")
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    workdir, results = options.workdir.resolve(), options.results
    workdir.mkdir(parents=True, exist_ok=True)
    results.mkdir(parents=True, exist_ok=True)
    if not (results / "rates.json").exists():
        atomic.write_json(results / "rates.json", rates(workdir, options.most))
    kinds = prompts.chosen(json.loads((results / "rates.json").read_text()))
    _LOG.info("kinds: %s", ", ".join(kinds))
    for split in ("train", "eval"):
        atomic.write_json_lines(
            workdir / f"{split}.jsonl", prompts.rows(split, kinds, options.most)
        )
    start = Run.resolve(config_of("once", 0, workdir), workdir / "start")
    [base] = evaluate(start, name="checks", model="base", console=_QUIET)
    atomic.write_json(results / "start.json", base.facts()["figures"])
    file = results / "runs.json"
    found = json.loads(file.read_text()) if file.exists() else []
    for seed in SEEDS:
        for arm in options.arms.split(","):
            if not any((one["arm"], one["seed"]) == (arm, seed) for one in found):
                _LOG.info("%s, seed %d", arm, seed)
                found += run_arm(arm, seed, workdir, options.most)
                atomic.write_json(file, found)
                told = summary(found)
                atomic.write_json(results / "summary.json", told)
                plot(told, base.result.figures["prompts, strict"].value, results / "plot.svg")


if __name__ == "__main__":
    main()
