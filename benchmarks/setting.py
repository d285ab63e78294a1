"""What the workloads are set up with: the suite's config and pairs, and the package's own parts."""

import pathlib
from typing import Any

import jax.numpy as jnp

from attnpo_jax import config as config_lib
from attnpo_jax.data.pair import Pair
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import ChatTokenizer, tokenize_pair
from attnpo_jax.judge.judge import Judge
from attnpo_jax.judge.language_model import LanguageModel, load_model
from attnpo_jax.judge.prompt import JudgePrompter, JudgeTemplate
from attnpo_jax.models import decoder
from attnpo_jax.models.attention import implementations
from attnpo_jax.models.io import hf_folder
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.state import TrainState
from attnpo_jax.train import stage

Spec = dict[str, Any]


def config_of(spec: Spec):
    """The config that `select` wrote, with the changes that the spec has."""
    config = config_lib.from_json((pathlib.Path(spec["scratch"]) / "config.json").read_text())
    config.update_from_flattened_dict(spec.get("changes", {}))
    return config


def pairs_of(spec: Spec) -> list[Pair]:
    """The pairs that `select` picked."""
    return load_pairs(str(pathlib.Path(spec["scratch"]) / "pairs.jsonl")).pairs


def model_of(config) -> LanguageModel:
    """The model that judges, and is the reference."""
    return load_model(config.model.source, param_dtype=jnp.dtype(config.model.param_dtype))


def tokenize(config, tokenizer: ChatTokenizer, pair: Pair):
    """A pair as it is trained on."""
    return tokenize_pair(
        tokenizer,
        pair,
        max_length=config.data.max_length,
        max_prompt_length=config.data.max_prompt_length,
    )


def prompter(config, tokenizer: ChatTokenizer) -> JudgePrompter:
    """What builds the judge's prompts."""
    template = JudgeTemplate.load(config.judge.template)
    return JudgePrompter(
        tokenizer, template, config.judge.max_length, config.judge.max_answer_length
    )


def judge_of(config, model: LanguageModel) -> Judge:
    """The judge of `attnpo prepare`."""
    return Judge(
        model,
        template=config.judge.template,
        max_length=config.judge.max_length,
        max_answer_length=config.judge.max_answer_length,
        source_layers=config_lib.source_layers(config.judge.layers, model.config.num_layers),
        dtype=jnp.dtype(config.model.dtype),
        batch_size=config.judge.batch_size,
        token_budget=config.judge.token_budget,
        num_buckets=config.judge.num_buckets,
        backend=preparing_backend(config, model.config),
        attention=config.model.attention,
    )


class Trainer:
    """A run's compiled step, and the state it starts from, as the training loop makes them."""

    def __init__(self, config, model: decoder.ModelConfig, source_layers: tuple[int, ...]):
        self.backend = backends.for_training(model, config.parallel)
        attention = attention_of(config, model, self.backend)
        settings = config_lib.step_settings(config, model, source_layers, attention)
        self.compiled = stage.compile_step(config, settings, self.backend, total_steps=1000)
        self.model, self._dtype = model, jnp.dtype(config.model.param_dtype)

    def first_state(self, folder: pathlib.Path) -> TrainState:
        params = hf_folder.load_params(
            folder,
            self.model,
            param_dtype=self._dtype,
            shardings=self.backend.parameter_shardings(),
        )
        return self.backend.create_state(self.compiled.first_state, params)


def preparing_backend(config, model: decoder.ModelConfig) -> backends.Backend:
    return backends.for_preparing(
        model, config.parallel, config.prepare.devices, config.model.param_dtype
    )


def attention_of(config, model: decoder.ModelConfig, backend: backends.Backend) -> str:
    choice = implementations.choose(
        config.model.attention, model, config.model.dtype, backend.devices
    )
    return choice.implementation
