"""Configs: fields, checks, files and overrides."""

from attnpo_jax.config.checks import validate
from attnpo_jax.config.default import default_config
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.fields import flatten
from attnpo_jax.config.files import diff, from_json, load_file, to_json
from attnpo_jax.config.layers import (
    check_columns,
    check_layers,
    columns,
    judge_layers,
    sampling,
    source_layers,
    trained_form,
    weight_columns,
)
from attnpo_jax.config.overrides import load_config, override
from attnpo_jax.config.reading import reads, reads_distribution
from attnpo_jax.config.rules import as_tuple
from attnpo_jax.config.scoring import parse as scorers
from attnpo_jax.config.sections import SECTIONS, bind_section, complete_sections, section_for
from attnpo_jax.config.step import step_settings

__all__ = [
    "ConfigError",
    "SECTIONS",
    "as_tuple",
    "bind_section",
    "check_columns",
    "check_layers",
    "columns",
    "complete_sections",
    "default_config",
    "diff",
    "flatten",
    "from_json",
    "judge_layers",
    "load_config",
    "load_file",
    "override",
    "reads",
    "reads_distribution",
    "sampling",
    "scorers",
    "section_for",
    "source_layers",
    "step_settings",
    "to_json",
    "trained_form",
    "validate",
    "weight_columns",
]
