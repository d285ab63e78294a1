"""The sections `weighting` and `objective`: a name and that function's hyperparameters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.rules import as_tuple
from attnpo_jax.registry import REQUIRED, PluginError, RegistryError, load_plugins

SECTIONS = {"weighting": weighting, "objective": losses}
"""Sections whose fields are a name and that function's hyperparameters, and their registries."""


def any_type(value: Any) -> config_dict.FieldReference:
    """A field that takes values of several types."""
    return config_dict.FieldReference(value, field_type=object)


def section_for(registry: Any, name: str, **overrides: Any) -> config_dict.ConfigDict:
    """The config section of a weighting or objective: its name and its hyperparameters.

    Args:
      registry: `attnpo_jax.weighting`, `attnpo_jax.losses`, or a `Registry`.
      name: a registered function.
      **overrides: hyperparameters that shall not have their defaults.

    Raises:
      RegistryError: no such function, or no such hyperparameter; the message lists those there are.
    """
    defaults = registry.hyperparameters(name)
    annotations = registry.annotations(name)
    unknown = sorted(set(overrides) - set(defaults))
    if unknown:
        raise RegistryError(
            f"{name!r} has no hyperparameter {', '.join(map(repr, unknown))}; "
            f"accepted: {', '.join(defaults) or 'none'}"
        )
    section = config_dict.ConfigDict({"name": name})
    for key, default in defaults.items():
        value = overrides.get(key, None if default is REQUIRED else default)
        kind = annotations.get(key, type(default))
        if kind in (bool, float, str) and isinstance(value, kind):
            section[key] = value
        else:
            section[key] = any_type(value)
    return section


def bind_section(registry: Any, section: Mapping[str, Any]) -> partial:
    """The function a section names, with the section's hyperparameters.

    Raises:
      RegistryError: see `Registry.bind`.
    """
    hyperparameters = dict(section.items())
    return registry.bind(hyperparameters.pop("name"), hyperparameters)


def complete_sections(config: config_dict.ConfigDict, **names: str) -> config_dict.ConfigDict:
    """Gives `config.weighting` and `config.objective` all the fields of their functions, in place.

    Args:
      config: whose `plugins` are loaded first.
      **names: `weighting` or `objective`: the function to switch that section to. Values of
        hyperparameters that both functions have are kept, the others' are dropped.

    Returns:
      The same config.

    Raises:
      ConfigError: a plugin that cannot be loaded, or a name that is not registered.
    """
    try:
        load_plugins(as_tuple(config.get("plugins", ())))
    except PluginError as error:
        raise ConfigError([f"config.plugins: {error}"]) from error
    for field, registry in SECTIONS.items():
        if not isinstance(config.get(field), config_dict.ConfigDict):
            raise ConfigError([f"config.{field}: missing (start from default_config())"])
        old = dict(config[field].items())
        old_name = old.pop("name", None)
        name = names.get(field, old_name)
        try:
            accepted = registry.hyperparameters(name)
        except RegistryError as error:
            raise ConfigError([f"config.{field}.name: {error}"]) from error
        section = section_for(registry, name, **{k: v for k, v in old.items() if k in accepted})
        if name == old_name:
            # Fields the function does not have stay, for `validate` to report.
            for key in old.keys() - accepted.keys():
                section[key] = any_type(old[key])
        config[field] = section.lock() if config.is_locked else section
    return config
