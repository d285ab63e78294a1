"""Prompts with checks: what a row of such a source holds, and how it is read.

A row is one that `data.prompts` reads, with `checks`: a list of objects, each with the `kind` of a
check and its parameters.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from attnpo_jax.config import rules
from attnpo_jax.data import limits
from attnpo_jax.data.pair import BadExample
from attnpo_jax.data.prompts import Prompt, prompts_and_rows
from attnpo_jax.evaluate.checks import counts, forms  # noqa: F401 (they register)
from attnpo_jax.evaluate.checks.registry import registry
from attnpo_jax.registry import RegistryError
from attnpo_jax.runtime.errors import UserError

_NAMED = 5  # bad rows that a message names


@dataclasses.dataclass(frozen=True)
class Check:
    """A kind of check with its parameters; made by `of`."""

    kind: str
    parameters: Mapping[str, Any]

    @classmethod
    def of(cls, given: Any) -> "Check":
        """The check in an object with its `kind` and its parameters; nulls are as nothing.

        Raises:
          BadExample: there is no such kind, or a parameter is missing, unknown, or not of its type.
        """
        if not isinstance(given, Mapping) or "kind" not in given:
            raise BadExample(f"check {given!r}; accepted: an object with `kind` and its parameters")
        parameters = {k: v for k, v in given.items() if k != "kind" and v is not None}
        check = cls(given["kind"], parameters)
        try:
            accepted = registry.hyperparameters(check.kind)
            hints = registry.annotations(check.kind)
            bound = check._bound
        except RegistryError as error:
            raise BadExample(str(error)) from None
        for name, value in parameters.items():
            rule = rules.of_hyperparameter(accepted[name], hints.get(name, object))
            if not rule.accepts(value) or value == "":
                raise BadExample(
                    f"check {check.kind!r}: {name} = {value!r}; accepted: {rule.accepted}"
                )
        try:
            bound("a")  # which looks at the values
        except ValueError as error:
            raise BadExample(f"check {check.kind!r}: {error}") from None
        return check

    @functools.cached_property
    def _bound(self) -> functools.partial:
        return registry.bind(self.kind, self.parameters)

    def passes(self, response: str) -> bool:
        """Whether a response does what is asked; one with nothing in it never does."""
        return bool(response.strip()) and self._bound(response)

    def passes_loosely(self, response: str) -> bool:
        """Whether it does without what models like to put around it.

        As Zhou et al. 2023 (arXiv 2311.07911) have it: any of eight texts has to pass, with and
        without the asterisks of Markdown, the first line, and the last line.
        """
        return any(map(self.passes, _loose(response)))


def _loose(response: str) -> list[str]:
    lines = response.strip().split("\n")
    cut = [lines, lines[1:], lines[:-1], lines[1:-1]]
    kept = [response, *("\n".join(some).strip() for some in cut[1:])]
    return kept + [text.replace("*", "") for text in kept]


@dataclasses.dataclass(frozen=True)
class CheckedPrompt:
    """A prompt, and what a response to it has to do."""

    prompt: Prompt
    checks: tuple[Check, ...]


def load(source: str, max_example_bytes: int = limits.MAX_EXAMPLE_BYTES) -> list[CheckedPrompt]:
    """The prompts of a source with their checks.

    Args:
      source: as `data.prompts.load_prompts` has it; `builtin:checks-train`, `builtin:checks-eval`.
      max_example_bytes: what a row may take.

    Raises:
      FileNotFoundError, UserError: there is no such source, or no prompt in it; or rows are bad,
        and are named.
    """
    found = [*prompts_and_rows(source, max_example_bytes=max_example_bytes, read=_checks_of)]
    if bad := [prompt for prompt, _ in found if isinstance(prompt, BadExample)]:
        more = f"\nand {len(bad) - _NAMED} more" if len(bad) > _NAMED else ""
        named = "\n".join(map(str, bad[:_NAMED]))
        raise UserError(f"{len(bad)} of {len(found)} prompts with checks are bad:\n{named}{more}")
    return [CheckedPrompt(prompt, checks) for prompt, checks in found]


def _checks_of(row: Mapping[str, Any]) -> tuple[Check, ...]:
    given = row.get("checks")
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise BadExample("no `checks`; accepted: a list of objects, each with `kind`")
    return tuple(map(Check.of, given))
