"""What an evaluation has to be given, asked for in the words of its options."""

import pathlib
from typing import TYPE_CHECKING

from attnpo_jax.evaluate import others_files
from attnpo_jax.runtime.errors import UsageError, UserError

if TYPE_CHECKING:
    from attnpo_jax.evaluate.endpoint import Endpoint
    from attnpo_jax.evaluate.task import Task


def path(task: "Task", field: str, what: str) -> pathlib.Path:
    """The path in a field of the evaluation's section.

    Raises:
      UsageError: the field is empty.
      UserError: there is nothing at it.
    """
    found = optional_path(task, field)
    if found is None:
        option = f"--{field.replace('_', '-')}"
        raise UsageError(f"evaluate {task.evaluator.name} needs {option}=PATH: {what}")
    return found


def optional_path(task: "Task", field: str) -> pathlib.Path | None:
    """The path in a field, or None where it is empty.

    Raises:
      UserError: there is nothing at it.
    """
    if not task.section[field]:
        return None
    found = others_files.path_of(task.section[field])
    if not found.exists():
        raise UserError(
            f"config.evaluate.{task.evaluator.section}.{field} = {str(found)!r}: nothing there; "
            "accepted: the path of a file or folder"
        )
    return found


def folder(task: "Task") -> pathlib.Path:
    """Where the evaluation's files go.

    Raises:
      UsageError: nowhere.
    """
    if task.folder is None:
        raise UsageError(
            f"evaluate {task.evaluator.name} needs --workdir=DIR or --out=DIR, for its files"
        )
    return task.folder


def judge(task: "Task") -> "Endpoint":
    """The endpoint that judges.

    Raises:
      UsageError: none is named.
    """
    found = task.judge()
    if found is None:
        raise UsageError(
            f"evaluate {task.evaluator.name} needs a judge: --judge-base-url=URL and "
            "--judge-model=NAME"
        )
    return found
