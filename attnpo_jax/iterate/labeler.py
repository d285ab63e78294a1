"""What says which answers are better: a function of a task and its answers, registered by name.

One of your own is a file that registers one, named in `config.plugins`; its keyword-only arguments
are what `config.iterate.options` may set:

    from attnpo_jax.iterate import Label, Labels, register

    @register
    def shorter(task, groups, *, least: int = 20):
        def score(answer):
            return None if answer.failed or len(answer.text) < least else -len(answer.text)

        return Labels([Label([score(answer) for answer in group.answers]) for group in groups])
"""

import dataclasses
import math
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax.data.pair import Pair
from attnpo_jax.data.prompts import Prompt
from attnpo_jax.registry import Registry

if TYPE_CHECKING:
    from attnpo_jax.run import Run

registry = Registry("labeler", ("task", "groups"))
register = registry.register


@dataclasses.dataclass(frozen=True)
class Answer:
    """One of the different answers to a prompt.

    Attributes:
      text: as it was sampled.
      samples: the numbers of the samples that it is.
      finished: whether it ended by itself, and not for want of room.
      failed: whether it may be no better than the worst: it is blank, or it is unfinished and
        `config.iterate.unfinished` has that count as failed.
    """

    text: str
    samples: tuple[int, ...]
    finished: bool
    failed: bool

    @property
    def is_blank(self) -> bool:
        """Whether nothing is in it, so that no pair can have it."""
        return not self.text.strip()


@dataclasses.dataclass(frozen=True)
class Group:
    """A prompt and the different answers to it, in the order in which they came.

    Attributes:
      row: what the prompt's source has of it.
    """

    prompt: Prompt
    row: Mapping[str, Any]
    answers: tuple[Answer, ...]

    def pair(self, chosen: int, rejected: int) -> Pair:
        """Two answers, by their places, as a pair; its id says which ones they are."""
        texts = (self.answers[place].text for place in (chosen, rejected))
        id = f"{self.prompt.id}/{chosen}-{rejected}"
        return Pair(id, self.prompt.messages, *texts, tools=self.prompt.tools)

    def candidates(self) -> list[tuple[int, int]]:
        """The places of all two answers that could be a pair, each once, smaller places first."""
        places = [place for place, one in enumerate(self.answers) if not one.is_blank]
        return [
            (i, j)
            for i in places
            for j in places
            if i < j and not (self.answers[i].failed and self.answers[j].failed)
        ]


@dataclasses.dataclass(frozen=True)
class Label:
    """Which of a prompt's answers are better.

    Attributes:
      scores: of each answer, the higher the better; None: worse than all others.
      beats: the places (i, j) of answers of which i is better than j, where that is not what the
        scores say: these then say which one is the best and the worst.
    """

    scores: Sequence[float | None]
    beats: Collection[tuple[int, int]] | None = None

    def rank(self, place: int) -> float:
        """The score of an answer; -inf for none."""
        score = self.scores[place]
        return -math.inf if score is None else score

    def is_better(self, i: int, j: int) -> bool:
        """Whether answer i is better than answer j."""
        if self.beats is not None:
            return (i, j) in self.beats
        return self.rank(i) > self.rank(j)


@dataclasses.dataclass(frozen=True)
class Labels:
    """What a labeler gives.

    Attributes:
      labels: one for each group.
      figures: numbers to tell and to log, by name, as a pass rate.
      judged: a run that has prepared pairs, called as `Group.pair` calls them, with the round's own
        judge; those that are trained on are taken from there and not judged again.
    """

    labels: Sequence[Label]
    figures: Mapping[str, float] = dataclasses.field(default_factory=dict)
    judged: "Run | None" = None


@dataclasses.dataclass(frozen=True, eq=False)
class Task:
    """What a labeler is given beside the answers.

    Attributes:
      run: the round's run; its `base` model is the one that has answered.
      first: what `model.source` is of the first round.
      folder: for files of the labeler's own, of this round.
      shared: for files that all rounds share, such as what an endpoint has answered.
    """

    run: "Run"
    first: str
    folder: pathlib.Path
    shared: pathlib.Path


def contest(
    group: Group, verdicts: Mapping[tuple[int, int], Sequence[float]]
) -> tuple[Label, dict[str, int]]:
    """The label that comparisons in both orders give; an answer's score is how many it beats.

    Args:
      verdicts: by places (i, j), i < j: by order, log p(letter of answer i) - log p(other letter);
        NaN for one that can't be read.

    Returns:
      The label: an answer beats another one where both orders say so, or where that one alone has
      failed. And counts: `compared` pairs, and of them `agreed`, those whose orders agree.
    """
    beats: set[tuple[int, int]] = set()
    agreed = 0
    for (i, j), orders in verdicts.items():
        if all(verdict > 0 for verdict in orders):
            beats.add((i, j))
        elif all(verdict < 0 for verdict in orders):
            beats.add((j, i))
        else:
            continue
        agreed += 1
    failed = [one.failed for one in group.answers]
    beats = {(i, j) for i, j in beats if not failed[i]}
    places = range(len(failed))
    beats |= {(i, j) for i in places for j in places if failed[j] and not failed[i]}
    scores = [float(sum(winner == place for winner, _ in beats)) for place in places]
    return Label(scores, beats), {"compared": len(verdicts), "agreed": agreed}
