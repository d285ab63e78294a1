"""`endpoint`: a model behind an address of OpenAI's API compares the answers."""

import math
from collections.abc import Sequence

from attnpo_jax.evaluate.endpoint import Endpoint
from attnpo_jax.evaluate.versus.judges import ask_endpoint
from attnpo_jax.iterate.labeler import Group, Labels, Task, contest, register
from attnpo_jax.iterate.labelers.judge import figures
from attnpo_jax.parallel import processes

_ANSWERS = "judge.sqlite"


@register
def endpoint(task: Task, groups: Sequence[Group]) -> Labels:
    """As `judge`, of the endpoint in `config.evaluate.judge`, which is asked the judge's template.

    What it has answered is kept for all rounds, and not asked again. Answers that have failed are
    not shown to it.

    Raises:
      UserError, Preempted, DryRun: see `Endpoint.ask`.
    """
    config = task.run.config
    file = task.shared / _ANSWERS
    asked = Endpoint.open(config.evaluate.judge, file, progress=config.log.progress)
    found: dict[str, tuple[float, float]] = {}
    pairs = {group.pair(*two).id: group.pair(*two) for group in groups for two in _shown(group)}
    if pairs and processes.is_first():
        said = ask_endpoint(asked, task.run.template, [*pairs.values()])
        found = {id: one.orders for id, one in zip(pairs, said, strict=True)}
    labels, counts = [], {"compared": 0, "agreed": 0}
    for group in groups:
        ids = {two: group.pair(*two).id for two in _shown(group)}
        verdicts = {two: found[id] for two, id in ids.items() if id in found}
        label, of_group = contest(group, verdicts)
        labels.append(label)
        counts = {name: counts[name] + of_group[name] for name in counts}
    told = figures(counts, found.values())
    if found:
        told["unreadable"] = sum(any(map(math.isnan, v)) for v in found.values()) / len(found)
    return Labels(labels, told)


def _shown(group: Group) -> list[tuple[int, int]]:
    return [
        two for two in group.candidates() if not any(group.answers[place].failed for place in two)
    ]
