"""`attnpo evaluate pairs`: does the implicit reward prefer the better responses of pairs."""

import contextlib
import dataclasses
import functools
import pathlib
import re
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data.other_columns import other_columns
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.evaluate.evaluator import Evaluator, Result
from attnpo_jax.evaluate.pairs import figures
from attnpo_jax.evaluate.pairs.scores import fields, score
from attnpo_jax.models.attention import implementations
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel import preemption
from attnpo_jax.prepare import prepare
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.evaluate.task import Task
    from attnpo_jax.run import Run
    from attnpo_jax.sampling.model import SampledModel

# RewardBench's, and many others'.
_SUBSET = "subset"


def run(task: "Task") -> Result:
    """Scores the pairs with the model, against the reference that they were prepared with.

    Raises:
      UserError: the model's tokenizer is another one, or a pair has no such column.
    """
    of_pairs, dataset = _prepared(task)
    sampled = task.sampled()
    if sampled.model.tokenizer.digest() != task.run.tokenizer_digest:
        raise UserError(
            f"{sampled.name}: its tokenizer or chat template is not that of config.model.source, "
            f"{task.run.config.model.source}, which the pairs are prepared with; accepted: a model "
            "with the same ones, or its own config"
        )
    config = task.run.config
    found = score(
        sampled,
        _settings(of_pairs, sampled, dataset),
        dataset,
        batch_size=config.train.eval_batch_size,
        num_buckets=config.data.num_buckets,
        bar=config.log.progress,
    )
    subsets = _subsets(of_pairs, task.section.subset)
    rows = []
    for number, scores in enumerate(found.tolist()):
        pair = dataset[number]
        lengths = pair["chosen_text_length"], pair["rejected_text_length"]
        named = dict(zip(fields(dataset), scores, strict=True))
        rows.append(figures.row_of(pair["id"], subsets.get(pair["id"]), lengths, named))
    result = figures.result(rows, weighted=config.weighting.name != "uniform")
    return dataclasses.replace(result, about={"pairs of": of_pairs.config.data.eval})


def _prepared(task: "Task") -> tuple["Run", Prepared]:
    """The pairs as they are prepared, and the run that they are the held-out pairs of."""
    run, source = task.run, task.section.source
    if run.workdir is None or (source and source != run.config.data.eval):
        run = _run_on(run, source or run.config.data.eval, task.folder)
    if "eval" not in run.splits:
        raise UserError(
            "config.data.eval names no pairs; accepted there, or as evaluate.pairs.source: "
            "pairs such as builtin:eval"
        )
    dataset = None
    with contextlib.suppress(FileNotFoundError):
        dataset = run.open_prepared("eval")
    if preemption.agreed(dataset is None):
        prepare(run, splits=("eval",), console=task.console)
        dataset = run.open_prepared("eval")
    return run, dataset


# One of each for all of a run's evaluations, so that these compile once.
@functools.lru_cache(maxsize=1)
def _run_on(run: "Run", source: Any, folder: pathlib.Path) -> "Run":
    """The run with other held-out pairs, which are prepared in a folder of their own."""
    config = run.config.copy_and_resolve_references()
    config.data.eval = source
    named = source if isinstance(source, str) else "pairs"
    workdir = folder / (re.sub(r"[^\w.+-]+", "-", named).strip("-.") or "pairs")
    return dataclasses.replace(run, config=config, workdir=workdir)


@functools.lru_cache(maxsize=1)
def _step_settings(
    run: "Run",
    model: Any,
    layers: tuple[int, ...],
    attention: str,
    columns: tuple[str, ...],
    num_layers: int,
) -> StepSettings:
    return config_lib.step_settings(
        run.config, model, layers, attention, columns, num_layers=num_layers
    )


def _settings(run: "Run", sampled: "SampledModel", dataset: Prepared) -> StepSettings:
    model = sampled.model.config
    attention = implementations.choose(
        run.config.model.attention, model, run.config.model.dtype, sampled.backend.devices
    )
    return _step_settings(
        run,
        model,
        dataset.source_layers,
        attention.implementation,
        dataset.columns,
        dataset.num_layers,
    )


def _subsets(run: "Run", column: str) -> dict[str, str]:
    """By a pair's id, what the source has in a column.

    Raises:
      UserError: a pair has nothing there, where the column was named.
    """
    data = run.config.data
    pairs = load_pairs(
        data.eval,
        on_bad_row=data.on_bad_row,
        columns=run.columns,
        max_example_bytes=data.max_example_bytes,
    ).pairs
    wanted = column or _SUBSET
    found = {}
    for pair, beside in other_columns(pairs, [wanted], data.max_example_bytes):
        if beside.get(wanted) is not None:
            found[pair.id] = str(beside[wanted])
        elif column:
            source, number = pair.origin
            raise UserError(
                f"{source}, example {number}: no `{column}`, which evaluate.pairs.subset names"
            )
    return found


EVALUATOR = Evaluator(
    "pairs",
    run,
    needs_pairs=True,
    reads=(
        "data.",
        "judge.",
        "model.",
        "objective.",
        "prepare.scorers",
        "reference.source",
        "weighting.",
    ),
)
