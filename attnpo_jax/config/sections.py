"""The sections `weighting` and `objective`: a name and that function's hyperparameters."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.fields import FIELDS
from attnpo_jax.config.rules import as_tuple
from attnpo_jax.registry import REQUIRED, PluginError, Registry, RegistryError, load_plugins

SECTIONS = {"weighting": weighting, "objective": losses}
"""Sections whose fields are a name and that function's hyperparameters, and their registries."""


class Section(config_dict.ConfigDict):
    """A section whose fields are those of the function that it names.

    Another `name` resets it: the new function's hyperparameters, with their defaults, take the
    place of the old one's. A name that is not registered yet, as of a plugin that is loaded later,
    leaves the section empty and open to any field; `complete_sections` fills it in.
    """

    _registry: Registry
    _former: str | None = None

    def __setitem__(self, key: str, value: Any) -> None:
        before = self.get("name", value)
        if key != "name" or before == value:
            super().__setitem__(key, value)
            return
        known = value in self._registry.names()
        fields = {"name": value}
        if known:
            # The fields, not their values: of some, the type is open.
            new = section_for(self._registry, value)
            fields = dict(new.items(preserve_field_references=True))
        locked = self.is_locked
        self.unlock()
        for field in self.keys():
            del self[field]
        for field, default in fields.items():
            super().__setitem__(field, default)
        _set_former(self, before)
        if locked and known:
            self.lock()


class _Weighting(Section):
    _registry = weighting.registry


class _Objective(Section):
    _registry = losses.registry


_CLASSES = {cls._registry: cls for cls in (_Weighting, _Objective)}


def _empty_section(registry: Any) -> config_dict.ConfigDict:
    """A section without fields; that of a registry of one's own does not reset itself."""
    return _CLASSES.get(getattr(registry, "registry", registry), config_dict.ConfigDict)()


class Config(config_dict.ConfigDict):
    """A whole config. What is set as its `weighting` or `objective` becomes a `Section`."""

    def __setitem__(self, key: str, value: Any) -> None:
        made_by_hand = isinstance(value, (dict, config_dict.ConfigDict))
        if key in SECTIONS and made_by_hand and not isinstance(value, Section):
            section = _empty_section(SECTIONS[key])
            for field, content in {"name": value.get("name"), **dict(value.items())}.items():
                section[field] = content if field == "name" else any_type(content)
            value = section
        super().__setitem__(key, value)


def any_type(value: Any) -> config_dict.FieldReference:
    """A field that takes values of several types."""
    return config_dict.FieldReference(value, field_type=object)


def former_name(section: config_dict.ConfigDict) -> str | None:
    """The function that a section named before it was reset; None if it never was."""
    return getattr(section, "_former", None)


def _set_former(section: config_dict.ConfigDict, name: str | None) -> None:
    object.__setattr__(section, "_former", name)  # past the fields


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
    section = _empty_section(registry)
    section.name = name
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
      **names: `weighting` or `objective`: the function to switch that section to. A section that
        names another one is reset to that function's defaults.

    Returns:
      The same config.

    Raises:
      ConfigError: a plugin that cannot be loaded, or a name that is not registered.
    """
    plugins = config.get("plugins", ())
    if not FIELDS["plugins"].rule.accepts(plugins):
        accepted = FIELDS["plugins"].rule.accepted
        raise ConfigError([f"config.plugins = {plugins!r}: accepted: {accepted}"])
    try:
        load_plugins(as_tuple(plugins))
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
        if name == old_name:
            section = section_for(registry, name, **{k: old[k] for k in old if k in accepted})
            _set_former(section, former_name(config[field]))
            # Fields the function does not have stay, for `validate` to report.
            for key in old.keys() - accepted.keys():
                section[key] = any_type(old[key])
        else:
            section = section_for(registry, name)
            _set_former(section, old_name)
        config[field] = section.lock() if config.is_locked else section
    return config
