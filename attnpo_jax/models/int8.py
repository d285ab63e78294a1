"""Projections held as int8, for passes that train nothing.

Each output channel of a projection has one float32 scale, its largest magnitude over 127; a weight
is the nearest whole number of scales. Sums run over whole numbers times activations, and are scaled
at the end. Embedding, head, norms and biases stay as they are.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from attnpo_jax.models.config import PROJECTIONS, ModelConfig
from attnpo_jax.models.layers import num_inputs

SCALE = "_scale"


def shape_of_passes(model: ModelConfig, prepare_weights: str) -> ModelConfig:
    """A model's shape as the judge's and the reference's passes have it: `full` or `int8`."""
    return quantized(model) if prepare_weights == "int8" else model


def quantized(model: ModelConfig) -> ModelConfig:
    """The model with int8 projections."""
    return dataclasses.replace(model, int8=True)


def is_quantized(path: str) -> bool:
    """Whether a parameter, by its path in the tree, is one that is held as int8."""
    return path.startswith("layers/") and path.removeprefix("layers/") in PROJECTIONS.values()


def quantize(path: str, weight: jax.Array, shardings=None) -> tuple[jax.Array, jax.Array]:
    """A stacked projection as int8 and the scales of its output channels.

    Args:
      weight: (layers, inputs..., outputs...), in any floating dtype.
      shardings: of the two results; None for where the weight is.

    Returns:
      int8 of the weight's shape, within ±127, and float32 (layers, outputs...): the weight is about
      their product, off by half a scale at most.
    """
    inputs = num_inputs(path.removeprefix("layers/"))
    return _compiled(inputs, shardings)(weight)


def quantize_params(params: Mapping[str, Any], shardings: Mapping[str, Any]) -> dict[str, Any]:
    """A model's parameters with int8 projections; `shardings` are those of the result."""
    placed = flatten_dict(shardings, sep="/")
    quantized = {}
    for path, weight in flatten_dict(params, sep="/").items():
        quantized[path] = weight
        if is_quantized(path):
            pair = path, path + SCALE
            found = quantize(path, weight, tuple(placed[name] for name in pair))
            quantized |= dict(zip(pair, found, strict=True))
    return unflatten_dict(quantized, sep="/")


@functools.lru_cache(maxsize=32)
def _compiled(inputs: int, shardings):
    return jax.jit(functools.partial(_quantize, inputs=inputs), out_shardings=shardings)


def _quantize(weight, inputs):
    weight = weight.astype(jnp.float32)
    axes = tuple(range(1, 1 + inputs))
    largest = jnp.max(jnp.abs(weight), axis=axes, keepdims=True)
    # A channel of zeros: any scale will do.
    scale = jnp.where(largest > 0, largest / 127, 1.0)
    return jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, axes)
