"""Overrides of a config's fields, as a command line gives them: --config.section.field=value."""

import functools
import logging
import operator
import os
import re
from collections.abc import Container, Sequence

from absl import flags
from ml_collections import config_dict, config_flags

from attnpo_jax.config import scoring
from attnpo_jax.config.checks import accepted_words, rule_of, suggest, takes_several
from attnpo_jax.config.default import default_config
from attnpo_jax.config.fields import flatten
from attnpo_jax.config.files import load_file
from attnpo_jax.config.rules import as_tuple
from attnpo_jax.config.sections import SECTIONS, complete_sections, former_name
from attnpo_jax.runtime.errors import UsageError

_LOG = logging.getLogger(__name__)
_WHOLE = re.compile(r"-?[0-9]{1,9}")


def load_config(spec: str | None, overrides: Sequence[str] = ()) -> config_dict.ConfigDict:
    """The config of a file, changed as a command line says.

    Overrides of `weighting.name` and `objective.name` come first, whatever their place: another
    name than the file's resets the section to that function's defaults, which others may then set.
    Where file or command line switch a function, a line of log says what its section comes to.
    `a,b` are two names in a field that takes several; `"'a,b'"` is one.

    Args:
      spec: path of a config file, or `path:argument`, see `load_file`; None for the defaults.
      overrides: `--config.section.field=value`, as on the command line.

    Returns:
      A ConfigDict, not validated yet.

    Raises:
      UsageError: a field that does not exist, or a value that is not of its type.
      ConfigError, FileNotFoundError: see `load_file` and `complete_sections`.
    """
    return override(default_config() if spec is None else load_file(spec), overrides)


def override(config: config_dict.ConfigDict, overrides: Sequence[str]) -> config_dict.ConfigDict:
    """A config, changed as a command line says; see `load_config`.

    Args:
      config: is changed itself.
      overrides: `--config.section.field=value`.
    """
    by_field: dict[str, list[str]] = {}
    for override in overrides:
        by_field.setdefault(_field(override), []).append(override)

    config = _apply(config, by_field.get("plugins", []))
    switched = {}
    for section in SECTIONS:
        for override in by_field.get(f"{section}.name", []):
            switched[section] = override.partition("=")[2]
    config = complete_sections(config, **switched)

    known = list(flatten(config))
    for field in by_field:
        if field not in known and not scoring.is_override(field):
            raise UsageError(_unknown_field(field, known))
    config = _apply(config, [text for text in overrides if not scoring.is_override(_field(text))])
    for field in filter(scoring.is_override, by_field):
        for text in by_field[field]:
            scoring.override(config, field, text.partition("=")[2])
    for section in SECTIONS:
        if former_name(config[section]) not in (None, config[section].name):
            _LOG.info("%s", _switched(config, section, by_field))
    return config


def _switched(config: config_dict.ConfigDict, section: str, given: Container[str]) -> str:
    """What a section comes to whose function was switched: its defaults, and what was set since."""
    values = dict(config[section].items())
    name = values.pop("name")
    defaults = SECTIONS[section].hyperparameters(name)
    listed = [
        f"{key} = {value!r} "
        + ("(set)" if f"{section}.{key}" in given or value != defaults.get(key) else "(default)")
        for key, value in values.items()
    ]
    return (
        f"config.{section}: {name!r} in place of {former_name(config[section])!r}, whose values "
        f"are dropped: {', '.join(listed) or 'no hyperparameters'}"
    )


def _unknown_field(field: str, known: Sequence[str]) -> str:
    inside = [k for k in known if k.startswith(f"{field}.")]
    if inside:
        listed = ", ".join(f"--config.{k}" for k in inside)
        return f"--config.{field} is a section; set its fields: {listed}"
    section = field.rpartition(".")[0]
    beside = [k for k in known if section and k.rpartition(".")[0] == section]
    listed = f"; fields of config.{section}: " + ", ".join(k.rpartition(".")[2] for k in beside)
    return f"--config.{field}: unknown field{suggest(field, known)}{listed if beside else ''}"


def _apply(config: config_dict.ConfigDict, overrides: list[str]) -> config_dict.ConfigDict:
    arguments = ["attnpo", *overrides]
    values = flags.FlagValues()
    config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
    except flags.Error as error:
        if len(overrides) > 1:
            # Which one it is, absl does not say.
            for override in overrides:
                _apply(config, [override])
        raise UsageError(_refused(config, overrides[0], str(error))) from error
    config = values["config"].value
    for override in overrides:
        _split(config, override)
    return config


def _split(config: config_dict.ConfigDict, override: str) -> None:
    """Makes several names of a text with commas that was set as it stands and is no file's."""
    field, text = _field(override), override.partition("=")[2]
    if "," not in text or not takes_several(config, field):
        return
    *parents, last = field.split(".")
    section = functools.reduce(operator.getitem, parents, config)
    if as_tuple(section[last]) != (text,) or os.path.exists(text):
        return
    names = [name.strip() for name in text.removesuffix(",").split(",")]
    rule = rule_of(config, field)
    section[last] = tuple(
        int(name) if _WHOLE.fullmatch(name) and rule.accepts(int(name)) else name for name in names
    )


def _refused(config: config_dict.ConfigDict, override: str, reason: str) -> str:
    if "=" not in override:
        return f"{override} needs a value; {reason}"
    return f"{override}: accepted: {accepted_words(config, _field(override))}"


def _field(override: str) -> str:
    return re.sub(r"^--?(no)?config\.", "", override.partition("=")[0])
