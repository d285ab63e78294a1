"""What each config field accepts, and the search for everything that is wrong with a config."""

import dataclasses
import difflib
import importlib.util
import math
import pathlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax.data import mixture
from attnpo_jax.models.config import LORA_GROUPS, PROJECTIONS
from attnpo_jax.registry import REQUIRED, PluginError, RegistryError, load_plugins


class ConfigError(ValueError):
    """A config that cannot be used.

    Attributes:
      problems: one sentence each, naming the field, the value found and what is accepted.
    """

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        if len(self.problems) == 1:
            super().__init__(self.problems[0])
        else:
            lines = "\n".join(f"  {problem}" for problem in self.problems)
            super().__init__(f"{len(self.problems)} problems in the config:\n{lines}")


@dataclasses.dataclass(frozen=True)
class Rule:
    """A test of one value, and the words for what passes it."""

    accepts: Callable[[Any], bool]
    accepted: str


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return (_is_int(value) or isinstance(value, float)) and math.isfinite(value)


def _integer(least: int) -> Rule:
    return Rule(lambda v: _is_int(v) and v >= least, f"a whole number, {least} or more")


def _positive() -> Rule:
    return Rule(lambda v: _is_number(v) and v > 0, "a number above 0")


def _not_negative() -> Rule:
    return Rule(lambda v: _is_number(v) and v >= 0, "a number, 0 or more")


def _share(below: float, *, inclusive: bool) -> Rule:
    words = f"a number from 0 to {below:g}" + ("" if inclusive else f", {below:g} excluded")
    return Rule(
        lambda v: _is_number(v) and 0 <= v and (v < below or (inclusive and v == below)), words
    )


def _one_of(*values: str) -> Rule:
    return Rule(lambda v: isinstance(v, str) and v in values, ", ".join(map(repr, values)))


def _boolean() -> Rule:
    return Rule(lambda v: isinstance(v, bool), "True or False")


def _text() -> Rule:
    return Rule(lambda v: isinstance(v, str) and bool(v.strip()), "a text that is not empty")


def _optional_text() -> Rule:
    text = _text()
    return Rule(lambda v: v is None or text.accepts(v), f"None or {text.accepted}")


def _texts(what: str, *, empty: bool) -> Rule:
    def accepts(value):
        values = as_tuple(value)
        return all(isinstance(v, str) and v for v in values) and (empty or bool(values))

    return Rule(accepts, f"{what} or a tuple of them" + (", or none" if empty else ""))


def _sources(*, empty: bool) -> Rule:
    def accepts(value):
        try:
            return bool(mixture.parse(value)) or empty
        except ValueError:
            return False

    return Rule(accepts, mixture.ACCEPTED + (", or none" if empty else ""))


def _file_or(word: str | None) -> Rule:
    def accepts(value):
        return value == word or (isinstance(value, str) and pathlib.Path(value).is_file())

    return Rule(accepts, f"{word!r} or an existing file")


def _folder_or_bucket() -> Rule:
    def accepts(value):
        return isinstance(value, str) and ("://" not in value or value.startswith("gs://"))

    return Rule(accepts, "'', a folder, or gs://BUCKET/FOLDER")


def _axis_size() -> Rule:
    return Rule(lambda v: _is_int(v) and (v >= 1 or v == -1), "a whole number, 1 or more, or -1")


def _layers() -> Rule:
    def accepts(value):
        if isinstance(value, str):
            return value in ("quartiles", "all", "none")
        return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_int, value))

    return Rule(accepts, "'quartiles', 'all', 'none', or a tuple of layer numbers")


def _columns() -> Rule:
    def accepts(value):
        return all((_is_int(v) and v >= 0) or (isinstance(v, str) and v) for v in as_tuple(value))

    return Rule(accepts, "'all', a column's name or a tuple of them, or none")


def _projections() -> Rule:
    def accepts(value):
        names = LORA_GROUPS.get(value, (value,)) if isinstance(value, str) else as_tuple(value)
        return bool(names) and all(name in PROJECTIONS for name in names)

    names = ", ".join(map(repr, (*LORA_GROUPS, *PROJECTIONS)))
    return Rule(accepts, f"{names}, or a tuple of projections")


_PRECISIONS = ("float32", "bfloat16")

RULES: dict[str, Rule] = {
    "seed": _integer(0),
    "model.source": _text(),
    "model.chat_template": _file_or(None),
    "model.dtype": _one_of(*_PRECISIONS),
    "model.param_dtype": _one_of(*_PRECISIONS),
    "model.prepare_weights": _one_of("full", "int8"),
    "model.remat": _one_of("none", "dots", "layer"),
    "model.attention": _one_of("auto", "xla", "cudnn", "tokamax"),
    "model.logps_chunk": _integer(1),
    "data.train": _sources(empty=False),
    "data.eval": _sources(empty=True),
    "data.weight_columns": _columns(),
    "data.weights_tokenizer": _optional_text(),
    "data.max_length": _integer(2),
    "data.max_prompt_length": _integer(1),
    "data.shuffle": _boolean(),
    "data.on_bad_row": _one_of("error", "skip"),
    "data.num_buckets": _integer(1),
    "judge.template": _file_or("default"),
    "judge.max_length": _integer(2),
    "judge.max_answer_length": _integer(1),
    "judge.layers": _layers(),
    "judge.verdict": _boolean(),
    "judge.batch_size": _integer(1),
    "judge.token_budget": _integer(1),
    "judge.num_buckets": _integer(1),
    "prepare.rows_per_shard": _integer(1),
    "prepare.devices": _one_of("auto", "process", "all"),
    "optim.learning_rate": _positive(),
    "optim.schedule": _one_of("cosine", "linear", "constant"),
    "optim.warmup_ratio": _share(1.0, inclusive=True),
    "optim.b1": _share(1.0, inclusive=False),
    "optim.b2": _share(1.0, inclusive=False),
    "optim.eps": _positive(),
    "optim.weight_decay": _not_negative(),
    "optim.max_grad_norm": _not_negative(),
    "lora.rank": _integer(0),
    "lora.alpha": _positive(),
    "lora.targets": _projections(),
    "lora.export": _one_of("merged", "adapter", "both"),
    "train.batch_size": _integer(1),
    "train.microbatch_size": _integer(1),
    "train.epochs": _integer(1),
    "train.steps": _integer(0),
    "train.log_every": _integer(1),
    "train.eval_every": _integer(0),
    "train.eval_batch_size": _integer(1),
    "train.save_every": _integer(0),
    "train.keep_checkpoints": _integer(1),
    "train.checkpoint_dir": _folder_or_bucket(),
    "parallel.backend": _one_of("jit", "pmap"),
    "parallel.mesh.data": _axis_size(),
    "parallel.mesh.fsdp": _axis_size(),
    "parallel.mesh.tensor": _axis_size(),
    "log.progress": _boolean(),
    "log.tensorboard": _boolean(),
    "log.wandb": _boolean(),
    "log.wandb_project": _text(),
    "plugins": _texts("a Python file", empty=True),
}
"""By field, for all but the hyperparameters of weighting and objective."""

_BUILTIN_HYPERPARAMETERS: dict[str, Rule] = {
    "objective.beta": _positive(),
    "objective.label_smoothing": _share(0.5, inclusive=False),
}

_WRITERS = {"log.tensorboard": "tensorboardX", "log.wandb": "wandb"}


def as_tuple(value: Any) -> tuple:
    """A text as a tuple of one ("" as none), a tuple or list as it is."""
    if isinstance(value, str):
        return (value,) if value else ()
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def problems(
    config: config_dict.ConfigDict,
    default: config_dict.ConfigDict,
    sections: Mapping[str, Any],
) -> list[str]:
    """Everything that is wrong with a config, one sentence each.

    Args:
      config: to be checked; its plugins are loaded.
      default: a config with every field there is.
      sections: name of a section to the registry its function comes from.
    """
    found: list[str] = []
    values = {
        field: value
        for field, value in _leaves(config).items()
        if field.split(".")[0] not in sections
    }
    for field, value in values.items():
        if field not in RULES:
            found.append(f"config.{field} = {value!r}: unknown field{suggest(field, RULES)}")
        elif not RULES[field].accepts(value):
            found.append(f"config.{field} = {value!r}: accepted: {RULES[field].accepted}")
    found += [f"config.{field}: missing" for field in RULES if field not in values]
    sound = not found
    if sound:
        found += _between_fields(values)

    plugins = values.get("plugins", ())
    if RULES["plugins"].accepts(plugins):
        try:
            load_plugins(as_tuple(plugins))
        except PluginError as error:
            return [*found, f"config.plugins: {error}"]
    for section, registry in sections.items():
        if not isinstance(config.get(section), config_dict.ConfigDict):
            found.append(f"config.{section}: missing (a section with a name)")
        else:
            found += _section_problems(section, registry, config[section])
    return found


def suggest(field: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    """The words " (did you mean config.x?)" for the known fields of such a name, or ""."""
    last = field.split(".")[-1]
    close = [k for k in known if k.split(".")[-1] == last]
    if not close:
        lasts = {k.split(".")[-1]: k for k in known}
        close = [lasts[k] for k in difflib.get_close_matches(last, list(lasts), n=1)]
    return f" (did you mean {' or '.join(f'config.{k}' for k in close)}?)" if close else ""


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, config_dict.ConfigDict):
            leaves.update(_leaves(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def _between_fields(values: Mapping[str, Any]) -> list[str]:
    def named(field):
        return f"config.{field} = {values[field]!r}"

    found = []
    if values["train.batch_size"] % values["train.microbatch_size"]:
        found.append(
            f"{named('train.microbatch_size')}: accepted: a divisor of {named('train.batch_size')}"
        )
    if values["data.max_prompt_length"] >= values["data.max_length"]:
        found.append(
            f"{named('data.max_prompt_length')}: accepted: less than {named('data.max_length')}"
        )
    if 2 * values["judge.max_answer_length"] >= values["judge.max_length"]:
        found.append(
            f"{named('judge.max_answer_length')}: accepted: less than half of "
            f"{named('judge.max_length')}, which holds two answers and the question"
        )
    if values["lora.rank"] == 0 and values["lora.export"] != "merged":
        found.append(
            f"{named('lora.export')}: accepted: 'merged', since config.lora.rank = 0 trains the "
            "model itself"
        )
    axes = {f: v for f, v in values.items() if f.startswith("parallel.mesh.")}
    if list(axes.values()).count(-1) > 1:
        listed = ", ".join(named(f) for f in axes)
        found.append(f"{listed}: accepted: -1 for at most one of them")
    if values["parallel.backend"] == "pmap":
        found += [
            f"{named(field)}: accepted: 1, since config.parallel.backend = 'pmap' only splits the "
            "data"
            for field in ("parallel.mesh.fsdp", "parallel.mesh.tensor")
            if values[field] != 1
        ]
    bucket = values["train.checkpoint_dir"].startswith("gs://")
    if bucket and importlib.util.find_spec("gcsfs") is None:
        found.append(f"{named('train.checkpoint_dir')}: needs the package gcsfs: pip install gcsfs")
    for field, package in _WRITERS.items():
        if values[field] and importlib.util.find_spec(package) is None:
            extra = field.split(".")[1]
            found.append(
                f"{named(field)}: needs the package {package}: pip install '.[{extra}]' in a clone"
            )
    return found


def _section_problems(section: str, registry: Any, values: config_dict.ConfigDict) -> list[str]:
    hyperparameters = dict(values.items())
    name = hyperparameters.pop("name", None)
    try:
        defaults = registry.hyperparameters(name)
    except RegistryError as error:
        return [f"config.{section}.name = {name!r}: {error}"]
    annotations = registry.annotations(name)
    builtin = registry.get(name).__module__.startswith("attnpo_jax.")
    accepted = ", ".join(defaults) or "none"
    found = []
    for key, value in hyperparameters.items():
        field = f"config.{section}.{key} = {value!r}"
        rule = _BUILTIN_HYPERPARAMETERS.get(f"{section}.{key}") if builtin else None
        if key not in defaults:
            found.append(f"{field}: {name!r} has no such hyperparameter; accepted: {accepted}")
        elif value is None and defaults[key] is REQUIRED:
            found.append(f"config.{section}.{key}: {name!r} needs a value for it")
        elif rule is not None and not rule.accepts(value):
            found.append(f"{field}: accepted: {rule.accepted}")
        elif key in annotations and not _fits(value, annotations[key]):
            found.append(f"{field}: accepted: {_words(annotations[key])}")
        elif key not in annotations and not _fits_default(value, defaults[key]):
            found.append(f"{field}: accepted: {_words(type(defaults[key]))}")
    found += [
        f"config.{section}.{key}: {name!r} needs a value for it"
        for key, default in defaults.items()
        if default is REQUIRED and key not in hyperparameters
    ]
    return found


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value fits a type hint; hints that config values cannot express fit anything."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is typing.Literal:
        return value in arguments
    if origin in (tuple, list):
        items = [argument for argument in arguments if argument is not Ellipsis]
        alike = len(items) == 1
        return (
            isinstance(value, (tuple, list))
            and (alike or len(value) == len(items))
            and all(_fits(v, items[0 if alike else i]) for i, v in enumerate(value))
        )
    if hint in (types.NoneType, None):
        return value is None
    if hint is float:
        return _is_number(value)
    if hint is int:
        return _is_int(value)
    if hint in (bool, str):
        return isinstance(value, hint)
    return True


def _fits_default(value: Any, default: Any) -> bool:
    # Without a type hint, a default of 1 does not say that 0.5 is wrong.
    if _is_number(default):
        return _is_number(value)
    return isinstance(value, type(default)) if isinstance(default, (bool, str)) else True


def _words(hint: Any) -> str:
    simple = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
    return simple.get(hint) or str(hint)
