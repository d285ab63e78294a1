"""Sampling as a stage: `attnpo generate`, `attnpo serve`, and responses for a notebook."""

from attnpo_jax.generate.api import generate, stream

__all__ = ["generate", "stream"]
