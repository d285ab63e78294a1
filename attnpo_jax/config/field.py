"""What the table of fields says of one field."""

import dataclasses
from typing import Any

from attnpo_jax.config.rules import Rule


@dataclasses.dataclass(frozen=True)
class Field:
    """One field.

    Attributes:
      default: its value where nothing else is said.
      rule: what it accepts.
      help: what it means, as in docs/config.md, whose links and backticks it has.
      mixed: whether it takes values of several types, so that a config holds it without one.
      decisive: whether a run resumes only with the same value.
    """

    default: Any
    rule: Rule
    help: str
    mixed: bool = False
    decisive: bool = False
