"""`attnpo plan`: what a config takes on TPUs or GPUs, from its compiled programs."""

import json
import logging
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.data import mixture
from attnpo_jax.models.io import known
from attnpo_jax.plan import generation, report, search, topologies
from attnpo_jax.plan import pairs as pairs_lib
from attnpo_jax.plan.accelerators import PlanError
from attnpo_jax.plan.lengths import Lengths
from attnpo_jax.plan.programs import Setting

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def plan(
    run: "Run",
    *,
    topology: str,
    pairs: int | None = None,
    row_length: int | None = None,
    response_length: int | None = None,
    search_over: bool = False,
    generates: bool = False,
    as_json: bool = False,
    console: Console | None = None,
) -> None:
    """Compiles the config's programs for TPUs or GPUs and prints what they take.

    Args:
      topology: their name, e.g. "v5e:8x8" or "h100:8" (see `topologies.parse`).
      pairs: training pairs, of which `train.pairs` may draw fewer. None: see `pairs.count`.
      row_length, response_length: see `lengths.Lengths.of`.
      search_over: whether to try meshes, microbatch sizes and remat policies, in place of the
        config's own, and print a ranking.
      generates: whether sampling is planned, as `config.generate` says, in place of training.
      as_json: print JSON in place of tables.
    """
    config = run.config
    console = console or Console()
    if config.parallel.backend != "jit":
        raise PlanError(
            f"parallel.backend = {config.parallel.backend!r} is not planned; accepted: 'jit'"
        )
    model = known.shape_of(config.model.source)
    setting = Setting(
        config, model, topologies.parse(topology), Lengths.of(config, row_length, response_length)
    )
    judge = setting.judging.model
    config_lib.check_layers(config, judge.num_layers, judge.layer_windows, judge.num_heads)
    if search_over:
        ranking = search.ranking(setting)
        if as_json:
            _print_json(console, [found.as_json() for found in ranking])
        else:
            console.print(search.table(ranking))
        return
    setting.training_mesh()
    if generates:
        sampling = generation.plan(setting)
        if as_json:
            _print_json(console, sampling.as_json())
        else:
            console.print(generation.table(sampling))
        return
    compile_all = [setting.training]
    reads = config_lib.reads(config)
    if {"reference_logps", "reference_entropy"} & set(reads):
        compile_all.append(setting.reference)
    if "judge" in reads:
        compile_all.append(setting.judging.judge)
    programs = []
    for compile_one in compile_all:
        _LOG.info("compiling the %s program for %s", compile_one.__name__, topology)
        programs.append(compile_one())
    pairs = pairs_lib.count(config) if pairs is None else pairs
    made = report.Plan(
        config.model.source,
        setting.topology,
        setting.lengths,
        tuple(programs),
        pairs,
        _trained_on(config, pairs),
        _steps(config, pairs),
        bool(mixture.parse(config.data.eval)),
        tuple(one.name for one in config_lib.scorers(config) if one.function is None),
    )
    if as_json:
        _print_json(console, made.as_json())
    else:
        console.print(report.table(made))


def _print_json(console: Console, content: Any) -> None:
    console.print(json.dumps(content, indent=2), markup=False, highlight=False, soft_wrap=True)


def _trained_on(config: config_dict.ConfigDict, pairs: int | None) -> int | None:
    """How many of the pairs are trained on; None where that is unknown."""
    drawn = config.train.pairs
    if pairs is not None and drawn > pairs:
        raise PlanError(
            f"config.train.pairs = {drawn}: there are {pairs} pairs; accepted: at most as many, or "
            "0 for all"
        )
    return drawn or pairs


def _steps(config: config_dict.ConfigDict, pairs: int | None) -> int | None:
    if config.train.steps:
        return config.train.steps
    number = _trained_on(config, pairs)
    if number is None:
        return None
    return max(1, round(config.train.epochs * -(-number // config.train.batch_size)))
