"""A model that is sampled from, with what its authors say of that."""

import dataclasses
from typing import Any

import jax

from attnpo_jax.data.chat_template import Conversation
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.parallel import backend as backends
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.settings import SamplingSettings, defaults_of


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

    @classmethod
    def of(cls, name: str, model: LanguageModel, backend: backends.Sharded) -> "SampledModel":
        """The model with what its folder says of sampling.

        Raises:
          UserError: the folder's generation_config.json says what is not accepted.
        """
        defaults, ends = defaults_of(model.folder)
        return cls(name, model, backend, defaults, stop_tokens(model.tokenizer, ends))

    def settings(self, **given: Any) -> SamplingSettings:
        """What is given, else the model's defaults; of `stop`, both.

        Raises:
          SettingsError: a value is not accepted.
        """
        settings = self.defaults | given
        if isinstance(given.get("stop"), tuple):
            settings["stop"] = tuple(
                dict.fromkeys((*self.defaults.get("stop", ()), *given["stop"]))
            )
        return SamplingSettings(**settings)

    def engine(self, *, length: int, slots: int, **options: Any) -> Engine:
        """An engine for the model; see there."""
        model = self.model
        options = {"length": length, "slots": max(slots, 1), "backend": self.backend} | options
        return Engine(model.config, model.params, model.tokenizer, **options)


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
