"""`reward`: the implicit reward of a model that was trained by DPO."""

from collections.abc import Sequence

import numpy as np
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import losses, weighting
from attnpo_jax.evaluate.evaluator import find
from attnpo_jax.evaluate.files import FOLDER
from attnpo_jax.evaluate.stage import evaluate_one
from attnpo_jax.evaluate.task import Subject
from attnpo_jax.iterate import rounds
from attnpo_jax.iterate.labeler import Group, Label, Labels, Task, register
from attnpo_jax.models.io import hf_folder
from attnpo_jax.run import Run

_MODEL = "reward"


@register
def reward(task: Task, groups: Sequence[Group], *, model: str = "", reference: str = "") -> Labels:
    """An answer's score is log pi(y | x) - log rho(y | x), summed over its tokens: the implicit
    reward of a DPO model pi with the reference rho (Rafailov et al. 2023, arXiv 2305.18290, eq. 5),
    but for beta and a term of the prompt alone.

    Answers that have failed have none, and are worse than all others.

    Args:
      model: HF folder or hub id of pi.
      reference: of rho, with the same tokenizer and chat template.

    Raises:
      UserError: see `evaluate.pairs.evaluation.run`.
      Preempted: SIGTERM or Ctrl-C came.
    """
    for source in (model, reference):
        hf_folder.resolve(source)  # what is not there is told before anything is scored
    places = [(group, *two) for group in groups for two in _in_twos(group)]
    found: dict[str, tuple[float, float]] = {}
    if places:
        run = _run(task, reference)
        rounds.write_pairs(run.config.data.eval, places, run.config)
        subject = Subject(run, model, _MODEL)
        folder = task.folder / FOLDER / "pairs"
        done = evaluate_one(run, find("pairs"), subject, folder, Console(quiet=True))
        subject.release()
        for row in done.result.rows if done is not None else ():
            found[row["id"]] = row["chosen_reward"], row["rejected_reward"]
    labels, rewards = [], []
    for group in groups:
        sound = _sound(group)
        scores: list[float | None] = [None] * len(group.answers)
        if len(sound) == 1:
            scores[sound[0]] = 0.0  # better than those that have failed, whatever its reward
        for i, j in _in_twos(group):
            # An answer that is there twice, so that all are in pairs, has the same score twice.
            for place, score in zip((i, j), found.get(group.pair(i, j).id, ()), strict=False):
                scores[place] = score
        rewards += [
            scores[place] for place in sound if len(sound) > 1 and scores[place] is not None
        ]
        labels.append(Label(scores))
    return Labels(labels, {"reward": float(np.mean(rewards))} if rewards else {})


def _sound(group: Group) -> list[int]:
    return [place for place, one in enumerate(group.answers) if not one.failed]


def _in_twos(group: Group) -> list[tuple[int, int]]:
    """The answers to score, two and two, since pairs are what is scored; none of one alone."""
    places = _sound(group)
    if len(places) < 2:
        return []
    return [
        (places[k], places[k + 1] if k + 1 < len(places) else places[0])
        for k in range(0, len(places), 2)
    ]


def _run(task: Task, reference: str) -> Run:
    """A run whose held-out pairs are the answers, and whose rewards are plain log-ratios."""
    config = rounds.copy_of(task.run.config)
    task.folder.mkdir(parents=True, exist_ok=True)
    config.model.source, config.reference.source = reference, ""
    config.data.train = config.data.eval = str(task.folder / "answers.jsonl")
    config.data.on_bad_row = "skip"
    config.judge.layers, config.judge.source = "none", ""
    config.judge.chat_template = config.judge.chat_template_kwargs = None
    config.prepare.scorers = {}
    config.weighting = config_lib.section_for(weighting, "uniform")
    config.objective = config_lib.section_for(losses, "sigmoid", beta=1.0)
    config.evaluate.pairs.source = config.evaluate.pairs.subset = ""
    return Run.resolve(config, task.folder)
