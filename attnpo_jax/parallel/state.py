"""What a training step takes and gives back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from attnpo_jax.models import lora
from attnpo_jax.models.decoder import ModelConfig, Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that changes from step to step.

    Attributes:
      step: int32 (), optimizer steps done.
      params: what is trained, a nested dict of arrays: the decoder's parameters, or adapters.
      opt_state: the optimizer's state, of `params` alone.
      base: the parameters that adapters are added to, which stay as they are; None where
        all parameters are trained. Not part of a checkpoint.
      reference: the reference's parameters, for objectives that read its distribution; None for
        others, and where it is `base`. Not part of a checkpoint.
    """

    step: jax.Array
    params: Any
    opt_state: Any
    base: Any = None
    reference: Any = None

    @property
    def policy(self) -> Params:
        """The decoder's parameters."""
        return policy_params(self.params, self.base)


def policy_params(trained: Any, base: Params | None) -> Params:
    """The decoder's parameters, of what is trained and what is not."""
    return trained if base is None else lora.join(base, trained)


def create(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; parameters are taken as they are, in their own dtype."""
    return TrainState(jnp.zeros((), jnp.int32), params, jax.jit(optimizer.init)(params))


def create_adapted(
    base: Params, optimizer: optax.GradientTransformation, *, model: ModelConfig, seed: int
) -> TrainState:
    """The state before the first step of a run that trains adapters alone.

    Args:
      base: the decoder's parameters, which stay as they are.
      optimizer: sees the adapters only.
      seed: of the adapters' random halves.
    """
    state = create(lora.init_adapters(model, jax.random.key(seed)), optimizer)
    return dataclasses.replace(state, base=base)
