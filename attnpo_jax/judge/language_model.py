"""A model with its tokenizer: what a judge or reference pass needs."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.models.decoder import ModelConfig, Params
from attnpo_jax.models.io import hf_folder


@dataclasses.dataclass(frozen=True)
class LanguageModel:
    """Parameters, the shape they have, and the tokenizer they were trained with.

    Attributes:
      folder: the local Hugging Face folder that it was read from.
      config: the decoder's shape.
      params: the parameter tree of `models.decoder`.
      tokenizer: the chat tokenizer.
    """

    folder: pathlib.Path
    config: ModelConfig
    params: Params
    tokenizer: ChatTokenizer


def load_model(
    source: str,
    *,
    param_dtype=jnp.float32,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> LanguageModel:
    """Loads a model and its tokenizer.

    Args:
      source: a local Hugging Face folder, a hub id, or `smollm2-135m-instruct`.
      chat_template: Jinja text that replaces the tokenizer's own template.
      chat_template_kwargs: variables of the template.
    """
    folder = hf_folder.resolve(source)
    config = hf_folder.load_config(folder)
    tokenizer = ChatTokenizer.load(folder, chat_template, chat_template_kwargs)
    params = hf_folder.load_params(folder, config, param_dtype=param_dtype)
    return LanguageModel(folder, config, params, tokenizer)
