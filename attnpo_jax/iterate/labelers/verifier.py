"""`verifier`: answers are better that do what is asked of them, as a function can tell."""

import functools
import inspect
import math
import numbers
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from attnpo_jax.data.pair import BadExample
from attnpo_jax.evaluate.checks.rows import Check
from attnpo_jax.iterate.labeler import Group, Label, Labels, Task, register
from attnpo_jax.parallel import preemption
from attnpo_jax.runtime import python_file
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.runtime.progress import CountProgress

FUNCTION = "verify"
Score = Callable[[Group, str], float]


@register
def verifier(task: Task, groups: Sequence[Group], *, checks: Any = (), file: str = "") -> Labels:
    """An answer's score is the share of its checks that it passes, or what a user's function says.

    One that has failed has the score 0, or the lowest of its prompt, if that is below.

    Args:
      checks: of every answer, as rows of prompts have them; () for those of each prompt's own row.
      file: a Python file with a function `verify(prompt, response)`; "" for checks.

    Raises:
      UserError: a prompt has no checks, or one is none; the file has no such function, it fails, or
        gives no number.
      Preempted: SIGTERM or Ctrl-C came.
    """
    score = _of_file(file) if file else functools.partial(_passed, tuple(map(_check, checks)))
    labels = []
    passed = of = 0
    bar = task.run.config.log.progress
    with (
        preemption.watch() as noticed,
        CountProgress("verify", len(groups), "prompts", bar=bar) as progress,
    ):
        for group in groups:
            if noticed():
                raise Preempted("told to stop while verifying; the same command begins it anew")
            scores = [0.0 if one.failed else score(group, one.text) for one in group.answers]
            least = min([0.0, *scores])
            scores = [
                least if one.failed else found
                for one, found in zip(group.answers, scores, strict=True)
            ]
            for one, found in zip(group.answers, scores, strict=True):
                passed += len(one.samples) * (found >= 1 and not one.failed)
                of += len(one.samples)
            labels.append(Label(scores))
            progress.add(1)
    return Labels(labels, {"pass_rate": passed / of} if of else {})


def _check(given: Any) -> Check:
    try:
        return Check.of(given)
    except BadExample as error:
        raise UserError(f"config.iterate.verifier.checks: {error.reason}") from None


def _passed(checks: Sequence[Check], group: Group, text: str) -> float:
    """The share of the checks that a text passes."""
    checks = checks or _own_checks(group)
    return sum(check.passes(text) for check in checks) / len(checks)


def _own_checks(group: Group) -> Sequence[Check]:
    given = group.row.get("checks")
    try:
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise BadExample("has no `checks`")
        return tuple(map(Check.of, given))
    except BadExample as error:
        raise UserError(
            f"config.iterate.prompts: prompt {group.prompt.id}: {error.reason}; accepted: a list "
            "of objects with `kind` in its row, or config.iterate.verifier.checks or .file"
        ) from None


def _of_file(file: str) -> Score:
    path = pathlib.Path(file).expanduser()
    named = f"config.iterate.verifier.file = {file!r}"
    if not path.is_file():
        raise UserError(f"{named}: no such file")
    try:
        verify = getattr(python_file.load(path), FUNCTION, None)
    except python_file.NotPythonError as error:
        raise UserError(f"{named}: {error}") from None
    except Exception as error:
        where = python_file.place(path, error)
        raise UserError(f"{named}: {where}: {type(error).__name__}: {error}") from error
    if not callable(verify) or len(inspect.signature(verify).parameters) != 2:
        raise UserError(f"{named}: accepted: a file with a function {FUNCTION}(prompt, response)")

    def score(group: Group, text: str) -> float:
        try:
            found = verify(dict(group.row), text)
        except Exception as error:
            where = python_file.place(path, error)
            raise UserError(
                f"{named}: {where}, of an answer to prompt {group.prompt.id}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if not isinstance(found, numbers.Real) or not math.isfinite(found):
            raise UserError(
                f"{named}: {FUNCTION} gave {found!r} for an answer to prompt {group.prompt.id}; "
                "accepted: True, False or a finite number"
            )
        return float(found)

    return score
