"""How fast a run is, and the bar that says so."""

import logging
import time
from collections.abc import Mapping

from rich.console import Console

from attnpo_jax.runtime.progress import Bar

_LOG = logging.getLogger(__name__)


class Throughput:
    """Pairs and tokens per second since the last look, pauses left out."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Forgets what was counted: what comes next is timed from here."""
        self._pairs = self._tokens = 0
        self._start = time.perf_counter()

    def add(self, pairs: int, tokens: int) -> None:
        """Counts a finished step."""
        self._pairs += pairs
        self._tokens += tokens

    def look(self) -> dict[str, float]:
        """The speeds since the last look or restart; counts anew from here."""
        seconds = max(time.perf_counter() - self._start, 1e-9)
        speeds = {
            "pairs_per_second": self._pairs / seconds,
            "tokens_per_second": self._tokens / seconds,
        }
        self.restart()
        return speeds


class TrainProgress(Bar):
    """A progress bar on a terminal; elsewhere, a line of log for every line of metrics.

    Args:
      total: steps of the whole run.
      done: steps that were done before.
      bar: whether a bar is wanted at all.
      console: where it goes; None for standard error.
    """

    def __init__(self, total: int, done: int, *, bar: bool, console: Console | None = None):
        super().__init__(
            "step {task.completed}/{task.total}",
            "{task.description}",
            bar=bar,
            console=console,
            description="compiling",
            total=total,
            completed=done,
        )
        self._total = total

    def note(self, text: str) -> None:
        """Says what the run is at, when that is not a step."""
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            _LOG.info("%s", text)

    def step(self, done: int) -> None:
        """Moves the bar to `done` steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def metrics(self, done: int, values: Mapping[str, float]) -> None:
        """Shows a line of training metrics."""
        ties = values["rewards/ties"]
        text = (
            f"loss {values['loss']:.4f}  accuracy {values['rewards/accuracies']:.2f}  "
            f"{f'ties {ties:.2f}  ' if ties else ''}{values['pairs_per_second']:.2f} pairs/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=text)
        else:
            _LOG.info("step %d/%d  %s", done, self._total, text)
