"""Where a model looks as it judges: `probe(run)`, `attnpo probe`."""

from attnpo_jax.probe.stage import probe

__all__ = ["probe"]
