"""Where a run's numbers go: `metrics.jsonl`, and TensorBoard and Weights & Biases on request.

`metrics.jsonl` holds one JSON object a line: metrics of the step that ended with `step` optimizer
steps done, or, with names that begin with `eval_`, those of an evaluation after `step` steps.
Numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity".
"""

import contextlib
import json
import math
import os
import pathlib
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from attnpo_jax.runtime import atomic
from attnpo_jax.runtime.errors import UserError

FILE = "metrics.jsonl"

Line = dict[str, Any]


class Writer(Protocol):
    """Something that takes metrics by step."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self) -> None: ...


class MetricsWriter:
    """Writes lines of metrics to every writer asked for.

    Args:
      workdir: the run's folder.
      start_step: steps done before this run. Lines of later steps, which an interrupted run wrote
        after its last checkpoint, are removed, for this run will write them anew.
      log: the `log` section of the config; None for the file alone.
      config: the whole config as nested JSON values, shown by Weights & Biases.
      writes: whether anything is written: by one process of a run, not by the others.

    Raises:
      UserError: a line of `metrics.jsonl` other than an unfinished last one is not one of ours.
      ImportError: a writer's package is missing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start_step: int,
        *,
        log: Any = None,
        config: Mapping[str, Any] | None = None,
        writes: bool = True,
    ):
        self.workdir = workdir = pathlib.Path(workdir)
        self._writers: list[Writer] = []
        if not writes:
            return
        self._writers += [_JsonLines(workdir / FILE, start_step)]
        if log is not None and log.tensorboard:
            self._writers.append(_TensorBoard(workdir / "tensorboard", start_step))
        if log is not None and log.wandb:
            self._writers.append(_Wandb(workdir, log.wandb_project, config))

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, error_type, error, traceback) -> None:
        for writer in self._writers:
            writer.close()

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a line; `values` are Python numbers."""
        for writer in self._writers:
            writer.write(step, values)

    def flush(self) -> None:
        """Brings all lines to the disk, where they survive the machine."""
        for writer in self._writers:
            writer.flush()


def read(workdir: str | os.PathLike) -> list[Line]:
    """The lines of a run's `metrics.jsonl`; none if there is no file.

    Raises:
      UserError: a line other than an unfinished last one is not one of ours.
    """
    path = pathlib.Path(workdir) / FILE
    if not path.exists():
        return []
    *complete, _ = path.read_text().split("\n")  # a killed run may leave half a last line
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            line = json.loads(text)
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise ValueError("no JSON object with a whole number `step`")
        except ValueError as error:
            raise UserError(
                f"{path}:{number}: not a line of metrics ({error}); delete or mend it"
            ) from error
        lines.append({name: _from_json(value) for name, value in line.items()})
    return lines


_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _from_json(value: Any) -> Any:
    return _SPECIAL.get(value, value) if isinstance(value, str) else value


def _to_json(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    return value


def _encode(line: Mapping[str, Any]) -> bytes:
    text = json.dumps({name: _to_json(value) for name, value in line.items()}, allow_nan=False)
    return text.encode() + b"\n"


class _JsonLines:
    def __init__(self, path: pathlib.Path, start_step: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = read(path.parent) if start_step else []
        kept = [line for line in lines if line["step"] <= start_step]
        atomic.write_atomically(path, b"".join(map(_encode, kept)))
        self._path = path
        # Unbuffered: a line is with the operating system as soon as it is written.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        rest = _encode({"step": step, **values})
        with self._naming_the_file():
            while rest:
                rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        with self._naming_the_file():
            os.fsync(self._file.fileno())
            # Buckets that are mounted as folders get a file when it is closed.
            self._file.close()
            self._file = self._path.open("ab", buffering=0)

    @contextlib.contextmanager
    def _naming_the_file(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self._path)) from error

    def close(self) -> None:
        self._file.close()


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, start_step: int):
        import tensorboardX

        # What an interrupted run wrote after its last checkpoint is hidden.
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, workdir: pathlib.Path, project: str, config: Mapping[str, Any] | None):
        import wandb

        # The id makes a resumed run continue the same curves.
        id_file = workdir / "wandb_id"
        if not id_file.exists():
            atomic.write_atomically(id_file, uuid.uuid4().hex[:12].encode())
        self._run = wandb.init(
            project=project,
            id=id_file.read_text(),
            resume="allow",
            dir=str(workdir),
            config=dict(config or {}),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Steps that W&B has seen before the interruption are dropped there, not doubled.
        self._run.log(dict(values), step=step)

    def flush(self) -> None:
        pass  # sends on its own

    def close(self) -> None:
        self._run.finish()
