"""`attnpo prepare`: the judge's and the reference's passes, once, to disk."""

from attnpo_jax.prepare.stage import prepare

__all__ = ["prepare"]
