"""`config.prepare.scorers`: by name, what gives every response token a number, once.

A scorer is a dict. With `function` it is one of `attnpo_jax.scorers`, or of a plugin's, whose
hyperparameters are its other keys; without, the log-probs of a model, see `MODEL_KEYS`.
"""

import ast
import dataclasses
import difflib
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax import scorers as functions
from attnpo_jax.config import rules
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.registry import REQUIRED, RegistryError
from attnpo_jax.runtime.errors import UsageError
from attnpo_jax.runtime.nested import as_tuples

FIELD = "prepare.scorers"
ROLES = ("system", "user")

MODEL_KEYS: Mapping[str, rules.Rule] = {
    "model": rules.optional_text(),
    "adapter": rules.optional_text(),
    "prefix": rules.optional_text(),
    "prefix_role": rules.one_of(*ROLES),
    "chat_template": rules.file_or(None),
    "chat_template_kwargs": rules.template_variables(),
}
"""The keys of a scorer that is a model."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True)
class Scorer:
    """A scorer of a config, checked.

    Attributes:
      name: the name of its column.
      function: of two token sequences, with its hyperparameters; None for a model.
      hyperparameters: those of the function.
      model: HF folder, hub id or `smollm2-135m-instruct`; None for the model that training starts
        from.
      adapter: a PEFT folder of adapters on that model.
      prefix: a text that is read before the conversation.
      prefix_role: whose message it is part of, of `ROLES`.
      chat_template: a Jinja file that takes the place of the tokenizer's own template.
      chat_template_kwargs: variables of the template.
    """

    name: str
    function: functools.partial | None = None
    hyperparameters: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model: str | None = None
    adapter: str | None = None
    prefix: str | None = None
    prefix_role: str = ROLES[0]
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] | None = None

    @property
    def field(self) -> str:
        """The config's field, for messages."""
        return f"{FIELD}.{self.name}"


def parse(config: config_dict.ConfigDict) -> tuple[Scorer, ...]:
    """The scorers of a config that was checked, by name in alphabetical order."""
    found = []
    for name, given in sorted(config.prepare.scorers.items()):
        given = as_tuples_in(given)
        if "function" in given:
            bound = functions.of_mapping(given)
            found.append(Scorer(name, bound, dict(bound.keywords)))
        else:
            found.append(Scorer(name, **given))
    return tuple(found)


def as_tuples_in(scorer: Mapping[str, Any]) -> dict[str, Any]:
    """A scorer with tuples for the lists that JSON makes of them."""
    return {key: as_tuples(value) for key, value in scorer.items()}


def problems(scorers: Any) -> list[str]:
    """Everything that is wrong with the scorers of a config, one sentence each."""
    if not isinstance(scorers, Mapping):
        return [f"config.{FIELD} = {scorers!r}: accepted: a dict of scorers by name"]
    found = []
    for name, scorer in scorers.items():
        field = f"config.{FIELD}.{name}"
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            found.append(
                f"config.{FIELD} has {name!r}; accepted: names of letters, digits, _ and -, 64 at "
                "most, that begin with a letter"
            )
        elif not isinstance(scorer, Mapping):
            found.append(f"{field} = {scorer!r}: accepted: a dict; {_accepted()}")
        elif "function" in scorer:
            found += _of_function(field, as_tuples_in(scorer))
        else:
            found += _of_model(field, scorer)
    return found


def _accepted() -> str:
    return f"keys: {', '.join(MODEL_KEYS)}, or function and its hyperparameters"


def _of_model(field: str, scorer: Mapping[str, Any]) -> list[str]:
    found = []
    for key, value in scorer.items():
        if key not in MODEL_KEYS:
            known = (*MODEL_KEYS, "function")
            close = difflib.get_close_matches(str(key), known, n=1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            found.append(f"{field}.{key} = {value!r}: unknown key{hint}; accepted {_accepted()}")
        elif not MODEL_KEYS[key].accepts(value):
            found.append(f"{field}.{key} = {value!r}: accepted: {MODEL_KEYS[key].accepted}")
    return found


def _of_function(field: str, scorer: Mapping[str, Any]) -> list[str]:
    name = scorer["function"]
    try:
        defaults, hints = functions.hyperparameters(name), functions.annotations(name)
    except RegistryError as error:
        return [f"{field}.function = {name!r}: {error}"]
    found = []
    for key, value in scorer.items():
        if key in functions.RESERVED:
            continue
        if key not in defaults:
            of_model = " (a key of scorers that are models)" if key in MODEL_KEYS else ""
            listed = ", ".join(("function", *defaults))
            found.append(
                f"{field}.{key} = {value!r}: unknown key{of_model}; accepted keys with function = "
                f"{name!r}: {listed}"
            )
            continue
        rule = rules.of_hyperparameter(defaults[key], *([hints[key]] if key in hints else []))
        if not rule.accepts(value):
            found.append(f"{field}.{key} = {value!r}: accepted: {rule.accepted}")
    found += [
        f"{field}.{key}: {name!r} needs a value for it"
        for key, default in defaults.items()
        if default is REQUIRED and key not in scorer
    ]
    return found


# --- Overrides ------------------------------------------------------------------------------------


def is_override(field: str) -> bool:
    """Whether an override's field is a key of a scorer, as `prepare.scorers.NAME.KEY`."""
    return field.startswith(f"{FIELD}.")


def override(config: config_dict.ConfigDict, field: str, text: str) -> None:
    """Sets a key of a scorer as a command line says; a scorer that there is none of is added.

    Raises:
      UsageError: the field is no `prepare.scorers.NAME.KEY`.
    """
    name, _, key = field.removeprefix(f"{FIELD}.").partition(".")
    if not name or not key or "." in key:
        raise UsageError(
            f"--config.{field}={text}: accepted: --config.{FIELD}.NAME.KEY=VALUE; {_accepted()}"
        )
    scorers = dict(config.prepare.scorers.items())
    of_name = dict(scorers.get(name, {}).items()) | {key: _value(key, text)}
    config.prepare.scorers = scorers | {name: of_name}


def _value(key: str, text: str) -> Any:
    if key in (*MODEL_KEYS, *functions.RESERVED) and key != "chat_template_kwargs":
        return None if text in ("", "None") else text
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# --- Several configs ------------------------------------------------------------------------------


def union(of_configs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All scorers of several configs' `prepare.scorers`.

    Raises:
      ConfigError: two of them mean different things by one name.
    """
    found: dict[str, Any] = {}
    for scorers in of_configs:
        for name, scorer in scorers.items():
            if name in found and as_tuples_in(found[name]) != as_tuples_in(scorer):
                raise ConfigError(
                    [
                        f"config.{FIELD}.{name} = {dict(scorer)!r} in one run, "
                        f"{dict(found[name])!r} in another: accepted: one meaning of a name in all "
                        "runs that share a prepared dataset"
                    ]
                )
            found[name] = scorer
    return found
