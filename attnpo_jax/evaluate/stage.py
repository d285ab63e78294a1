"""`attnpo evaluate`: figures with intervals on what a model does, kept beside the run."""

import contextlib
import json
import logging
import os
import pathlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.endpoint import DryRun
from attnpo_jax.evaluate.evaluator import Evaluator, find
from attnpo_jax.evaluate.files import FOLDER, Evaluation, EvaluationMismatch
from attnpo_jax.evaluate.report import compare, show
from attnpo_jax.evaluate.settings import differences, settings_of
from attnpo_jax.evaluate.task import Subject, Task
from attnpo_jax.generate import model as models
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime.errors import Preempted, UsageError, UserError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)


def evaluate(
    run: "Run",
    *,
    name: str | None = None,
    model: str | None = None,
    label: str | None = None,
    out: str | os.PathLike | None = None,
    as_json: bool = False,
    console: Console | None = None,
) -> list[Evaluation]:
    """Evaluates a model, and writes rows and figures; what is finished is not done again.

    Args:
      run: the run; the evaluation's section of its config says how.
      name: the evaluation. None: all that `config.evaluate.names` has, of the model that training
        starts from and of `model`.
      model: see `generate.model.load`.
      label: what the files are called, in place of the model's name.
      out: the folder that they go to, in place of the workdir's `evaluations/NAME`.
      as_json: print JSON in place of a table.
      console: where figures go; None for standard output.

    Returns:
      What the first process has found; in the others, nothing.

    Raises:
      UsageError: there is no such evaluation, or nowhere to write.
      EvaluationMismatch: it was done with other settings.
      UserError: the model can't be evaluated.
      Preempted: SIGTERM or Ctrl-C came; what is finished is kept.
    """
    console = console or Console()
    if name is None:
        return _all(run, model or models.TRAINED, as_json, console)
    evaluator = find(name)
    folder = pathlib.Path(out).expanduser() if out is not None else None
    if folder is None and run.workdir is not None:
        folder = run.workdir / FOLDER / name
    section = run.config.evaluate.get(evaluator.section)
    looks_at_model = evaluator.needs_model and not evaluator.of_files(section)
    if folder is None and looks_at_model:
        raise UsageError(f"evaluate {name} needs --workdir=DIR or --out=DIR, for its files")
    with contextlib.ExitStack() as stack:
        if run.workdir is not None:
            stack.enter_context(run.writing())
        if folder is not None:
            stack.enter_context(run.alone_in(folder))
        subject = Subject(run, model, label) if looks_at_model else None
        found = evaluate_one(run, evaluator, subject, folder, console, label)
    if found is None:
        return []
    if as_json:
        print(json.dumps(found.facts(), indent=2), flush=True)
    else:
        files.show(console, found)
        if folder is not None:
            say(console, f"rows and figures in {folder}")
    return [found]


def _all(run: "Run", model: str, as_json: bool, console: Console) -> list[Evaluation]:
    """The evaluations of the config, of both models; each model is loaded once."""
    if run.workdir is None:
        raise UsageError("evaluate needs --workdir=DIR, or the name of an evaluation and --out=DIR")
    evaluators = [one for one in map(find, wanted(run)) if not lacks_pairs(run, one)]
    found: dict[str, list[Evaluation]] = {one.name: [] for one in evaluators}
    with run.writing():
        for which in (models.BASE, model):
            subject = Subject(run, which)
            for evaluator in evaluators:
                if evaluator.compares and which == models.BASE:
                    continue
                folder = run.workdir / FOLDER / evaluator.name
                evaluation = evaluate_one(run, evaluator, subject, folder, console)
                if evaluation is not None:
                    found[evaluator.name].append(evaluation)
            subject.release()
    everything = [one for evaluations in found.values() for one in evaluations]
    if as_json and processes.is_first():
        print(json.dumps([one.facts() for one in everything], indent=2), flush=True)
    elif everything:
        show(console, compare([(one.model, one) for one in everything]))
        say(console, f"rows, figures and samples in {run.workdir / FOLDER}")
    return everything


def wanted(run: "Run") -> tuple[str, ...]:
    """The evaluations that a run ends with."""
    return config_lib.as_tuple(run.config.evaluate.names)


def lacks_pairs(run: "Run", evaluator: Evaluator) -> bool:
    """Whether an evaluation is about held-out pairs, of which the config names none."""
    own = run.config.evaluate.get(evaluator.section) or {}
    others = any(own.get(field) for field in ("source", "prompts"))
    lacks = evaluator.needs_pairs and not others and "eval" not in run.splits
    if lacks:
        _LOG.info("no evaluation %s: config.data.eval names no pairs", evaluator.name)
    return lacks


def evaluate_one(
    run: "Run",
    evaluator: Evaluator,
    subject: Subject | None,
    folder: pathlib.Path | None,
    console: Console,
    label: str | None = None,
) -> Evaluation | None:
    """One evaluation of one model, from its files if it is finished.

    Args:
      label: what the files are called in place of the model's name; None for that.

    Returns:
      It; None in all processes but the first, and where the judge is to be asked nothing.

    Raises:
      EvaluationMismatch: it was done with other settings.
    """
    settings = settings_of(run, evaluator, subject)
    task = Task(run, evaluator, subject, folder, console, settings, label)
    file = None if folder is None else folder / f"{task.model}.json"
    if file is not None:
        kept, failure = _kept(file, settings) if processes.is_first() else (None, None)
        is_done, failed = preemption.agreed_each([kept is not None, failure is not None])
        if failed:
            raise failure or UserError(f"{file}: the first process can't go on, and says why")
        if is_done:
            return kept
        folder.mkdir(parents=True, exist_ok=True)
    if subject is not None:
        _LOG.info("evaluating %s: %s", subject.name, evaluator.name)
    result = ended = None
    try:
        with run.recorded(f"evaluate {evaluator.name}", model=task.model):
            result = evaluator.run(task)
    except (DryRun, Preempted) as error:
        ended = error
    # Of several processes, the first one may have asked a judge for long, and alone been told to
    # stop.
    processes.barrier("evaluated")
    is_told = isinstance(ended, Preempted)
    if preemption.agreed(is_told):
        raise (
            ended
            if is_told
            else Preempted("told to stop while evaluating; the same command goes on")
        )
    if ended is not None:
        say(console, ended)
    if result is None or not processes.is_first():
        return None
    evaluation = Evaluation(evaluator.name, task.model, settings, result)
    if folder is not None:
        evaluation.write(folder)
    return evaluation


def _kept(
    file: pathlib.Path, settings: Mapping[str, Any]
) -> tuple[Evaluation | None, UserError | None]:
    """The finished evaluation of a file, if there is one; or why it is not the one wanted."""
    try:
        kept = files.read(file) if file.exists() else None
        if kept is not None:
            _check(file, kept, settings)
        return kept, None
    except UserError as error:
        return None, error


def _check(file: pathlib.Path, kept: Evaluation, settings: Mapping[str, Any]) -> None:
    if found := differences(kept.settings, settings):
        field, (before, now) = next(iter(found.items()))
        raise EvaluationMismatch(
            f"{file}: evaluated with {field} = {before!r}, now {now!r}; accepted: the same, "
            f"another --name, or remove {file.stem}.* there"
        )
