"""Runs the experiment, or what is left of it; see README.md.

    python -m experiments.where_the_weight_lies.run --workdir=DIR

What `--results` has is not done again; what was interrupted goes on. Everything is in float32.
"""

import argparse
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import time
from collections.abc import Sequence

import jax
from rich.console import Console

from attnpo_jax import Run, prepare, train
from attnpo_jax.generate.stage import generate
from experiments.where_the_weight_lies import arms as arms_lib
from experiments.where_the_weight_lies import pairs as pairs_lib
from experiments.where_the_weight_lies.arms import ARMS, GATE_SEEDS, GRID, SEEDS, TUNING_SEED
from experiments.where_the_weight_lies.prompts import MOST, TASKS, prompts
from experiments.where_the_weight_lies.results import Results, scores, write, write_json

STAGES = ("pool", "gate", "tune", "final")
_LOG = logging.getLogger("where_the_weight_lies")


@dataclasses.dataclass(frozen=True)
class Lab:
    """Where things are.

    Attributes:
      workdir: what is made on the way, `TASK/pool` and `TASK/runs`; not committed.
      results: see `Results`.
      task: the constraint's name.
      most: bounds on numbers of prompts, for a trial.
      quiet: takes what the stages would print.
    """

    workdir: pathlib.Path
    results: Results
    task: str
    most: int | None = None
    quiet: Console = dataclasses.field(default_factory=lambda: Console(quiet=True))

    @property
    def pool(self) -> pathlib.Path:
        """The workdir of the base model's samples and the prepared pairs."""
        return self.workdir / self.task / "pool"

    @property
    def pairs(self) -> pathlib.Path:
        """The file of all pairs."""
        return self.pool / "pairs.jsonl"

    def prompts_file(self, split: str) -> str:
        """A split's prompts as a source."""
        path = self.pool / f"{split}.jsonl"
        rows = [
            {"id": p.id, "prompt": list(p.messages)} for p in prompts(self.task, split)[: self.most]
        ]
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
        return str(path)

    def sample(self, run: Run, split: str, model: str) -> list[dict]:
        """A model's answers to a split's prompts; those that are there are not sampled again."""
        run.config.generate.samples = arms_lib.SAMPLES[split]
        source = self.prompts_file(split)
        path = generate(run, model=model, prompts=source, name=split, console=self.quiet)
        return [json.loads(line) for line in path.read_text().splitlines()]

    def pairs_digest(self) -> str:
        """Tells the file of pairs from others."""
        return hashlib.sha256(self.pairs.read_bytes()).hexdigest()[:16]

    def refuse_other_pairs(self) -> None:
        """Ends where results are there that were trained on other pairs than the workdir's."""
        for row in self.results.rows.values():
            of = row.get("pairs_sha256", self.pairs_digest())
            if row["task"] == self.task and of != self.pairs_digest():
                raise SystemExit(
                    f"{self.results.folder} has runs on pairs {of}, {self.pairs} is "
                    f"{self.pairs_digest()}: the base model's answers were others; accepted: a "
                    "workdir without pairs, or another folder of --results"
                )

    def row(self, arm: str, beta: float, rate: float, seed: int, split: str) -> dict:
        """What tells a run and split from the others."""
        return {
            "task": self.task,
            "arm": arm,
            "beta": beta,
            "learning_rate": rate,
            "seed": seed,
            "split": split,
        }


def make_pool(lab: Lab) -> None:
    """The base model's answers, the pairs made of them, and the judge's and reference's passes.

    Pairs that the results have are taken from there.
    """
    config = arms_lib.shared_config(lab.pairs)
    kept = lab.results.pairs(lab.task)
    if kept is not None and not lab.pairs.exists():
        write(lab.pairs, kept)
    if not lab.pairs.exists():
        # Until there are pairs, nothing reads them: the samples need none.
        run = Run.resolve(config, lab.pool)
        records = lab.sample(run, "train", "base")
        made = pairs_lib.make_pairs(records, TASKS[lab.task])
        _LOG.info("%d pairs of %d answers", len(made), len(records))
        write(lab.pairs, "".join(json.dumps(row) + "\n" for row in made))
        base = scores(records, TASKS[lab.task])
        lab.refuse_other_pairs()
        row = lab.row("base", 0.0, 0.0, 0, "train") | base | {"device": _device()}
        lab.results.add(row | {"pairs": len(made), "pairs_sha256": lab.pairs_digest()})
    lab.refuse_other_pairs()
    if kept is None:
        lab.results.add_pairs(lab.task, lab.pairs.read_text())
    prepare.prepare(Run.resolve(config, lab.pool), console=lab.quiet)


def base_figures(lab: Lab) -> None:
    """What the base model does on the other splits."""
    config = arms_lib.shared_config(lab.pairs)
    for split in ("validation", "test"):
        if lab.results.find(**lab.row("base", 0.0, 0.0, 0, split)) is None:
            records = lab.sample(Run.resolve(config, lab.pool), split, "base")
            row = lab.row("base", 0.0, 0.0, 0, split) | scores(records, TASKS[lab.task])
            lab.results.add(row | {"device": _device()})


def do_run(
    lab: Lab, arm: str, setting: tuple[float, float], seed: int, splits: Sequence[str]
) -> None:
    """Trains an arm and samples its answers to some splits, where that is not done yet."""
    beta, rate = setting
    left = [s for s in splits if lab.results.find(**lab.row(arm, beta, rate, seed, s)) is None]
    if not left:
        return
    folder = lab.workdir / lab.task / "runs" / f"{arm}-beta{beta:g}-lr{rate:g}-seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "prepared").is_symlink():
        (folder / "prepared").symlink_to(os.path.relpath(lab.pool / "prepared", folder))
    config = arms_lib.arm_config(lab.pairs, arm, beta, rate, seed)
    if lab.most is not None:
        config.train.pairs, config.train.steps = 0, 3  # of the few pairs that it has
    run = Run.resolve(config, folder)
    start = time.monotonic()
    train.train(run, console=lab.quiet)
    trained = time.monotonic()
    for split in left:
        records = lab.sample(run, split, "trained")
        row = lab.row(arm, beta, rate, seed, split) | scores(records, TASKS[lab.task])
        _LOG.info("%s %s: %s", folder.name, split, {k: row[k] for k in ("pass", "tokens")})
        lab.results.add(row | _about(lab, trained - start, time.monotonic() - trained))
        trained = time.monotonic()
    shutil.rmtree(folder / "checkpoints")
    jax.clear_caches()  # the next run compiles its own step; this one would stay in memory


def _about(lab: Lab, training: float, sampling: float) -> dict:
    """How long it took, where, and of which pairs."""
    return {
        "pairs_sha256": lab.pairs_digest(),
        "training_seconds": round(training, 1),
        "sampling_seconds": round(sampling, 1),
        "device": _device(),
    }


def _device() -> str:
    cpu = next(
        (
            line.partition(":")[2].strip()
            for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        "",
    )
    return f"{os.cpu_count()} x {cpu}, {jax.devices()[0].platform}, jax {jax.__version__}"


def best_setting(lab: Lab, arm: str) -> tuple[float, float]:
    """The point of the grid with the highest pass rate on the validation prompts.

    Of equals, the first of `GRID`. What is chosen is written to `chosen.json`, which is believed
    from then on.
    """
    path = lab.results.folder / "chosen.json"
    chosen = json.loads(path.read_text()) if path.exists() else {}
    name = f"{lab.task}/{arm}"
    if name not in chosen:
        for setting in GRID:
            do_run(lab, arm, setting, TUNING_SEED, ["validation"])
        rows = [lab.results.find(**lab.row(arm, *s, TUNING_SEED, "validation")) for s in GRID]
        best = max(rows, key=lambda row: row["pass"])
        chosen[name] = {key: best[key] for key in ("beta", "learning_rate", "pass")}
        write_json(path, chosen)
    return chosen[name]["beta"], chosen[name]["learning_rate"]


def gate(lab: Lab) -> bool:
    """Whether the oracle beats uniform weights at each of three seeds, on validation prompts."""
    rates = {}
    for arm in ("uniform", "oracle"):
        setting = best_setting(lab, arm)
        for seed in GATE_SEEDS:
            do_run(lab, arm, setting, seed, ["validation", "test"])
        rows = [lab.results.find(**lab.row(arm, *setting, s, "validation")) for s in GATE_SEEDS]
        rates[arm] = [row["pass"] for row in rows]
    ahead = [o - u for o, u in zip(rates["oracle"], rates["uniform"], strict=True)]
    passed = min(ahead) > 0
    path = lab.results.folder / "gate.json"
    every = json.loads(path.read_text()) if path.exists() else {}
    every[lab.task] = rates | {"difference": [round(x, 5) for x in ahead], "passed": passed}
    write_json(path, every)
    return passed


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    here = pathlib.Path(__file__).parent
    parser.add_argument("--results", type=pathlib.Path, default=here / "results")
    parser.add_argument("--task", choices=TASKS, default="no_the")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1])
    parser.add_argument("--seeds", type=int, nargs="*", default=SEEDS)
    parser.add_argument("--arms", choices=ARMS, nargs="*", default=tuple(ARMS))
    parser.add_argument("--skip-gate", action="store_true", help="for a rerun of a few seeds")
    parser.add_argument("--most", type=int, help=f"prompts a split, for a trial; {MOST}")
    options = parser.parse_args(arguments)
    if options.most is not None and options.results == here / "results":
        parser.error("--most is for trials: name another folder with --results")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    cache = options.workdir / "compiled"
    jax.config.update("jax_compilation_cache_dir", str(cache.absolute()))

    lab = Lab(options.workdir.absolute(), Results(options.results), options.task, options.most)
    until = STAGES.index(options.until)
    make_pool(lab)
    if until >= STAGES.index("gate") and not options.skip_gate and not gate(lab):
        raise SystemExit(f"{lab.task}: the oracle does not win; see {lab.results.folder}/gate.json")
    if until >= STAGES.index("tune"):
        for arm in options.arms:
            best_setting(lab, arm)
    if until >= STAGES.index("final"):
        base_figures(lab)
        for seed in options.seeds:
            for arm in options.arms:
                do_run(lab, arm, best_setting(lab, arm), seed, ["test"])


if __name__ == "__main__":
    main()
