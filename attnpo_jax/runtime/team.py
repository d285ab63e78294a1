"""Processes that share a piece of work, whatever they exchange their results by."""

import dataclasses
from collections.abc import Callable
from typing import Any

from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import UserError


@dataclasses.dataclass(frozen=True)
class Team:
    """Processes that do a piece of work together.

    Attributes:
      index: this process among them, from 0.
      count: how many they are.
      exchange: takes this process's value, which is JSON, and the form that everyone's must have,
        and returns everyone's, in order of their indices. All processes must call it equally often,
        in the same order.
    """

    index: int = 0
    count: int = 1
    exchange: Callable[[Any, schema.Form], list[Any]] = lambda value, form: [value]

    def part(self, total: int) -> range:
        """This process's contiguous part of a sequence of `total` places."""
        return range(total * self.index // self.count, total * (self.index + 1) // self.count)


ALONE = Team()


def check_alike(team: Team, source: Any, unit: str, found: int) -> None:
    """Checks that a source is as long for each of a team; UserError if it is not."""
    everyones = team.exchange(found, schema.Whole())
    if len(set(everyones)) > 1:
        listed = ", ".join(map(str, everyones))
        raise UserError(
            f"{source}: the processes find different numbers of {unit} ({listed}); accepted: the "
            "same data for all of them"
        )
