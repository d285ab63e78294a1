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

    Loss and accuracy are those of the objective: with the tokens' weights.

    Args:
      total: steps of the whole run.
      done: steps that were done before.
      bar: whether a bar is wanted at all.
      console: where it goes; None for standard error.
    """

    def __init__(self, total: int, done: int, *, bar: bool, console: Console | None = None):
        self._total = total
        self._shown = "compiling"
        super().__init__(
            "step {task.completed}/{task.total}",
            "{task.description}",
            bar=bar,
            console=console,
            description=self._shown,
            total=total,
            completed=done,
        )

    def evaluating(self) -> None:
        """Says that the run is at an evaluation."""
        if self._bar is not None:
            self._bar.update(self._task, description="evaluating")
        else:
            _LOG.info("evaluating")

    def evaluated(self, done: int, values: Mapping[str, float] | None) -> None:
        """Shows, in a line of its own, what came of an evaluation; None: it was left off."""
        if self._bar is not None:
            self._bar.update(self._task, description=self._shown)
        if values is None:
            return
        text = (
            f"held-out pairs: loss {values['eval_loss']:.4f}  "
            f"accuracy {values['eval_rewards/weighted_accuracies']:.2f}"
        )
        if self._bar is not None:
            line = f"step {done}/{self._total}  {text}"
            self._bar.console.print(line, highlight=False, soft_wrap=True)
        else:
            _LOG.info("step %d/%d  %s", done, self._total, text)

    def step(self, done: int) -> None:
        """Moves the bar to `done` steps."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done)

    def metrics(self, done: int, values: Mapping[str, float]) -> None:
        """Shows a line of training metrics."""
        ties = values["rewards/weighted_ties"]
        self._shown = (
            f"loss {values['loss']:.4f}  accuracy {values['rewards/weighted_accuracies']:.2f}  "
            f"{f'ties {ties:.2f}  ' if ties else ''}{values['pairs_per_second']:.2f} pairs/s"
        )
        if self._bar is not None:
            self._bar.update(self._task, description=self._shown)
        else:
            _LOG.info("step %d/%d  %s", done, self._total, self._shown)
