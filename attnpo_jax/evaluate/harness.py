"""`attnpo evaluate harness`: tasks of lm-evaluation-harness, its own or the user's."""

import hashlib
import json
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate.evaluator import Evaluator, Figure, Result, figure
from attnpo_jax.evaluate.task import Task
from attnpo_jax.runtime.errors import UsageError, UserError

if TYPE_CHECKING:
    from attnpo_jax.generate.harness import HarnessModel


def run(task: Task) -> Result:
    """Runs the tasks that the config's `evaluate.harness` names.

    Figures are the harness's own, by task, metric and filter; their intervals are of the samples
    where the figure is their mean, else the harness's standard error times 1.96. Its cache of
    answers, beside the figures until these are there, is what an interrupted run goes on from.

    Raises:
      UsageError: no task is named, or there is none of that name.
      UserError: the extra `lm_eval` is missing; a task fails.
    """

    model_class = _model_class()
    import lm_eval
    from lm_eval.tasks import TaskManager

    section = task.section
    wanted = [name for text in config_lib.as_tuple(section.tasks) for name in text.split(",")]
    own = section.include_path or None
    manager = TaskManager(include_path=own, include_defaults=section.include_defaults)
    known = manager.match_tasks(wanted)
    missing = [name for name in wanted if not manager.match_tasks([name])]
    if not known or missing:
        asked = f"no task {missing[0]!r}" if missing else "it names none"
        raise UsageError(
            f"config.evaluate.harness.tasks: {asked}; accepted: names or patterns of tasks that "
            f"lm-evaluation-harness has, or that {own or 'evaluate.harness.include_path'} has, of "
            f"{len(manager.all_tasks)} in all"
        )
    model = model_class(
        task.sampled(),
        config=task.run.config,
        batch_size=section.batch_size,
        max_gen_toks=section.max_new_tokens,
    )
    cache = _cache(task)
    try:
        found = lm_eval.simple_evaluate(
            model,
            tasks=known,
            task_manager=manager,
            num_fewshot=section.num_fewshot,
            limit=section.limit or None,
            apply_chat_template=section.chat,
            fewshot_as_multiturn=section.chat,
            bootstrap_iters=1000,
            use_cache=str(cache),
        )
    except (KeyError, ValueError, OSError, ConnectionError) as error:
        # What a task's own data and code raise, which are the harness's and the user's.
        raise UserError(
            f"lm-evaluation-harness, tasks {', '.join(known)}: {type(error).__name__}: {error}"
        ) from error
    rows = list(_rows(found["samples"]))
    figures = dict(_figures(found["results"], rows))
    for file in cache.parent.glob(f"{cache.name}*"):
        file.unlink()
    versions = {name: version for name, version in found["versions"].items()}
    return Result(rows, figures, {"harness": lm_eval.__version__, "versions": versions})


def _model_class() -> type["HarnessModel"]:
    from attnpo_jax.generate.harness import HarnessModel

    return HarnessModel


def _cache(task: Task) -> pathlib.Path:
    """Where the harness keeps answers: of this model with these settings alone."""
    settings = json.dumps(task.settings, sort_keys=True).encode()
    return task.folder / f".{task.model}.{hashlib.sha256(settings).hexdigest()[:12]}"


def _rows(samples: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """A row for each sample and filter, whose numbers are named as the figures are."""
    for name, of_task in samples.items():
        for sample in of_task:
            of_filter = sample.get("filter", "none")
            row = {
                "id": f"{name}/{sample['doc_id']}",
                "task": name,
                "filter": of_filter,
                "responses": sample.get("filtered_resps"),
            }
            for metric in sample.get("metrics", ()):
                value = sample.get(metric)
                if isinstance(value, (int, float)):
                    row[_name(name, metric, of_filter)] = float(value)
            yield json.loads(json.dumps(row, default=str))


def _figures(
    results: Mapping[str, Mapping[str, Any]], rows: list[dict[str, Any]]
) -> Iterator[tuple[str, Figure]]:
    for name, values in results.items():
        for key, value in values.items():
            metric, comma, of_filter = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, (int, float)):
                continue
            label = _name(name, metric, of_filter)
            mean = figure(rows, label)
            if mean.count and math.isclose(mean.value, value, rel_tol=1e-9, abs_tol=1e-12):
                yield label, mean
                continue
            error = values.get(f"{metric}_stderr,{of_filter}")
            half = 1.96 * error if isinstance(error, (int, float)) else math.nan
            count = sum(row["task"] == name and row["filter"] == of_filter for row in rows)
            yield label, Figure(float(value), value - half, value + half, count)


def _name(task: str, metric: str, of_filter: str) -> str:
    return f"{task} {metric}" + ("" if of_filter == "none" else f" ({of_filter})")


EVALUATOR = Evaluator("harness", run, reads=("generate.cache", "generate.weights", "model."))
