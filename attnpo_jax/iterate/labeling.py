"""From a round's answers to its pairs: labeled, paired, and, where they are judged, prepared."""

import collections
import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from ml_collections import config_dict

from attnpo_jax.evaluate.endpoint import DryRun
from attnpo_jax.iterate import (
    judged,
    labelers,  # noqa: F401 (they register)
)
from attnpo_jax.iterate.labeler import Group, Label, Labels, Task, registry
from attnpo_jax.iterate.pairing import Chosen, pairs_of
from attnpo_jax.iterate.rounds import LABELS, Round, write_pairs
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.prepare.pair_forms import PairTokenizer
from attnpo_jax.prepare.readers import not_read_by_scorers
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic, json_files, schema
from attnpo_jax.runtime.errors import Preempted, UserError

if TYPE_CHECKING:
    from functools import partial

_LOG = logging.getLogger(__name__)

LABELED = "labeled.json"
UNFIT = "can't be trained on"
_AT_A_TIME = 64  # pairs that are tokenized
_LABELED = schema.Table(
    {
        "figures": schema.Mapped(schema.Number()),
        "without a pair": schema.Mapped(schema.Whole()),
    }
)
_PLACES = schema.Listed(schema.Row((schema.Whole(), schema.Whole(), schema.Whole())))


def labeler_of(config: config_dict.ConfigDict) -> "partial":
    """The labeler that `config.iterate` names, with its keyword arguments.

    Raises:
      UserError: there is none of that name, or it takes no such arguments.
    """
    name = config.iterate.labeler
    own = config.iterate.get(name)
    if not isinstance(own, config_dict.ConfigDict):
        own = config.iterate.options or {}
    try:
        return registry.bind(name, dict(own.items()))
    except UserError as error:
        raise UserError(f"config.iterate.labeler = {name!r}: {error}") from None


def task_of(round: Round, run: Run) -> Task:
    """What a round's labeler is given."""
    base = round.base
    return Task(run, base.config.model.source, round.folder / LABELS, base.workdir)


def check(round: Round, run: Run) -> None:
    """Has the labeler say what is wrong with its arguments, before anything is sampled."""
    labeler_of(run.config)(task_of(round, run), ())


def done(round: Round) -> dict[str, Any] | None:
    """The figures of a round that is labeled and paired already; the same in all processes.

    Raises:
      UserError: the file that has them is damaged.
    """
    file, found = round.folder / LABELED, None
    if processes.is_first() and file.exists() and round.pairs.exists():
        found = json_files.read(file, _LABELED, "delete it, and the answers are labeled again")
    return processes.exchange(found, schema.Maybe(_LABELED))[0]


def label(
    round: Round, run: Run, groups: Sequence[Group], records: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Labels and pairs the answers, and writes the round's pairs.

    Args:
      run: the round's.
      groups: the different answers to each prompt.
      records: all answers, as they were sampled.

    Returns:
      `figures` and `without a pair`: how many prompts give none, by why.

    Raises:
      UserError: not one pair comes of it, or the labeler can't go on.
      Preempted: SIGTERM or Ctrl-C came.
    """
    if found := done(round):
        return found
    labels = _labels(round, run, groups)
    places, content = _paired(round, run, groups, records, labels)
    write_pairs(round.pairs, ((groups[k], i, j) for k, i, j in places), run.config)
    if labels.judged is not None:
        judged.take(run, labels.judged)
    if processes.is_first():
        atomic.write_json(round.folder / LABELED, content)
    processes.barrier("iterate: labeled")
    return content


def _labels(round: Round, run: Run, groups: Sequence[Group]) -> Labels:
    found = ended = None
    try:
        found = labeler_of(run.config)(task_of(round, run), groups)
    except (DryRun, Preempted) as error:  # of the first one alone, if it asks an endpoint
        ended = error
    processes.barrier("iterate: labels")
    kinds = (Preempted, DryRun)
    for kind, does in zip(
        kinds, preemption.agreed_each([isinstance(ended, one) for one in kinds]), strict=True
    ):
        if does:
            raise ended or kind("ended while labeling; the same command goes on")
    name = run.config.iterate.labeler
    if not isinstance(found, Labels) or len(found.labels) != len(groups):
        raise UserError(
            f"config.iterate.labeler = {name!r}: accepted: a function that returns Labels with one "
            f"Label for each of its {len(groups)} groups"
        )
    for group, one in zip(groups, found.labels, strict=True):
        if len(one.scores) != len(group.answers):
            raise UserError(
                f"config.iterate.labeler = {name!r}: {len(one.scores)} scores for the "
                f"{len(group.answers)} answers to prompt {group.prompt.id}; accepted: one each"
            )
    return dataclasses.replace(
        found, figures={k: float(v) for k, v in found.figures.items() if math.isfinite(v)}
    )


def _paired(
    round: Round,
    run: Run,
    groups: Sequence[Group],
    records: Sequence[Mapping[str, Any]],
    labels: Labels,
) -> tuple[list[tuple[int, int, int]], dict[str, Any]]:
    """The pairs (which prompt, chosen, rejected), and figures; the first process's count."""
    places: list[tuple[int, int, int]] = []
    content: dict[str, Any] = {"figures": {}, "without a pair": {}}
    if processes.is_first():
        pairing = run.config.iterate.pairing
        chosen = [pairs_of(*of, pairing) for of in zip(groups, labels.labels, strict=True)]
        unfit = _unfit(run, groups, chosen)
        none: collections.Counter[str] = collections.Counter()
        rows = []
        for k, group in enumerate(groups):
            fit = [two for two in chosen[k].places if group.pair(*two).id not in unfit]
            places += [(k, i, j) for i, j in fit]
            why = chosen[k].why_none or ("" if fit else UNFIT)
            none.update([why] if why else [])
            rows.append(_row(group, labels.labels[k], fit, why))
        atomic.write_json_lines(round.folder / f"{LABELS}.jsonl", rows)
        content["without a pair"] = dict(sorted(none.items()))
        content["figures"] = _figures(groups, records, places) | dict(labels.figures)
    places = [(*one,) for one in processes.exchange(places, _PLACES)[0]]
    content = processes.exchange(content, _LABELED)[0]
    if not places:
        why = ", ".join(f"{count} {name}" for name, count in content["without a pair"].items())
        raise UserError(
            f"round {round.number}: none of {len(groups)} prompts gives a pair ({why}); accepted: "
            "more prompts, more or longer samples, a higher config.generate.temperature, or "
            f"another labeler; {round.folder / LABELS}.jsonl has what was labeled"
        )
    return places, content


def _unfit(run: Run, groups: Sequence[Group], chosen: Sequence[Chosen]) -> set[str]:
    """The ids of the pairs that the model's tokenizer and the lengths do not let be trained on, or
    that a scorer can't read.
    """
    tokenize = PairTokenizer.from_config(
        run.config,
        run.tokenizer,
        run.template,
        vocab_size=run.model.vocab_size,
        on_bad_row="skip",
        judge=None if run.judge is None else run.judge.tokenizer,
        judge_vocab_size=None if run.judge is None else run.judge.shape.vocab_size,
    )
    pairs = [
        group.pair(*two) for group, of in zip(groups, chosen, strict=True) for two in of.places
    ]
    found = set()
    for start in range(0, len(pairs), _AT_A_TIME):
        some = pairs[start : start + _AT_A_TIME]
        forms, bad = tokenize(some)
        for one in (*bad, *not_read_by_scorers(run, some, forms)):
            _LOG.warning("a pair is left out: %s", one)
            found.add(one.id)
    return found


def _row(group: Group, label: Label, places: Sequence[tuple[int, int]], why: str) -> dict[str, Any]:
    answers = [
        {
            "samples": list(one.samples),
            "finished": one.finished,
            "failed": one.failed,
            "score": None if score is None else float(score),
        }
        for one, score in zip(group.answers, label.scores, strict=True)
    ]
    return {
        "id": group.prompt.id,
        "answers": answers,
        "better": None if label.beats is None else sorted(map(list, label.beats)),
        "pairs": [list(two) for two in places],
        "without a pair": why or None,
    }


def _figures(
    groups: Sequence[Group],
    records: Sequence[Mapping[str, Any]],
    places: Sequence[tuple[int, int, int]],
) -> dict[str, float]:
    tokens = {(record["id"], record["sample"]): len(record["tokens"]) for record in records}
    unfinished = sum(record["finish_reason"] != "stop" for record in records)
    told = {
        "prompts": len(groups),
        "responses": len(records),
        "pairs": len(places),
        "tokens": float(np.mean([*tokens.values()])),
        "unfinished": unfinished / len(records),
    }
    for side, which in (("chosen", 1), ("rejected", 2)):
        lengths = [
            tokens[groups[place[0]].prompt.id, groups[place[0]].answers[place[which]].samples[0]]
            for place in places
        ]
        if lengths:
            told[f"{side}_tokens"] = float(np.mean(lengths))
    return told
