"""What is asked of a response: how it is drawn, and where it ends."""

import dataclasses
import logging
import pathlib
from collections.abc import Mapping
from typing import Any

from attnpo_jax.models.io.hf_folder import read_json
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.printable import printable
from attnpo_jax.sampling.rules import SETTINGS
from attnpo_jax.sampling.sample import Features

_LOG = logging.getLogger(__name__)


class SettingsError(UserError):
    """A sampling setting has a value that is not accepted; the message names it."""


@dataclasses.dataclass(frozen=True)
class SamplingSettings:
    """How a response is drawn, and where it ends.

    The defaults leave the model's distribution as it is.

    Attributes:
      temperature: logits are divided by it; 0 takes the likeliest token.
      top_k: only the k likeliest tokens are drawn from; 0 for all.
      top_p: only the likeliest tokens that have this probability together (arXiv 1904.09751).
      min_p: only tokens at least this likely, as a part of the likeliest one's probability
        (arXiv 2407.01082).
      repetition_penalty: what stands in prompt or response has its logit divided by it where that
        is positive, and multiplied where it is negative (arXiv 1909.05858); 1 for none.
      presence_penalty: what stands in the response has it taken off its logit.
      max_new_tokens: the most that a response has.
      min_new_tokens: no stop token before so many others.
      stop: texts that end a response, and do not belong to it, beside those of the model.
      stop_token_ids: tokens that end a response, beside those of the model.
      logit_bias: by token id, what is added to its logit.
      seed: of the draws.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    max_new_tokens: int = 512
    min_new_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        for name, (accepts, accepted) in SETTINGS.items():
            value = getattr(self, name)
            if not accepts(value):
                raise SettingsError(f"{name} = {value!r}; accepted: {accepted}")
        if self.min_new_tokens > self.max_new_tokens:
            raise SettingsError(
                f"min_new_tokens = {self.min_new_tokens} is above max_new_tokens = "
                f"{self.max_new_tokens}"
            )

    @property
    def features(self) -> Features:
        """What a program needs for them."""
        draws = self.temperature > 0
        return Features(
            draws=draws,
            top_k=draws and self.top_k > 0,
            top_p=draws and self.top_p < 1,
            min_p=draws and self.min_p > 0,
            penalties=self.repetition_penalty != 1 or self.presence_penalty != 0,
            bias=bool(self.logit_bias),
            min_new_tokens=self.min_new_tokens > 0,
        )

    def facts(self) -> dict[str, Any]:
        """The settings as JSON."""
        facts = dataclasses.asdict(self)
        facts |= {"stop": list(self.stop), "stop_token_ids": list(self.stop_token_ids)}
        return facts | {"logit_bias": {str(k): v for k, v in self.logit_bias.items()}}


# What transformers' generation_config.json says that means the same here.
_OF_GENERATION_CONFIG = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "repetition_penalty",
    "max_new_tokens",
    "min_new_tokens",
)
# What would have responses come out otherwise, and what says that it does not.
_OTHERS = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "encoder_repetition_penalty": 1.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
    "exponential_decay_length_penalty": None,
    "penalty_alpha": None,
    "guidance_scale": None,
}


def defaults_of(folder: str | pathlib.Path) -> tuple[dict[str, Any], tuple[int, ...]]:
    """What a model's authors say of sampling: settings, and the tokens that end a response.

    Both are those of the folder's `generation_config.json`; the ends are also config.json's. What
    the former asks for beside them, and sampling here does not have, is told by a warning.

    Raises:
      UserError: a file is no JSON object, or what it says of a setting is not accepted.
    """
    folder = pathlib.Path(folder)
    files = folder / "generation_config.json", folder / "config.json"
    generation, config = (read_json(file) if file.is_file() else {} for file in files)
    settings = {k: generation[k] for k in _OF_GENERATION_CONFIG if generation.get(k) is not None}
    if stop := generation.get("stop_strings"):
        settings["stop"] = (stop,) if isinstance(stop, str) else tuple(stop)
    if generation.get("do_sample") is False:
        settings["temperature"] = 0
    for name, usual in _OTHERS.items():
        if generation.get(name, usual) not in (usual, None):
            _LOG.warning(
                "%s: %s = %s is not honoured: sampling here has no such setting",
                *(files[0], name, printable(generation[name])),
            )
    ends: list[int] = []
    for said in (generation.get("eos_token_id"), config.get("eos_token_id")):
        for end in said if isinstance(said, list) else [said]:
            if end is not None and end not in ends:
                ends.append(end)
    try:
        SamplingSettings(**settings, stop_token_ids=tuple(ends))
    except SettingsError as error:
        raise UserError(f"{folder / 'generation_config.json'}: {error}") from error
    return settings, tuple(ends)
