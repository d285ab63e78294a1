"""Verifiable instructions: prompts that say what a response must be like, and checks of it."""

from attnpo_jax.evaluate.checks import counts, forms  # noqa: F401 (they register)
