"""The error of a config that cannot be used."""

from collections.abc import Sequence

from attnpo_jax.runtime.errors import UserError


class ConfigError(UserError):
    """A config that cannot be used.

    Attributes:
      problems: one sentence each, naming the field, the value found and what is accepted.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the config:\n{lines}")
