"""`attnpo train`: the step, the loop and what happens at its steps, the optimizer."""

from attnpo_jax.train.stage import train

__all__ = ["train"]
