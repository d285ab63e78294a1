"""The two sides' answers: of samples files, or sampled here and kept beside the evaluation."""

import dataclasses
import logging
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prompts import Prompt, load_prompts, prompt_of
from attnpo_jax.evaluate.task import Task, digest_of, marked
from attnpo_jax.generate import model as models
from attnpo_jax.generate.respond import respond
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling import samples
from attnpo_jax.sampling.model import SampledModel

_LOG = logging.getLogger(__name__)

_BUILTIN = "builtin:eval"


@dataclasses.dataclass(frozen=True)
class Answers:
    """One side's.

    Attributes:
      name: of whoever answered, for messages.
      texts: by the prompt's id, the first response to it.
      prompts: what was answered.
    """

    name: str
    texts: Mapping[str, str]
    prompts: Sequence[Prompt]


class Models:
    """The models that an evaluation needs, one at a time."""

    def __init__(self, task: Task):
        self._task = task
        self._loaded: tuple[str, SampledModel] | None = None

    def __call__(self, which: str) -> SampledModel:
        """A model; raises as `generate.model.load` does.

        It takes the place of the one before, whose parameters may be as large.
        """
        if which == self._task.subject.which:
            self._loaded = None
            return self._task.sampled()
        if self._loaded is None or self._loaded[0] != which:
            self._loaded = None
            self._task.subject.release()
            self._loaded = which, models.load(self._task.run, which)
        return self._loaded[1]


def both(task: Task, load: Models) -> tuple[Answers, Answers]:
    """The answers of the model at hand, and those of `evaluate.versus.baseline`.

    Raises:
      SamplesMismatch: there are others, made with other settings.
      UserError: a samples file is none, or has other prompts; no prompt is answered by both.
      Preempted: SIGTERM or Ctrl-C came; finished responses are kept.
    """
    section = task.section
    baseline = section.baseline
    named = {which: _file_of(which) for which in (task.subject.which, baseline)}
    of_files = {which: read(file) for which, file in named.items() if file is not None}
    prompts = _prompts(task, of_files)
    settings = {"samples": 1, "max_new_tokens": section.max_new_tokens}
    ours, theirs = of_files.get(task.subject.which), of_files.get(baseline)
    if ours is None:
        ours = _answers(task.model, prompts, task.responses(prompts, **settings))
    if theirs is None:
        # Of one name for the models that meet it, so that it answers once.
        name = task.label or re.sub(r"[^\w.+-]", "-", pathlib.PurePath(baseline).name)
        path = task.folder / f"{name}.baseline.jsonl"
        sampled = marked(load(baseline), digest_of(task.run, baseline))
        records, refused = respond(task.run, sampled, prompts, path, **settings)
        if refused:
            _LOG.warning("%s: %d prompts are not answered", path, len(refused))
        theirs = _answers(baseline, prompts, records)
    for side in (ours, theirs):
        _check(side, prompts)
    common = [p for p in prompts if p.id in ours.texts and p.id in theirs.texts]
    if not common:
        raise UserError(
            f"evaluate.versus: none of {len(prompts)} prompts is answered by both {ours.name} "
            f"({len(ours.texts)} answers) and {theirs.name} ({len(theirs.texts)}); accepted: two "
            "sides with answers to prompts of the same ids"
        )
    return dataclasses.replace(ours, prompts=common), dataclasses.replace(theirs, prompts=common)


def read(file: pathlib.Path) -> Answers:
    """The answers of a samples file.

    Raises:
      UserError: a line is no record of a response to a prompt.
    """
    records = list(samples.read(file))
    prompts: dict[str, Prompt] = {}
    for number, record in enumerate(records, 1):
        try:
            if not isinstance(record.get("response"), str):
                raise BadExample("no `response`, a text")
            row = {"prompt": record.get("prompt"), "id": record["id"]}
            prompts.setdefault(record["id"], prompt_of(row, record["id"]))
        except BadExample as error:
            raise UserError(
                f"{file}, line {number}: {error.reason}; accepted: a samples file of attnpo "
                "generate"
            ) from None
    return _answers(str(file), list(prompts.values()), records)


def _file_of(which: str) -> pathlib.Path | None:
    if which == models.BASE or models.is_trained(which):
        return None
    path = pathlib.Path(which).expanduser()
    return path if path.is_file() else None


def _answers(name: str, prompts: Sequence[Prompt], records: Sequence[Mapping[str, Any]]) -> Answers:
    texts: dict[str, str] = {}
    for record in records:
        texts.setdefault(record["id"], record["response"])
    return Answers(name, texts, prompts)


def _prompts(task: Task, of_files: Mapping[str, Answers]) -> list[Prompt]:
    """The prompts that are to be answered: as the config says, else those of a samples file, else
    the held-out pairs'.
    """
    run, section = task.run, task.section
    if not section.prompts:
        for side in of_files.values():
            return list(side.prompts[: section.count])
        if "eval" in run.splits:
            return run.held_out_prompts(section.count)
    most = run.config.data.max_example_bytes
    good, bad = load_prompts(section.prompts or _BUILTIN, run.columns, most)
    if not good:
        raise UserError(f"config.evaluate.versus.prompts: none of {len(bad)} is one: {bad[0]}")
    if bad:
        _LOG.warning("%d rows are no prompts, the first one: %s", len(bad), bad[0])
    return good[: section.count]


def _check(side: Answers, prompts: Sequence[Prompt]) -> None:
    answered = {prompt.id: prompt.messages for prompt in side.prompts}
    for prompt in prompts:
        if answered.get(prompt.id, prompt.messages) != prompt.messages:
            raise UserError(
                f"{side.name}: what it answers as prompt {prompt.id} is another prompt than "
                "evaluate.versus.prompts has under that id; accepted: the same prompts"
            )
