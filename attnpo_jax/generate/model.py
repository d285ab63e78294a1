"""Which model is sampled from: the trained one, the one it was trained from, or any other."""

import dataclasses
import logging
import pathlib
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import int8, lora
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.model import SampledModel

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

TRAINED, BASE = "trained", "base"


def is_trained(which: str | None) -> bool:
    """Whether a checkpoint is meant: `trained`, or `trained@` a step, `best` or `newest`."""
    return which is not None and which.partition("@")[0] == TRAINED


def step_of(run: "Run", which: str) -> int | None:
    """The step of a trained model that is named so; None for the newest checkpoint's.

    Raises:
      UserError: see `Run.checkpoint_step`.
    """
    _, named, asked = which.partition("@")
    return run.checkpoint_step(asked if named else None)


def load(run: "Run", which: str | None = None) -> SampledModel:
    """Loads a model for sampling.

    Args:
      run: whose config says how; its workdir has the trained model.
      which: `trained`, or `trained@STEP`, `trained@best` or `trained@newest` (see
        `Run.checkpoint_step`); `base` for the config's `model.source`, or another HF folder, hub
        id, or `smollm2-135m-instruct`. None: `trained` where the run has a workdir, else `base`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      CheckpointMismatch: the checkpoint is of another model than the config's, or its adapters are.
      UserError: there is no such model; its tokenizer has no chat template.
    """
    if which is None:
        which = BASE if run.workdir is None else TRAINED
    if is_trained(which) and run.workdir is None:
        raise UserError("the trained model is asked for, but no workdir is named")
    if which == BASE or is_trained(which):
        source = run.config.model.source
        folder = run.model_folder if run.workdir is not None else hf_folder.resolve(source)
        tokenizer = run.tokenizer
    else:
        source, folder = which, hf_folder.resolve(which)
        tokenizer = ChatTokenizer.load(
            folder, run.chat_template, run.config.model.chat_template_kwargs
        )
    config = run.config
    shape = hf_folder.load_config(folder)
    passes = int8.shape_of_passes(shape, config.generate.weights)
    dtype = jnp.dtype(config.model.param_dtype)
    backend = backends.for_sampling(passes, config.parallel, config.prepare.devices, dtype)
    if is_trained(which):
        params, step = _trained(run, backend, passes, step_of(run, which))
        name = f"{run.workdir.resolve().name}/step-{step}"
    elif which == BASE and run.workdir is not None:
        params = run.load_params(passes, backend.parameter_shardings())
        name = source
    else:
        shardings = backend.parameter_shardings()
        params = hf_folder.load_params(folder, passes, param_dtype=dtype, shardings=shardings)
        name = source
    _LOG.info("sampling from %s on %s", name, backend.description)
    model = LanguageModel(pathlib.Path(folder), passes, params, tokenizer)
    return SampledModel.of(name, model, backend)


def _trained(
    run: "Run", backend: backends.Sharded, passes: Any, wanted: int | None
) -> tuple[Any, int]:
    """A checkpoint's parameters, adapters merged in, and its step."""
    dtype = jnp.dtype(run.config.model.param_dtype)
    full = dataclasses.replace(passes, int8=False)
    at = backend.of(full)
    if run.config.lora.rank:
        policy = lora.adapted(full, run.config.lora)
        abstract = backend.of(policy).abstract_state(lora.abstract_adapters(policy))
        adapters, step = checkpoint.restore_params(
            run.checkpoint_folder, abstract, run.adapters_identity, step=wanted
        )
        params = hf_folder.load_params(
            run.model_folder, full, param_dtype=dtype, shardings=at.parameter_shardings()
        )
        params = lora.merge(policy, params, adapters)
    else:
        abstract = at.abstract_state(abstract_params(full, dtype))
        params, step = checkpoint.restore_params(run.checkpoint_folder, abstract, step=wanted)
    if passes.int8:
        params = int8.quantize_params(params, backend.parameter_shardings())
    return params, step
