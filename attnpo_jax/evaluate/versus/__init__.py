"""`versus`: a model's answers against another one's, pair by pair, in both orders."""

import collections
import math
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.data.pair import Pair
from attnpo_jax.evaluate.evaluator import Evaluator, Figure, Result, figure
from attnpo_jax.evaluate.task import Task
from attnpo_jax.evaluate.versus import answers, judges, outcomes
from attnpo_jax.evaluate.versus.judges import Verdicts
from attnpo_jax.generate import model as models
from attnpo_jax.parallel import processes
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.errors import UserError

_ENDPOINT = "endpoint"


def run(task: Task) -> Result:
    """Has both sides answer, as far as they have not, has the pairs judged, and counts.

    Raises:
      UserError: there is no such judge or baseline; see `answers.both` and `Endpoint.ask`.
    """
    load = answers.Models(task)
    ours, theirs = answers.both(task, load)
    pairs = [
        Pair(p.id, p.messages, ours.texts[p.id], theirs.texts[p.id], tools=p.tools)
        for p in ours.prompts
    ]
    differ = [pair for pair in pairs if pair.chosen.strip() != pair.rejected.strip()]
    judge, said = _judge(task, load, differ)
    verdicts = dict(zip((pair.id for pair in differ), said, strict=True))
    rows = [row_of(pair, verdicts.get(pair.id)) for pair in pairs]
    about = {"baseline": theirs.name, "judge": judge} | summary(rows)
    return Result(rows, figures(rows), about)


def _judge(task: Task, load: answers.Models, pairs: Sequence[Pair]) -> tuple[str, list[Verdicts]]:
    """The judge's name, and what it says of the pairs."""
    judge = _model_that_judges(task.run.config)
    if judge is not None:
        sampled = load(judge)
        return sampled.name, judges.ask_model(task.run, sampled, pairs) if pairs else []
    endpoint = task.judge()
    if endpoint is None:
        raise UserError(
            "config.evaluate.versus.judge = 'endpoint', but config.evaluate.judge.base_url = ''; "
            "accepted: an address there"
        )
    if not processes.is_first():
        return endpoint.model, [Verdicts((math.nan, math.nan))] * len(pairs)
    return endpoint.model, judges.ask_endpoint(endpoint, task.run.template, pairs)


def _model_that_judges(config: Any) -> str | None:
    """Which model on this machine judges; None where an endpoint does."""
    judge = config.evaluate.versus.judge
    if judge == _ENDPOINT or (not judge and config.evaluate.judge.base_url):
        return None
    return judge or models.BASE


def row_of(pair: Pair, said: Verdicts | None) -> dict[str, Any]:
    """What is written of a pair.

    Args:
      pair: the model's answer is the chosen one, the baseline's the rejected one.
      said: the judge's verdicts; None where both answers are the same, a tie.

    Returns:
      `win` (1, 0, or a half for a tie; None for what was not judged), `decided` (0 or 1), `tie`
      (why it is one), `verdicts` (by order), `first_shown` (the share of orders in which the answer
      at A was preferred), `longer_won` (of decided pairs), lengths in characters.
    """
    lengths = len(pair.chosen), len(pair.rejected)
    row = {"id": pair.id, "win": 0.5, "decided": 0.0, "tie": "identical", "verdicts": None}
    row |= {"first_shown": None, "longer_won": None}
    row |= {"length": lengths[0], "baseline_length": lengths[1]}
    if said is None:
        return row
    if said.refused:
        return row | {"win": None, "decided": None, "tie": None, "refused": said.refused}
    win = outcomes.outcome(said.orders)
    first = outcomes.first_shown(said.orders)
    unread = any(map(math.isnan, said.orders))
    decided = win != 0.5
    row |= {
        "win": win,
        "decided": float(decided),
        "tie": None if decided else "unreadable" if unread else "orders disagree",
        "verdicts": [None if math.isnan(one) else one for one in said.orders],
        "first_shown": None if math.isnan(first) else first,
    }
    if decided and lengths[0] != lengths[1]:
        row["longer_won"] = float((win == 1.0) == (lengths[0] > lengths[1]))
    return row


def figures(rows: Sequence[Mapping[str, Any]]) -> dict[str, Figure]:
    """The figures of rows; see `outcomes` for how each is taken."""
    judged = [row for row in rows if row["win"] is not None]
    wins = [row["win"] for row in judged]
    lengths, others = ([row[name] for row in judged] for name in ("length", "baseline_length"))
    won, lost = wins.count(1.0), wins.count(0.0)
    controlled = outcomes.length_controlled(wins, lengths, others)
    return {
        "win_rate": Figure(*outcomes.win_rate(wins), len(wins), "win"),
        "length_controlled_win_rate": Figure(*controlled, len(wins)),
        "decided": figure(rows, "decided"),
        "sign_test_p": Figure(intervals.sign_test(won, lost), count=won + lost),
        "first_shown_preferred": figure(rows, "first_shown"),
        "longer_preferred": figure(rows, "longer_won"),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Counts of what the pairs came to, and the mean lengths of the answers."""
    ties = collections.Counter(row["tie"] for row in rows if row["tie"] is not None)
    refused = [row for row in rows if "refused" in row]
    told = {
        "wins": sum(row["win"] == 1.0 for row in rows),
        "losses": sum(row["win"] == 0.0 for row in rows),
        "ties": dict(sorted(ties.items())),
        "characters": round(sum(row["length"] for row in rows) / len(rows), 1),
        "characters of the baseline": round(
            sum(row["baseline_length"] for row in rows) / len(rows), 1
        ),
    }
    if refused:
        told["not judged"] = (
            f"{len(refused)}, the first one {refused[0]['id']}: " + (refused[0]["refused"])
        )
    return told


def _others(config: Any) -> list[str]:
    judge = _model_that_judges(config)
    return [config.evaluate.versus.baseline, *([] if judge is None else [judge])]


EVALUATOR = Evaluator(
    "versus",
    run,
    compares=True,
    reads=(
        *("data.eval", "data.fields.", "generate.", "judge.max_", "judge.template", "model."),
        "evaluate.judge.model",
    ),
    others=_others,
)
