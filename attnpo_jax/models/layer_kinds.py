"""What a layer has of its own beside its parameters: a sliding window, and rotary positions.

Both are scanned along with the parameters where layers differ in them; a model whose layers are all
alike pays nothing for it.

Shapes: B rows, L row length, N heads, H head dim.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from attnpo_jax.models.attention.core import ScoreRule
from attnpo_jax.models.config import LinearRopeScaling, ModelConfig, RopeScaling

# Wider than any row: the window of a layer without one, where others have one.
NO_WINDOW = 2**30


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerKind:
    """What a layer has of its own beside its parameters; for all layers, stacked on axis 0."""

    # int32 positions a token sees, or None where all layers have the same window or none.
    window: jax.Array | None
    rope: jax.Array | None  # int32 place in `rope_tables`, or None where there is one table for all

    def rope_of(self, tables: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """This layer's cosines and sines, of those that `rope_tables` gave."""
        return tables if self.rope is None else (tables[0][self.rope], tables[1][self.rope])

    def score_rule(self, config: ModelConfig) -> ScoreRule:
        """How this layer's scores become probabilities."""
        window = self.window
        if window is None and config.layer_windows is not None:
            window = config.layer_windows[0]
        scale = config.query_pre_attn_scalar
        return ScoreRule(
            scale=None if scale is None else scale**-0.5,
            softcap=config.attn_logit_softcapping,
            window=window,
        )


def layer_kinds(config: ModelConfig) -> LayerKind:
    """What differs from layer to layer; arrays only where something does."""
    window = rope = None
    if config.layer_windows is not None and len(set(config.layer_windows)) > 1:
        window = jnp.asarray([NO_WINDOW if w is None else w for w in config.layer_windows])
    kinds = _rope_kinds(config)
    if len(set(kinds)) > 1:
        rope = jnp.asarray([sorted(set(kinds)).index(kind) for kind in kinds])
    return LayerKind(window, rope)


def _rope_kinds(config: ModelConfig) -> list[str]:
    """For each layer which rotary positions it has: `global`, `local` or `none`."""
    kinds = ["global"] * config.num_layers
    if config.local_rope_theta is not None and config.layer_windows is not None:
        kinds = ["global" if window is None else "local" for window in config.layer_windows]
    return ["none" if i in config.nope_layers else kind for i, kind in enumerate(kinds)]


def rope_tables(config: ModelConfig, positions_BL) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (B, L, H/2) of the rotary angles (arXiv 2104.09864), in float32.

    Where layers differ in them, tables of all kinds are stacked: (kinds, B, L, H/2).
    """
    tables = [_rope_table(config, kind, positions_BL) for kind in sorted(set(_rope_kinds(config)))]
    if len(tables) == 1:
        return tables[0]
    cos, sin = zip(*tables, strict=True)
    return jnp.stack(cos), jnp.stack(sin)


def _rope_table(config: ModelConfig, kind: str, positions_BL) -> tuple[jax.Array, jax.Array]:
    half = config.head_dim // 2
    theta = config.local_rope_theta if kind == "local" else config.rope_theta
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if kind == "none":  # turned by an angle of 0
        frequency = jnp.zeros_like(frequency)
    elif kind == "global" and isinstance(config.rope_scaling, LinearRopeScaling):
        frequency = frequency / config.rope_scaling.factor
    elif kind == "global" and config.rope_scaling is not None:
        frequency = _llama3_frequencies(frequency, config.rope_scaling)
    angle_BLH = positions_BL[..., None].astype(jnp.float32) * frequency
    return jnp.cos(angle_BLH), jnp.sin(angle_BLH)


def _llama3_frequencies(frequency, scaling: RopeScaling):
    """Slows low frequencies by `factor`, keeps high ones, and blends in between (Llama 3.1)."""
    turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    return keep * frequency + (1.0 - keep) * frequency / scaling.factor


def rotate(x_BLNH, rope: tuple[jax.Array, jax.Array]):
    """Rotates the pairs (i, i + H/2) of each head, as Hugging Face lays them out."""
    cos, sin = (t[:, :, None, :] for t in rope)
    first, second = jnp.split(x_BLNH.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BLNH.dtype)
