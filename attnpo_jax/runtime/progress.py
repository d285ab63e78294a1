"""Progress bars, and one that counts what is done."""

import logging
import time
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from attnpo_jax.runtime.printable import printable

_LOG = logging.getLogger(__name__)

# Without a terminal, a line of log is written this often.
SECONDS_BETWEEN_LINES = 30.0


class Bar:
    """A bar on a terminal, with the time it took and the time left; nothing off a terminal.

    Args:
      before, after: what stands before and after the bar, as rich's templates; what is put into
        them is no markup.
      bar: whether a bar is wanted at all.
      console: where it goes; None for standard error.
      **task: of the bar: `description`, `total`, and what the templates show.
    """

    def __init__(self, before: str, *after: str, bar: bool, console: Console | None, **task: Any):
        console = console or Console(stderr=True)
        self._bar = None
        if bar and console.is_terminal:
            self._bar = Progress(
                TextColumn(before, markup=False),
                BarColumn(),
                *(TextColumn(text, markup=False) for text in after),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(elapsed_when_finished=False),
                console=console,
            )
            self._task = self._bar.add_task(**task)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *error: Any) -> None:
        if self._bar is not None:
            self._bar.stop()


class CountProgress(Bar):
    """A bar with units per second and the time left; off a terminal, a line of log now and then.

    Args:
      what: what is going on.
      total: units to do.
      unit: their name in the plural, such as `pairs`.
      bar: whether a terminal is given a bar; without one, there are lines of log.
      console: where the bar goes; None for standard error.
    """

    def __init__(
        self, what: str, total: int, unit: str, *, bar: bool, console: Console | None = None
    ):
        super().__init__(
            "{task.description}",
            f"{{task.completed:.0f}}/{{task.total}} {unit}",
            f"{{task.fields[rate]}} {unit}/s",
            "{task.fields[note]}",
            bar=bar,
            console=console,
            description=printable(what),
            total=total,
            rate="-",
            note="",
        )
        self._what, self._total, self._unit, self._done = what, total, unit, 0.0
        self._start = self._spoke = time.monotonic()

    def add(self, count: float, note: str = "") -> None:
        """Counts units that are done; a note says what else is to be seen."""
        self._done += count
        now = time.monotonic()
        rate = self._done / max(now - self._start, 1e-9)
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done, rate=f"{rate:.2f}", note=note)
        elif count and (now - self._spoke > SECONDS_BETWEEN_LINES or self._done >= self._total):
            self._spoke = now
            left = (self._total - self._done) / rate
            _LOG.info(
                "%s: %.0f of %d %s, %.2f %s/s%s, %.0f s left",
                self._what,
                self._done,
                self._total,
                self._unit,
                rate,
                self._unit,
                note and f", {note}",
                left,
            )
