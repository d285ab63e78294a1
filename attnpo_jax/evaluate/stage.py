"""`attnpo evaluate`: figures with intervals on what a model does, kept beside the run."""

import contextlib
import hashlib
import json
import logging
import os
import pathlib
from typing import TYPE_CHECKING, Any

from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax.evaluate import files
from attnpo_jax.evaluate.endpoint import DryRun
from attnpo_jax.evaluate.evaluator import Evaluator, find
from attnpo_jax.evaluate.files import FOLDER, Evaluation, EvaluationMismatch
from attnpo_jax.evaluate.report import compare, show
from attnpo_jax.evaluate.task import Subject, Task
from attnpo_jax.generate import model as models
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.runtime.printable import say

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

# Fields that say which pairs there are, and how they are judged, weighed and rewarded.
_OF_PAIRS = ("data.", "judge.", "weighting.", "objective.")


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
        starts from and of the trained one.
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
        return _all(run, as_json, console)
    evaluator = find(name)
    folder = pathlib.Path(out).expanduser() if out is not None else None
    if folder is None and run.workdir is not None:
        folder = run.workdir / FOLDER / name
    section = run.config.evaluate.get(evaluator.section)
    looks_at_model = evaluator.needs_model and not evaluator.of_files(section)
    if folder is None and looks_at_model:
        raise UsageError(f"evaluate {name} needs --workdir=DIR or --out=DIR, for its files")
    with run.writing() if run.workdir is not None else contextlib.nullcontext():
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


def _all(run: "Run", as_json: bool, console: Console) -> list[Evaluation]:
    """The evaluations of the config, of both models; each model is loaded once."""
    if run.workdir is None:
        raise UsageError("evaluate needs --workdir=DIR, or the name of an evaluation and --out=DIR")
    evaluators = [one for one in map(find, wanted(run)) if not _lacks_pairs(run, one)]
    found: dict[str, list[Evaluation]] = {one.name: [] for one in evaluators}
    with run.writing():
        for which in (models.BASE, models.TRAINED):
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


def _lacks_pairs(run: "Run", evaluator: Evaluator) -> bool:
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
      label: what the files are called where there is no model; None for the evaluation's name.

    Returns:
      It; None in all processes but the first, and where the judge is to be asked nothing.

    Raises:
      EvaluationMismatch: it was done with other settings.
    """
    settings = _settings(run, evaluator, subject)
    task = Task(run, evaluator, subject, folder, console, settings, label or evaluator.name)
    file = None if folder is None else folder / f"{task.model}.json"
    if file is not None:
        there = processes.is_first() and file.exists()
        if there:
            kept = files.read(file)
            _check(file, kept, settings)
        if preemption.agreed(there):
            return kept if there else None
        folder.mkdir(parents=True, exist_ok=True)
    if subject is not None:
        _LOG.info("evaluating %s: %s", subject.name, evaluator.name)
    try:
        result = evaluator.run(task)
    except DryRun as counted:
        say(console, counted)
        return None
    if not processes.is_first():
        return None
    evaluation = Evaluation(evaluator.name, task.model, settings, result)
    if folder is not None:
        evaluation.write(folder)
    return evaluation


def _settings(run: "Run", evaluator: Evaluator, subject: Subject | None) -> dict[str, Any]:
    """What decides the figures: fields of the config, and digests of the files that they name."""
    own = f"evaluate.{evaluator.section}."
    settings: dict[str, Any] = {}
    for field, value in config_lib.flatten(run.config).items():
        of_model = subject is not None and field.startswith(("generate.", "model."))
        of_pairs = evaluator.needs_pairs and field.startswith(_OF_PAIRS)
        if field.startswith(own) or field == "evaluate.judge.model" or of_model or of_pairs:
            settings[field] = value
        if field.startswith(own) and isinstance(value, str) and value:
            settings |= _digest(field, pathlib.Path(value).expanduser())
    if subject is not None:
        settings["model"] = subject.digest or subject.which
    return json.loads(json.dumps(settings))


def _digest(field: str, path: pathlib.Path) -> dict[str, str]:
    """sha256 of a file that a field names, or of a folder's tables together; nothing if there is
    none.
    """

    def of_file(path: pathlib.Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    if path.is_file():
        return {f"sha256 of {field}": of_file(path)}
    if not path.is_dir():
        return {}
    # Not of all files: it may be a model's folder.
    tables = [one for ending in ("*.jsonl", "*.csv") for one in sorted(path.glob(ending))]
    digests = "".join(map(of_file, tables))
    return {f"sha256 of {field}": hashlib.sha256(digests.encode()).hexdigest()} if tables else {}


def _check(file: pathlib.Path, kept: Evaluation, settings: dict[str, Any]) -> None:
    for field in dict.fromkeys([*kept.settings, *settings]):
        before, now = kept.settings.get(field), settings.get(field)
        if before != now:
            raise EvaluationMismatch(
                f"{file}: evaluated with {field} = {before!r}, now {now!r}; accepted: the same, "
                "another --name, or remove the file"
            )
