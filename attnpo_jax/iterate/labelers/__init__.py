"""The package's own labelers, one a file; each registers itself."""

from attnpo_jax.iterate.labelers import endpoint, judge, reward, verifier

__all__ = ["endpoint", "judge", "reward", "verifier"]
