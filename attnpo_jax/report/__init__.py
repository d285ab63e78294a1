"""The page of a run, or of several: what was run, what came of it, and its pairs token by token."""

from attnpo_jax.report.stage import at_end, report

__all__ = ["at_end", "report"]
