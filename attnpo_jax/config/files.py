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
from attnpo_jax.config.sections import SECTIONS, any_type
from attnpo_jax.runtime import python_file
from attnpo_jax.runtime.nested import as_tuples, differences

ABSENT = "(absent)"
"""Stands in `diff` for the value of a field that one of two configs lacks."""


def load_file(spec: str) -> config_dict.ConfigDict:
    """Runs a config file's `get_config()`.

    Args:
      spec: path of the file, or `path:argument` for a `get_config(argument)`.

    Raises:
      FileNotFoundError: no such file.
      ConfigError: the file fails, has no `get_config`, or returns something else than a config.
    """
    path, _, argument = spec.partition(":")
    file = pathlib.Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"--config={spec}: no file {file}")
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
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError([f"not a config in JSON: {error}"]) from error
    config = default_config()
    with config.unlocked():
        for field in SECTIONS:
            if field in values:
                section = {key: as_tuples(value) for key, value in values.pop(field).items()}
                config[field] = config_dict.ConfigDict(
                    {key: v if key == "name" else any_type(v) for key, v in section.items()}
                )
    known = flatten(config)
    found = []
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
        except TypeError as error:
            found.append(f"config.{field} = {value!r}: {error}")
    if found:
        raise ConfigError(found)
    return config
