"""`attnpo export` and `attnpo export-weights`: what a run made, for other tools."""

from attnpo_jax.export.stage import export

__all__ = ["export"]
