"""Configs as files: Python files with a `get_config()`, JSON, and how two configs differ.

A config file is Python with a `get_config()` that starts from `default_config()`:

    from attnpo_jax import losses
    from attnpo_jax.config import default_config, section_for

    def get_config():
        config = default_config()
        config.data.train = "pairs.jsonl"
        config.objective = section_for(losses, "ipo", beta=0.05)
        return config
"""

import inspect
import json
import pathlib
from typing import Any

from ml_collections import config_dict

from attnpo_jax.config.default import default_config
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.fields import flatten
from attnpo_jax.config.sections import SECTIONS
from attnpo_jax.runtime import python_file
from attnpo_jax.runtime.nested import as_tuples, differences

ABSENT = "(absent)"
"""Stands in `diff` for the value of a field that one of two configs lacks."""


def load_file(spec: str) -> config_dict.ConfigDict:
    """The config of a file: what its `get_config()` returns, or the JSON that a run has written.

    Args:
      spec: path of the file, or `path:argument` for a `get_config(argument)`. One that ends in
        .json is read as `to_json` writes it: `WORKDIR/config.json` is the config of that run.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: the file fails, has no `get_config`, or returns something else than a config; or
        it is JSON, but no config.
    """
    path, _, argument = spec.partition(":")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--config={spec}: no file {file}")
    if file.suffix.lower() == ".json":
        return _load_json(file, spec, argument)
    try:
        module = python_file.load(file)
        get_config = getattr(module, "get_config", None)
        if get_config is None:
            raise ConfigError([f"{file}: has no function get_config()"])
        if argument and not inspect.signature(get_config).parameters:
            raise ConfigError([f"--config={spec}: get_config() of {file} takes no argument"])
        config = get_config(argument) if argument else get_config()
    except ConfigError:
        raise
    except python_file.NotPythonError as error:
        raise ConfigError([f"--config={spec}: {error}"]) from error
    except Exception as error:
        where = python_file.place(file, error)
        raise ConfigError([f"{where}: {type(error).__name__}: {error}"]) from error
    if not isinstance(config, config_dict.ConfigDict):
        raise ConfigError(
            [f"{file}: get_config() returned a {type(config).__name__}; accepted: a ConfigDict"]
        )
    return config


def _load_json(file: pathlib.Path, spec: str, argument: str) -> config_dict.ConfigDict:
    if argument:
        raise ConfigError([f"--config={spec}: {file} is JSON, which takes no argument"])
    try:
        return from_json(file.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError([f"{file}: not a config in JSON: {error}"]) from error
    except ConfigError as error:
        raise ConfigError([f"{file}: {problem}" for problem in error.problems]) from error


def diff(old: config_dict.ConfigDict, new: config_dict.ConfigDict) -> dict[str, tuple[Any, Any]]:
    """Fields that differ, by dotted name: (value in `old`, value in `new`), "(absent)" for none.

    >>> new = default_config()
    >>> new.optim.learning_rate = 5e-7
    >>> diff(default_config(), new)
    {'optim.learning_rate': (1e-06, 5e-07)}
    """
    return differences(flatten(old), flatten(new), absent=ABSENT)


def to_json(config: config_dict.ConfigDict) -> str:
    """The config as indented JSON; tuples become lists."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def from_json(text: str) -> config_dict.ConfigDict:
    """The config that `to_json` wrote.

    Raises:
      ConfigError: not JSON, or fields that no config has, or of another type than theirs.
    """
    try:
        return _config_of(json.loads(text))
    except RecursionError:
        raise ConfigError(["not a config in JSON: brackets are nested too deeply"]) from None
    except ConfigError:
        raise
    except ValueError as error:  # integers of 5,000 digits too
        raise ConfigError([f"not a config in JSON: {error}"]) from error


def _config_of(values: Any) -> config_dict.ConfigDict:
    if not isinstance(values, dict):
        raise ConfigError(
            [f"not a config in JSON: holds a {type(values).__name__}; accepted: an object"]
        )
    config = default_config()
    found = []
    with config.unlocked():
        for field in SECTIONS:
            if field not in values:
                continue
            fields = values.pop(field)
            if not isinstance(fields, dict):
                found.append(f"config.{field} = {fields!r}: accepted: an object with a name")
                continue
            config[field] = {key: as_tuples(value) for key, value in fields.items()}
    known = flatten(config)
    for field, value in flatten(values).items():
        *parents, last = field.split(".")
        if field not in known:
            found.append(f"config.{field} = {value!r}: no config has this field")
            continue
        section = config
        for parent in parents:
            section = section[parent]
        try:
            section[last] = value
        except (TypeError, ValueError, OverflowError) as error:
            found.append(f"config.{field} = {value!r}: {error}")
    if found:
        raise ConfigError(found)
    return config
