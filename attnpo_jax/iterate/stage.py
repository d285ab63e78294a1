"""`attnpo iterate`: rounds of sampling, labeling, pairing, judging, training and evaluating.

Each round is a run of its own in WORKDIR/rounds/N, on pairs of what its first model has answered;
the next one starts from the model that it has exported.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
from rich.console import Console

from attnpo_jax import config as config_lib
from attnpo_jax import export, prepare, train
from attnpo_jax.evaluate.endpoint import DryRun
from attnpo_jax.evaluate.evaluator import find
from attnpo_jax.evaluate.files import FOLDER, Evaluation
from attnpo_jax.evaluate.stage import evaluate_one, lacks_pairs, wanted
from attnpo_jax.evaluate.task import Subject
from attnpo_jax.generate import model as models
from attnpo_jax.generate.respond import respond
from attnpo_jax.iterate import answers, figures, labeling
from attnpo_jax.iterate.rounds import DONE, Round
from attnpo_jax.parallel import processes
from attnpo_jax.run import Run
from attnpo_jax.runtime import atomic, metrics
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import say

_LOG = logging.getLogger(__name__)

SAMPLES = "answers.jsonl"
_QUIET = Console(quiet=True)


def iterate(run: Run, *, console: Console | None = None) -> list[dict[str, Any]]:
    """Does the rounds that `config.iterate` asks for; what is done is not done again.

    Args:
      run: whose config each round has, with other models and pairs; its workdir holds `rounds/`.
      console: where figures go; None for standard output.

    Returns:
      What came of each round, as its `round.json` has it.

    Raises:
      RoundMismatch: a round was begun with other settings.
      UserError: the labeler or the prompts can't be used; a round gives no pair; as the stages
        raise.
      Preempted: SIGTERM or Ctrl-C came; what is done is kept.
    """
    console = (console or Console()) if processes.is_first() else _QUIET
    results: list[dict[str, Any]] = []
    with run.writing():
        _check(run)
        asked = answers.prompts_of(run)
        if processes.is_first():
            content = config_lib.to_json(run.config).encode()
            atomic.write_atomically(run.workdir / "config.json", content)
        source = run.config.model.source
        try:
            for number in range(1, run.config.iterate.rounds + 1):
                round = Round(run, number, source)
                results.append(_round(round, asked, console))
                if run.config.iterate.checkpoints == "drop":
                    _drop_checkpoints(round)
                figures.record(run, results)
                source = str(_model_of(round))
        except DryRun as error:
            say(console, error)
            return results
    figures.show(console, results)
    say(console, f"all figures in {run.workdir / metrics.FILE}")
    say(console, f"the last round's model: {source}")
    return results


def _check(run: Run) -> None:
    """All that can be told of the config before anything is computed."""
    config = run.config
    if config_lib.as_tuple(config.data.weight_columns):
        raise UserError(
            f"config.data.weight_columns = {config.data.weight_columns!r}: accepted: (), since "
            "answers that are sampled come without weights"
        )
    for name in wanted(run):
        find(name)


def _model_of(round: Round) -> pathlib.Path:
    """The folder of the model that a finished round has exported.

    Raises:
      UserError: it is gone.
    """
    folder = round.folder.resolve() / "export"
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{folder}: the model of round {round.number} is gone; accepted: the folder as it was, "
            f"or {round.folder / DONE} deleted, and the round is finished again"
        )
    return folder


def _round(round: Round, asked: Sequence[answers.Asked], console: Console) -> dict[str, Any]:
    """A round, from where it was interrupted."""
    run = round.run()
    settings = round.settings(run)
    if (found := round.result(settings)) is not None:
        return found
    with run.writing():
        round.begin(settings)
        say(console, f"round {round.number} of {run.config.iterate.rounds}: {round.folder}")
        labeled = labeling.done(round) or _label(round, run, asked)
        say(console, _told(labeled))
        prepare.prepare(run, keep_params=True, console=_QUIET)
        train.train(run, console=_QUIET)
        before = _evaluate(run, models.BASE) if round.number == 1 else {}
        after = _evaluate(run, round.model)
        step = int(Subject(run, round.model).name.removeprefix("step-"))
        best = "best" if run.config.train.keep_best else None
        export.export(run, step=best, console=_QUIET)
        result = {
            "figures": labeled["figures"] | figures.of_training(run, step),
            "without a pair": labeled["without a pair"],
            "evaluations": figures.evaluated(after),
            "evaluations before": figures.evaluated(before),
        }
        done = round.finish(settings, result)
    run.drop_params()
    # The next round compiles its own programs; these would stay in memory.
    jax.clear_caches()
    return done


def _label(round: Round, run: Run, asked: Sequence[answers.Asked]) -> dict[str, Any]:
    """Samples, labels and pairs."""
    labeling.check(round, run)
    section = run.config.iterate
    mine = answers.of_round(asked, round.number, section.prompts_per_round, run.config.seed)
    sampled = models.load(run, models.BASE)
    name = f"round-{round.number} ({run.weights_digest[:12]})"
    sampled = dataclasses.replace(sampled, name=name)
    if sampled.settings(**config_lib.sampling(run.config.generate)).temperature == 0:
        raise UserError(
            "config.generate.temperature = 0, or the model's own is: all answers to a prompt would "
            "be alike; accepted: a temperature above 0"
        )
    records, refused = respond(
        run,
        sampled,
        [prompt for prompt, _ in mine],
        run.workdir / "samples" / SAMPLES,
        samples=section.samples_per_prompt,
        seed=run.config.generate.seed + round.number - 1,
    )
    del sampled
    run.drop_params()
    if refused:
        _LOG.warning(
            "%d prompts are not answered, the first one %s: %s",
            len(refused),
            refused[0].id,
            refused[0].reason,
        )
    groups = answers.groups_of(mine, records, section.unfinished)
    if not groups:
        raise UserError(f"config.iterate.prompts: none of {len(mine)} prompts could be answered")
    return labeling.label(round, run, groups, records)


def _told(labeled: dict[str, Any]) -> str:
    told = labeled["figures"]
    line = (
        f"{told['responses']:.0f} answers to {told['prompts']:.0f} prompts, {told['tokens']:.0f} "
        f"tokens each, {told['unfinished']:.0%} unfinished; {told['pairs']:.0f} pairs"
    )
    if labeled["without a pair"]:
        none = ", ".join(f"{count} {why}" for why, count in labeled["without a pair"].items())
        line += f"; prompts without one: {none}"
    for name in ("pass_rate", "agreement"):
        if name in told:
            line += f"; {name.replace('_', ' ')} {told[name]:.1%}"
    return line


def _evaluate(run: Run, which: str) -> dict[str, Evaluation]:
    """The config's evaluations of one model, by name; in the first process alone."""
    evaluators = [one for one in map(find, wanted(run)) if not lacks_pairs(run, one)]
    if which == models.BASE:
        evaluators = [one for one in evaluators if not one.compares]
    if not evaluators:
        return {}
    subject, found = Subject(run, which), {}
    for one in evaluators:
        done = evaluate_one(run, one, subject, run.workdir / FOLDER / one.name, _QUIET)
        if done is not None:
            found[one.name] = done
    subject.release()
    return found


def _drop_checkpoints(round: Round) -> None:
    """Leaves a finished round its exported model alone."""
    folder = round.run().checkpoint_folder
    if processes.is_first() and folder.exists():
        folder.rmtree()
    processes.barrier("iterate: checkpoints are dropped")
