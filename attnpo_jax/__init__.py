"""Token-weighted direct preference optimization (TwDPO, AttentionPO) in JAX and Flax.

What is listed in `__all__` is the public API. Each name is imported when it is first used, so that
`import attnpo_jax` costs nothing.

`Run.resolve(config, workdir)` turns a config into things, once. The stages are packages, each with
a function of the same name that takes a `Run`: `attnpo_jax.prepare.prepare(run)`,
`attnpo_jax.train.train(run)`, `attnpo_jax.export.export(run)`, and `attnpo_jax.run.run(run)` for
all of them.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = [
    "__version__",
    "BadExample",
    "ChatTokenizer",
    "ConfigError",
    "EvalBatches",
    "Judge",
    "JudgeTemplate",
    "Judgement",
    "LanguageModel",
    "ModelConfig",
    "Pair",
    "PairBatch",
    "Prepared",
    "ResponseScores",
    "ResponseTokens",
    "Run",
    "StepSettings",
    "TokenizedPair",
    "TrainBatches",
    "TrainState",
    "config",
    "default_config",
    "evaluate",
    "export",
    "judge",
    "judge_pairs",
    "load_model",
    "load_pairs",
    "losses",
    "make_eval_step",
    "make_train_step",
    "prepare",
    "probe",
    "report",
    "response_logps",
    "run",
    "section_for",
    "token_view",
    "token_weights",
    "tokenize_pair",
    "train",
    "validate",
    "weighting",
]

# What type checkers and editors read; a test keeps it in step with `_HOMES`.
if TYPE_CHECKING:
    from attnpo_jax import (
        config,
        evaluate,
        export,
        judge,
        losses,
        prepare,
        probe,
        report,
        run,
        train,
        weighting,
    )
    from attnpo_jax.config import ConfigError, default_config, section_for, validate
    from attnpo_jax.data.batching import EvalBatches, PairBatch, TrainBatches
    from attnpo_jax.data.pair import BadExample, Pair
    from attnpo_jax.data.prepared import Prepared
    from attnpo_jax.data.sources import load_pairs
    from attnpo_jax.data.tokenize import ChatTokenizer, TokenizedPair, tokenize_pair
    from attnpo_jax.judge.judge import Judge, Judgement, judge_pairs
    from attnpo_jax.judge.language_model import LanguageModel, load_model
    from attnpo_jax.judge.prompt import JudgeTemplate
    from attnpo_jax.judge.token_weights import token_weights
    from attnpo_jax.losses import ResponseScores
    from attnpo_jax.models.config import ModelConfig
    from attnpo_jax.models.scoring import response_logps
    from attnpo_jax.pair_loss import StepSettings
    from attnpo_jax.parallel.state import TrainState
    from attnpo_jax.report.token_view import token_view
    from attnpo_jax.run import Run
    from attnpo_jax.train.step import make_eval_step, make_train_step
    from attnpo_jax.weighting import ResponseTokens

_MODULES = (
    "config",
    "evaluate",
    "export",
    "judge",
    "losses",
    "prepare",
    "probe",
    "report",
    "run",
    "train",
    "weighting",
)

_HOMES = {
    # A model and its judgement of pairs.
    "LanguageModel": "judge.language_model",
    "load_model": "judge.language_model",
    "ModelConfig": "models.config",
    "Judge": "judge.judge",
    "Judgement": "judge.judge",
    "judge_pairs": "judge.judge",
    "JudgeTemplate": "judge.prompt",
    "token_weights": "judge.token_weights",
    "token_view": "report.token_view",
    # Pairs, from files to batches.
    "BadExample": "data.pair",
    "Pair": "data.pair",
    "load_pairs": "data.sources",
    "ChatTokenizer": "data.tokenize",
    "TokenizedPair": "data.tokenize",
    "tokenize_pair": "data.tokenize",
    "Prepared": "data.prepared",
    "EvalBatches": "data.batching",
    "PairBatch": "data.batching",
    "TrainBatches": "data.batching",
    # Configs, and what they come to.
    "Run": "run",
    "ConfigError": "config",
    "default_config": "config",
    "section_for": "config",
    "validate": "config",
    # What a step is made of.
    "ResponseTokens": "weighting",
    "ResponseScores": "losses",
    "response_logps": "models.scoring",
    "StepSettings": "pair_loss",
    "make_eval_step": "train.step",
    "make_train_step": "train.step",
    "TrainState": "parallel.state",
}
"""The module that each public class and function is defined in or belongs to."""


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
