"""Responses for a notebook: `generate` returns them, `stream` gives them as they come."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from attnpo_jax import config as config_lib
from attnpo_jax.data.pair import Message
from attnpo_jax.data.prompts import Prompt, as_prompts
from attnpo_jax.generate import model as models
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.requests import requests_of
from attnpo_jax.sampling.responses import Request, Response, Update

if TYPE_CHECKING:
    from attnpo_jax.run import Run


def generate(
    model: "LanguageModel | Run | SampledModel",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    *,
    samples: int = 1,
    slots: int = 64,
    max_length: int = 0,
    **settings: Any,
) -> list[Response]:
    """Responses to prompts, in their order; of each prompt, its samples one after the other.

    Args:
      model: a loaded model, on the first device; or a run, whose trained model answers (the one it
        starts from, where it has no workdir); or what `generate.model.load` gives.
      prompts: texts (one user turn each), messages, or `Prompt`s. Draws depend on their ids, which
        are their places where they have none.
      samples: responses to each.
      slots: responses under way at a time, at most.
      max_length: tokens of prompt and response, at most; 0 for what is needed.
      **settings: see `sampling.SamplingSettings`; what is not given is as the run's config says,
        and then as the model's `generation_config.json` does.

    Raises:
      UserError: a prompt can't be answered, a setting is not accepted, or logits are no numbers.
    """
    requests, engine = _begin(model, prompts, samples, slots, max_length, settings)
    found = {(response.id, response.sample): response for response in engine.run(requests)}
    for response in found.values():
        if response.finish_reason == "error":
            raise UserError(
                f"prompt {response.id}: the model's logits are no numbers (NaN or infinite)"
            )
    return [found[request.id, request.sample] for request in requests]


def stream(
    model: "LanguageModel | Run | SampledModel",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    *,
    samples: int = 1,
    slots: int = 64,
    max_length: int = 0,
    **settings: Any,
) -> Iterator[Update]:
    """What comes of prompts, as it comes; arguments as for `generate`.

    Where logits are no numbers, the response says so by its `finish_reason`.

    Raises:
      UserError: a prompt can't be answered, or a setting is not accepted.
    """
    requests, engine = _begin(model, prompts, samples, slots, max_length, settings)
    engine.submit(requests)
    while engine.running or engine.waiting:
        yield from engine.step()


def _begin(
    model: "LanguageModel | Run | SampledModel",
    prompts: Sequence[str | Sequence[Message] | Prompt],
    samples: int,
    slots: int,
    max_length: int,
    settings: dict[str, Any],
) -> tuple[list[Request], Engine]:
    sampled, config = sampled_of(model)
    in_force = sampled.settings(**(config_lib.sampling(config.generate) | settings))
    requests, length, refused = requests_of(
        sampled,
        as_prompts(prompts),
        in_force,
        samples=samples,
        max_length=max_length,
        long_prompts="refuse",
    )
    if refused:
        raise UserError(f"prompt {refused[0].id}: {refused[0].reason}")
    return requests, engine_for(sampled, config, length=length, slots=min(slots, len(requests)))


def sampled_of(model: "LanguageModel | Run | SampledModel") -> tuple[SampledModel, Any]:
    """What is sampled from, and the config that says how; see `generate`."""
    if isinstance(model, LanguageModel):
        backend = backends.one_device(model.config)
        sampled = SampledModel.of(str(model.folder), model, backend)
        return sampled, config_lib.default_config()
    if isinstance(model, SampledModel):
        return model, config_lib.default_config()
    return models.load(model), model.config


def engine_for(
    sampled: SampledModel, config: Any, *, length: int, slots: int, **options: bool
) -> Engine:
    """The engine of a model, as a config has it; `steady` and `prefix_caching` as given."""
    return sampled.engine(
        length=length,
        slots=slots,
        dtype=jnp.dtype(config.model.dtype),
        quantized_cache=config.generate.cache == "int8",
        attention=config.model.attention,
        **options,
    )
