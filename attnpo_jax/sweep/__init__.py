"""Grids of runs on one prepared dataset, and what sets them apart."""

from attnpo_jax.sweep.stage import sweep

__all__ = ["sweep"]
