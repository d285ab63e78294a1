"""Token-weighted direct preference optimization (TwDPO, AttentionPO) in JAX and Flax."""

__version__ = "0.1.0"
