"""Which checkpoint is the newest whole one, and what counts as damage.

Whatever is found, all processes that read together come to the same conclusion.
"""

import os
import re
import warnings
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.experimental import multihost_utils

from attnpo_jax.runtime.errors import UserError


class CheckpointMismatch(UserError):
    """The newest checkpoint belongs to another run.

    Attributes:
      differences: name of a field or array -> (in the checkpoint, in this run).
    """

    def __init__(self, path: os.PathLike, differences: dict[str, tuple[Any, Any]]):
        shown = [
            f"  {name}: {saved} in the checkpoint, {wanted} here"
            for name, (saved, wanted) in list(differences.items())[:12]
        ]
        if len(differences) > len(shown):
            shown.append(f"  and {len(differences) - len(shown)} more")
        super().__init__(
            f"{path} can't be continued by this run, which differs in\n"
            + "\n".join(shown)
            + "\nAccepted: the settings of the checkpoint, or another workdir."
        )
        self.differences = differences


class CheckpointError(UserError, RuntimeError):
    """A checkpoint could not be written, or none of those there are can be read."""


# How a process's attempt to read a checkpoint ended; `newest_whole` takes the worst of all.
_READ, _DAMAGED, _FAILED = range(3)


def outcomes_of_all(own: int) -> list[int]:
    """What `own` is on every process; all of them must ask together."""
    return np.ravel(multihost_utils.process_allgather(np.array(own))).tolist()


def newest_whole(
    folder: epath.Path,
    steps: list[int],
    load: Callable[[int], tuple[Any, Any]],
    verify: Callable[[Any, Any], None],
    outcomes: Callable[[int], list[int]],
) -> tuple[int, Any, list[int]] | None:
    """The newest step that can be read and is whole, its arrays, and the newer steps that are not.

    Args:
      steps: in order; the same on all processes that read together.
      load: step -> arrays and their checksums; must not wait for other processes.
      verify: raises `CheckpointError` for arrays that have other checksums.
      outcomes: this process's outcome -> those of all processes that read together.
    """
    damaged: dict[int, Exception] = {}
    for step in reversed(steps):
        # Checksums of arrays that lie on several processes are computed by all of them together,
        # so all must have loaded theirs; and all go to the same step next.
        loaded, error = _attempt(lambda step=step: load(step))
        error = _agree(folder / str(step), error, outcomes)
        if error is None:
            _, error = _attempt(lambda loaded=loaded: verify(*loaded))
            error = _agree(folder / str(step), error, outcomes)
        if error is None:
            return step, loaded[0], list(damaged)
        # The next one may need the room: nothing may hold on to these arrays, as tracebacks do.
        loaded = None
        _forget_frames(error)
        damaged[step] = error
        reason = str(error).strip().split("\n")[0][:200]
        # The first process says so, and whoever knows why.
        if jax.process_index() == 0 or not isinstance(error, _Elsewhere):
            kind = CheckpointError if isinstance(error, CheckpointError) else type(error)
            warnings.warn(
                f"checkpoint {folder / str(step)} is damaged and will be skipped "
                f"({kind.__name__}: {reason})",
                RuntimeWarning,
                stacklevel=3,
            )
    if damaged:
        raise CheckpointError(
            f"none of the checkpoints in {folder} can be read (steps "
            f"{', '.join(map(str, damaged))}); delete them to start from the beginning"
        ) from damaged[max(damaged)]
    return None


def _forget_frames(error: BaseException | None) -> None:
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _attempt(call: Callable[[], Any]) -> tuple[Any, Exception | None]:
    try:
        return call(), None
    except Exception as error:  # whatever reading damaged files may end in
        return None, error


def _agree(
    path: epath.Path, error: Exception | None, outcomes: Callable[[int], list[int]]
) -> Exception | None:
    """What is damaged here or elsewhere; raises what is not damage, on all processes."""
    own = _READ if error is None else _DAMAGED if _is_damage(error) else _FAILED
    found = outcomes(own)
    if own == _FAILED and isinstance(error, CheckpointMismatch):
        raise error
    if own == _FAILED:
        raise CheckpointError(f"{path} could not be read: {error}") from error
    if _FAILED in found:
        raise CheckpointError(f"process {found.index(_FAILED)} could not read {path}")
    if error is None and _DAMAGED in found:
        return _Elsewhere(f"process {found.index(_DAMAGED)} could not read its part")
    return error


class _Elsewhere(CheckpointError):
    """Another process's part of a checkpoint is damaged."""


# How TensorStore and gRPC begin errors that say nothing about the files' content.
_NOT_DAMAGE = re.compile(
    r"\b(RESOURCE_EXHAUSTED|PERMISSION_DENIED|UNAUTHENTICATED|UNAVAILABLE|DEADLINE_EXCEEDED|"
    r"ABORTED|CANCELLED|INTERNAL|UNKNOWN):"
)
# Packages that speak to a bucket. That a file is not there, they say by FileNotFoundError.
_NETWORK = ("aiobotocore", "aiohttp", "botocore", "google", "gcsfs", "requests", "s3fs", "urllib3")


def _is_damage(error: BaseException) -> bool:
    """Whether an error in reading may come from damaged files, and not from how they are read.

    A whole checkpoint that is taken for damaged costs the steps since the one before; a damaged one
    that is not ends the run, with an error that names it. So files that are not where they should
    be are damage, but no other error of a file system or a network is.
    """
    if isinstance(error, OSError):
        missing = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
        return isinstance(error, missing)
    if isinstance(error, (CheckpointMismatch, MemoryError, jax.errors.JaxRuntimeError)):
        return False
    if type(error).__module__.partition(".")[0] in _NETWORK or _NOT_DAMAGE.search(str(error)):
        return False
    inner = [*getattr(error, "exceptions", ()), error.__cause__]
    return all(_is_damage(one) for one in inner if one is not None)


def set_aside(path: epath.Path) -> None:
    """Renames a damaged checkpoint, `7` to `damaged-7`, so that its step can be saved again."""
    target = path.with_name(f"damaged-{path.name}")
    if target.exists():
        target.rmtree()
    path.rename(target)
