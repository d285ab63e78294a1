"""Where a run's numbers go: `metrics.jsonl`, and TensorBoard and Weights & Biases on request.

`metrics.jsonl` holds one JSON object a line: metrics of the step that ended with `step` optimizer
steps done, or, with names that begin with `eval_`, those of an evaluation after `step` steps.
Numbers that JSON does not have are the strings "NaN", "Infinity" and "-Infinity". By a line's last
two keys, `line` and `check`, damage is known (see `metric_lines`): what is no line any more goes to
`metrics.jsonl.damaged`.
"""

import contextlib
import html
import logging
import os
import pathlib
import re
import uuid
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

from attnpo_jax.runtime import atomic, metric_lines
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.metric_lines import Line

_LOG = logging.getLogger(__name__)

FILE = "metrics.jsonl"
DAMAGED = f"{FILE}.damaged"
_LISTED = 10  # places of damaged lines in a message


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
      log_every: steps between two lines; where the file ends sooner, that is said.
      writes: whether anything is written: by one process of a run, not by the others.

    Raises:
      ImportError: a writer's package is missing.
    """

    def __init__(
        self,
        workdir: str | os.PathLike,
        start_step: int,
        *,
        log: Any = None,
        config: Mapping[str, Any] | None = None,
        log_every: int | None = None,
        writes: bool = True,
    ):
        self.workdir = workdir = pathlib.Path(workdir)
        self._writers: list[Writer] = []
        if not writes:
            return
        self._writers += [_JsonLines(workdir / FILE, start_step, log_every)]
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

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        """Shows texts by name where there is a place for them; `metrics.jsonl` has none."""
        for writer in self._writers:
            if isinstance(writer, _TensorBoard | _Wandb):
                writer.write_texts(step, texts)

    def flush(self) -> None:
        """Brings all lines to the disk, where they survive the machine."""
        for writer in self._writers:
            writer.flush()


def read(workdir: str | os.PathLike) -> list[Line]:
    """The lines of a run's `metrics.jsonl`; none if there is no file.

    Those that are damaged are left out, with a warning.
    """
    path = pathlib.Path(workdir) / FILE
    found = _parse(path)
    if found.damaged:
        _LOG.warning("%s: %s is damaged and left out", path, _places(found.damaged))
    return [line.values for line in found.lines]


def _parse(path: pathlib.Path) -> metric_lines.Content:
    try:
        return metric_lines.parse(path.read_bytes())
    except FileNotFoundError:
        return metric_lines.parse(b"")


def _places(damaged: Mapping[int, bytes]) -> str:
    listed = ", ".join(map(str, list(damaged)[:_LISTED]))
    more = f" and {len(damaged) - _LISTED} more" if len(damaged) > _LISTED else ""
    return f"line {listed}{more}"


class _JsonLines:
    def __init__(self, path: pathlib.Path, start_step: int, log_every: int | None):
        path.parent.mkdir(parents=True, exist_ok=True)
        found = _parse(path)
        if found.damaged:
            _set_aside(path, found.damaged)
        kept = [line for line in found.lines if start_step and line.values["step"] <= start_step]
        if start_step:
            _tell_missing(path, found, kept, start_step, log_every)
        # Whole lines stay as they are; those of old get numbers and checks.
        texts = [
            metric_lines.encode(line.values, k) if line.number is None else line.text + b"\n"
            for k, line in enumerate(kept, 1)
        ]
        atomic.write_atomically(path, b"".join(texts))
        self._next = 1 + (kept[-1].number or len(kept) if kept else 0)
        self._path = path
        # Unbuffered: a line is with the operating system as soon as it is written.
        self._file = path.open("ab", buffering=0)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        rest = metric_lines.encode({"step": step, **values}, self._next)
        self._next += 1
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


def _set_aside(path: pathlib.Path, damaged: Mapping[int, bytes]) -> None:
    target = path.with_name(DAMAGED)
    with target.open("ab") as file:
        file.writelines(text + b"\n" for text in damaged.values())
        file.flush()
        os.fsync(file.fileno())
    _LOG.warning("%s: %s is damaged; set aside in %s", path, _places(damaged), target)


def _tell_missing(
    path: pathlib.Path,
    found: metric_lines.Content,
    kept: list[metric_lines.Found],
    start_step: int,
    log_every: int | None,
) -> None:
    """Says which lines a file lacks whose run goes on from a checkpoint of `start_step`."""
    for before, after in found.gaps:
        if after <= start_step:
            where = "before that" if before is None else f"between that of step {before} and that"
            _LOG.warning("%s: lines are missing, %s of step %d", path, where, after)
    if log_every:
        last = max((line.values["step"] for line in kept if "loss" in line.values), default=0)
        due = start_step - start_step % log_every
        if last < due:
            _LOG.warning(
                "%s: lines are missing, of steps %d to %d, which are saved", path, last + 1, due
            )


def _as_code(text: str) -> str:
    """The text as a block of Markdown that shows it as it is."""
    return "\n".join(f"    {line}" for line in text.split("\n"))


class _TensorBoard:
    def __init__(self, folder: pathlib.Path, start_step: int):
        import tensorboardX

        # What an interrupted run wrote after its last checkpoint is hidden.
        self._writer = tensorboardX.SummaryWriter(str(folder), purge_step=start_step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        for name, text in texts.items():
            self._writer.add_text(name, _as_code(text), step)

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
        found = id_file.read_bytes().strip()
        if not re.fullmatch(rb"[A-Za-z0-9_-]{1,64}", found):
            raise UserError(
                f"{id_file}: damaged ({found[:40]!r}); write the id of the run at W&B into it, or "
                "delete it to begin another run there"
            )
        self._run = wandb.init(
            project=project,
            id=found.decode(),
            resume="allow",
            dir=str(workdir),
            config=dict(config or {}),
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        # Steps that W&B has seen before the interruption are dropped there, not doubled.
        self._run.log(dict(values), step=step)

    def write_texts(self, step: int, texts: Mapping[str, str]) -> None:
        import wandb

        shown = {
            name: wandb.Html(f"<pre>{html.escape(text)}</pre>") for name, text in texts.items()
        }
        self._run.log(shown, step=step)

    def flush(self) -> None:
        pass  # sends on its own

    def close(self) -> None:
        self._run.finish()
