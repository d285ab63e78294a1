"""What a training step takes and gives back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: int32 (), optimizer steps done.
      params: the decoder's parameters, a nested dict of arrays.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: Any


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; parameters are taken as they are, in their own dtype."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))
