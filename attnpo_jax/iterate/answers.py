"""A round's prompts, and the model's answers to them."""

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prompts import Prompt, prompts_and_rows
from attnpo_jax.data.shuffle import shuffled
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.iterate.labeler import Answer, Group
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

Asked = tuple[Prompt, Mapping[str, Any]]  # a prompt, and its row


def prompts_of(run: "Run") -> list[Asked]:
    """All prompts of `config.iterate.prompts`, or those of the training pairs.

    Raises:
      UserError: there is no prompt among them.
    """
    config = run.config
    if not config.iterate.prompts:
        pairs = load_pairs(
            config.data.train,
            on_bad_row=config.data.on_bad_row,
            columns=run.columns,
            max_example_bytes=config.data.max_example_bytes,
        ).pairs
        return [
            (
                Prompt(one.id, one.prompt, one.tools),
                {"id": one.id, "prompt": list(one.prompt)}
                | {"chosen": one.chosen, "rejected": one.rejected},
            )
            for one in pairs
        ]
    source = config.iterate.prompts
    found = [*prompts_and_rows(source, run.columns, config.data.max_example_bytes)]
    bad = [prompt for prompt, _ in found if isinstance(prompt, BadExample)]
    if len(bad) == len(found):
        raise UserError(f"config.iterate.prompts: none of {len(bad)} is one: {bad[0]}")
    if bad:
        _LOG.warning("%d rows are no prompts, the first one: %s", len(bad), bad[0])
    return [(prompt, row) for prompt, row in found if not isinstance(prompt, BadExample)]


def of_round(asked: Sequence[Asked], number: int, per_round: int, seed: int) -> list[Asked]:
    """The prompts of a round: all, or the next ones of an order that `seed` draws.

    When all have been taken, another order begins; within a round no prompt is taken twice.

    Args:
      number: the round's, from 1.
      per_round: how many; 0 for all.
    """
    count = len(asked)
    if not per_round or per_round >= count:
        return list(asked)
    epoch, at = divmod((number - 1) * per_round, count)
    orders = shuffled(count, np.array([(seed + epoch + k) % 2**32 for k in (0, 1)]))
    drawn = list(dict.fromkeys(orders.reshape(-1)[at:].tolist()))[:per_round]
    return [asked[k] for k in drawn]


def groups_of(
    asked: Sequence[Asked], records: Sequence[Mapping[str, Any]], unfinished: str
) -> list[Group]:
    """The different answers to each prompt that was answered, white space around them aside.

    Args:
      records: of the samples file.
      unfinished: `failed` where unfinished answers count as failed.
    """
    by_prompt: dict[str, dict[str, list[Mapping[str, Any]]]] = {}
    for record in records:
        texts = by_prompt.setdefault(record["id"], {})
        texts.setdefault(record["response"].strip(), []).append(record)
    return [
        Group(
            prompt,
            row,
            tuple(_answer(same, unfinished) for same in by_prompt[prompt.id].values()),
        )
        for prompt, row in asked
        if prompt.id in by_prompt
    ]


def _answer(same: Sequence[Mapping[str, Any]], unfinished: str) -> Answer:
    text = same[0]["response"]
    finished = any(record["finish_reason"] == "stop" for record in same)
    failed = not text.strip() or (not finished and unfinished == "failed")
    return Answer(text, tuple(record["sample"] for record in same), finished, failed)
