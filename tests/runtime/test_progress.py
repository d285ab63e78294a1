import io
import logging

import pytest
from rich.console import Console

from attnpo_jax.runtime import progress
from attnpo_jax.runtime.progress import CountProgress


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_bar_on_a_terminal(clock):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120)
    with CountProgress("prepare train", 8, "pairs", bar=True, console=console) as bar:
        clock.now += 4
        bar.add(1.5)
        bar.add(0.5)
        bar._bar.refresh()
        shown = screen.getvalue()
    assert "prepare train" in shown and "2/8 pairs" in shown and "0.50 pairs/s" in shown


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_of_log_where_there_is_no_bar(clock, caplog, terminal):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=terminal)
    caplog.set_level(logging.INFO, logger="attnpo_jax.runtime.progress")
    with CountProgress("prepare eval", 12, "pairs", bar=not terminal, console=console) as bar:
        for seconds in (20, 20, 20, 20):
            clock.now += seconds
            bar.add(3)
            bar.add(0)  # as for a shard without bad rows
    # One about every half minute, and one at the end.
    assert [record.getMessage() for record in caplog.records] == [
        "prepare eval: 6 of 12 pairs, 0.15 pairs/s, 40 s left",
        "prepare eval: 12 of 12 pairs, 0.15 pairs/s, 0 s left",
    ]
    assert screen.getvalue() == ""
