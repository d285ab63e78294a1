"""Low-rank adapters on the decoder's projections (LoRA, arXiv 2106.09685).

Beside a projection's weight W (input axes, then output axes) lie two factors, A (input axes, R) and
B (R, output axes): y = x W + (alpha / R) x A B. In the parameter tree they are `query_lora_a`,
`query_lora_b` and so on, stacked over the layers like W; see `ModelConfig.lora`.

Shapes: R rank; others as in `models.decoder`.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from attnpo_jax.models import decoder
from attnpo_jax.models.config import LORA_GROUPS, PROJECTIONS, LoraConfig, ModelConfig
from attnpo_jax.runtime.errors import UserError

_A, _B = "_lora_a", "_lora_b"


def adapted(model: ModelConfig, section: Any) -> ModelConfig:
    """The model with the adapters that a config asks for, if it does.

    Args:
      section: the `lora` section of the config: `rank` (0 for none), `alpha`, and `targets`, a key
        of `LORA_GROUPS` or keys of `PROJECTIONS`.

    Raises:
      UserError: adapters of a higher rank than the model's width, which no product of theirs has.
    """
    if section.rank == 0:
        return model
    if section.rank > model.hidden_size:
        raise UserError(
            f"config.lora.rank = {section.rank}: accepted: 0 to {model.hidden_size}, the width of "
            "this model"
        )
    targets = section.targets
    names = LORA_GROUPS.get(targets, (targets,)) if isinstance(targets, str) else targets
    ordered = tuple(ours for theirs, ours in PROJECTIONS.items() if theirs in names)
    return dataclasses.replace(model, lora=LoraConfig(section.rank, section.alpha, ordered))


def without(model: ModelConfig) -> ModelConfig:
    """The model without its adapters."""
    return dataclasses.replace(model, lora=None)


def abstract_adapters(model: ModelConfig) -> dict[str, Any]:
    """The adapters of a model alone, as `jax.ShapeDtypeStruct`s: float32, whatever the base has."""
    flat = flatten_dict(decoder.abstract_params(model), sep="/")
    return unflatten_dict({k: v for k, v in flat.items() if k.endswith((_A, _B))}, sep="/")


def init_adapters(model: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh adapters, which change nothing: A is random, B is 0.

    A is uniform within ±1/sqrt(fan-in), as PEFT initializes it.
    """
    flat = flatten_dict(abstract_adapters(model), sep="/")
    made = {}
    for number, (path, leaf) in enumerate(sorted(flat.items())):
        if path.endswith(_B):
            made[path] = jnp.zeros(leaf.shape, leaf.dtype)
        else:
            bound = 1 / math.sqrt(math.prod(leaf.shape[1:-1]))
            its_key = jax.random.fold_in(key, number)
            made[path] = jax.random.uniform(its_key, leaf.shape, leaf.dtype, -bound, bound)
    return unflatten_dict(made, sep="/")


def join(base: Mapping[str, Any], adapters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameter tree of the adapted model."""
    return {**base, "layers": {**base["layers"], **adapters["layers"]}}


def base(params: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters of the base alone, of what `join` gives."""
    layers = {name: x for name, x in params["layers"].items() if not name.endswith((_A, _B))}
    return {**params, "layers": layers}


def merge(
    model: ModelConfig, base: Mapping[str, Any], adapters: Mapping[str, Any]
) -> dict[str, Any]:
    """The base's parameters with the adapters added in: the same function without adapters.

    The sums are float32; each weight keeps its dtype.
    """
    lora, layers = model.lora, dict(base["layers"])
    for name in lora.targets:
        layers[name] = _merged(
            layers[name],
            adapters["layers"][name + _A],
            adapters["layers"][name + _B],
            lora.alpha / lora.rank,
        )
    return {**base, "layers": layers}


@jax.jit
def _merged(weight, a, b, scale):
    # (layers, inputs..., R) x (layers, R, outputs...)
    product = jax.vmap(lambda a, b: jnp.tensordot(a, b, axes=1))(a, b)
    return (weight.astype(jnp.float32) + scale * product).astype(weight.dtype)
