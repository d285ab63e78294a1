"""`judge`: a model compares the answers, two at a time and in both orders."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import losses, prepare, weighting
from attnpo_jax.iterate import rounds
from attnpo_jax.iterate.labeler import Group, Labels, Task, contest, register
from attnpo_jax.run import Run


@register
def judge(task: Task, groups: Sequence[Group], *, model: str = "round") -> Labels:
    """An answer is better than another one where the model says so in both orders.

    All answers to a prompt meet each other. The pairs are prepared as training pairs are, so that
    the model's attention, where it is the one that the round starts from, is there for the weights.

    Args:
      model: `round` for the judge of the round's pairs, which is the model that it starts from, or
        what `config.judge.source` names; `first` for the one that the first round started from; or
        an HF folder or hub id.

    Raises:
      UserError: see `prepare.prepare`; no two answers can be compared.
      Preempted: SIGTERM or Ctrl-C came; finished shards stay.
    """
    places = [(group, *two) for group in groups for two in group.candidates()]
    if not places:
        return Labels([contest(group, {})[0] for group in groups])
    source = {"round": task.run.config.model.source, "first": task.first}.get(model, model)
    own = model == "round" or (source == task.run.config.model.source and task.run.judge is None)
    run = _run(task, source, own)
    rounds.write_pairs(run.config.data.train, places, run.config)
    prepare.prepare(run, splits=("train",), console=Console(quiet=True))
    dataset = run.open_prepared("train")
    verdicts = {row["id"]: row["judge_verdict"] for row in dataset}
    labels, counts = [], {"compared": 0, "agreed": 0}
    for group in groups:
        found = {
            two: verdicts[id].tolist()
            for two in group.candidates()
            if (id := group.pair(*two).id) in verdicts
        }
        label, of_group = contest(group, found)
        labels.append(label)
        counts = {name: counts[name] + of_group[name] for name in counts}
    told = figures(counts, verdicts.values())
    return Labels(labels, told, run if _is_of_round(task, own) else None)


def figures(counts: dict[str, int], verdicts: Any) -> dict[str, float]:
    """The judge's figures: the share of pairs whose orders agree, and its log-odds for A."""
    orders = np.array([*verdicts], np.float64).reshape(-1, 2)
    orders = orders[np.isfinite(orders).all(axis=1)]
    told = {"compared": float(counts["compared"])}
    if counts["compared"]:
        told["agreement"] = counts["agreed"] / counts["compared"]
    if len(orders):
        # The first answer is at A in the first order, at B in the second.
        told["position_bias"] = float(np.mean(orders * [1, -1]))
    return told


def _is_of_round(task: Task, own: bool) -> bool:
    """Whether what the judge reads is what `prepare` would have it read for the weights."""
    return own and bool(task.run.source_layers)


def _run(task: Task, source: str, own: bool) -> Run:
    """The run that judges the candidates, as the round will its pairs, or with another model."""
    config = rounds.copy_of(task.run.config)
    task.folder.mkdir(parents=True, exist_ok=True)
    config.model.source = source
    if not own:
        config.judge.source = ""
        config.judge.chat_template = config.judge.chat_template_kwargs = None
    config.data.train = str(task.folder / "candidates.jsonl")
    config.data.eval = ""
    config.data.on_bad_row = "skip"
    config.judge.verdict = True
    config.train.keep_best = config.train.early_stopping.metric = ""
    config.train.samples.every = 0
    layers = task.run.source_layers if _is_of_round(task, own) else (-1,)
    config.judge.layers = layers
    # They read the judge, and nothing else that would have to be computed.
    config.weighting = config_lib.section_for(weighting, "attention", layer=layers[-1])
    config.objective = config_lib.section_for(losses, "simpo")
    config.prepare.scorers = {}
    return Run.resolve(config, task.folder)
