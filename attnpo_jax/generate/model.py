"""Which model is sampled from: the trained one, the one it was trained from, or any other."""

import dataclasses
import logging
import pathlib
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from attnpo_jax.config import rules
from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import int8, lora
from attnpo_jax.models.decoder import abstract_params
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel import checkpoint
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.settings import SamplingSettings, defaults_of

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

TRAINED, BASE = "trained", "base"


@dataclasses.dataclass(frozen=True)
class SampledModel:
    """A model that is sampled from.

    Attributes:
      name: what its samples say they are of.
      model: parameters, shape and tokenizer.
      backend: where the parameters lie.
      defaults: what its authors say of sampling.
      stop_tokens: the tokens that end a response: the model's, and the chat template's end of turn.
    """

    name: str
    model: LanguageModel
    backend: backends.Sharded
    defaults: dict[str, Any]
    stop_tokens: tuple[int, ...]

    @property
    def together(self) -> bool:
        """Whether all processes work on the same responses."""
        return any(d.process_index != jax.process_index() for d in self.backend.devices)

    def settings(self, section: Any, **given: Any) -> SamplingSettings:
        """What is in force: what is given, else the config's section, else the model's defaults.

        Raises:
          SettingsError: a value is not accepted.
        """
        names = [field.name for field in dataclasses.fields(SamplingSettings)]
        of_config = {name: rules.as_sampling(name, section[name]) for name in names}
        said = {name: value for name, value in of_config.items() if value is not None}
        return SamplingSettings(**(self.defaults | said | given))


def load(run: "Run", which: str | None = None) -> SampledModel:
    """Loads a model for sampling.

    Args:
      run: whose config says how; its workdir has the trained model.
      which: `trained` for the newest checkpoint, `base` for the config's `model.source`, or another
        HF folder, hub id, or `smollm2-135m-instruct`. None: `trained` where the run has a workdir,
        else `base`.

    Raises:
      FileNotFoundError: there is no checkpoint.
      UserError: there is no such model; its tokenizer has no chat template.
    """
    if which is None:
        which = BASE if run.workdir is None else TRAINED
    if which == TRAINED and run.workdir is None:
        raise UserError("the trained model is asked for, but no workdir is named")
    if which in (TRAINED, BASE):
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
    if which == TRAINED:
        params, step = _trained(run, backend, passes)
        name = f"{run.checkpoint_folder}/{step}"
    elif which == BASE and run.workdir is not None:
        params = run.load_params(passes, backend.parameter_shardings())
        name = source
    else:
        shardings = backend.parameter_shardings()
        params = hf_folder.load_params(folder, passes, param_dtype=dtype, shardings=shardings)
        name = source
    _LOG.info("sampling from %s on %s", name, backend.description)
    defaults, ends = defaults_of(folder)
    model = LanguageModel(pathlib.Path(folder), passes, params, tokenizer)
    return SampledModel(name, model, backend, defaults, stop_tokens(tokenizer, ends))


def _trained(run: "Run", backend: backends.Sharded, passes: Any) -> tuple[Any, int]:
    """The newest checkpoint's parameters, adapters merged in, and its step."""
    dtype = jnp.dtype(run.config.model.param_dtype)
    full = dataclasses.replace(passes, int8=False)
    at = backend.of(full)
    if run.config.lora.rank:
        policy = lora.adapted(full, run.config.lora)
        abstract = backend.of(policy).abstract_state(lora.abstract_adapters(policy))
        adapters, step = checkpoint.restore_params(run.checkpoint_folder, abstract)
        params = hf_folder.load_params(
            run.model_folder, full, param_dtype=dtype, shardings=at.parameter_shardings()
        )
        params = lora.merge(policy, params, adapters)
    else:
        abstract = at.abstract_state(abstract_params(full, dtype))
        params, step = checkpoint.restore_params(run.checkpoint_folder, abstract)
    if passes.int8:
        params = int8.quantize_params(params, backend.parameter_shardings())
    return params, step


def stop_tokens(tokenizer: ChatTokenizer, ends: tuple[int, ...]) -> tuple[int, ...]:
    """The tokens that end a response: those of the model, and what the template closes a turn with.

    A base model's own end of text is seldom what its chat template ends a turn with.
    """
    found = list(ends)
    if tokenizer.tokenizer.eos_token_id is not None:
        found.append(tokenizer.tokenizer.eos_token_id)
    try:
        question = Conversation(({"role": "user", "content": "Hello"},))
        _, after = tokenizer.template.around_answer(question)
    except UserError:  # a template that refuses so short a conversation, or rewrites answers
        after = ""
    found += [token for start, _, token in tokenizer.controls(after.lstrip())[:1] if start == 0]
    return tuple(dict.fromkeys(found))
