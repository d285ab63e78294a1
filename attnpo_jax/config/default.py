"""The default config."""

import copy

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.fields import FIELDS
from attnpo_jax.config.sections import Config, any_type, section_for


def default_config() -> config_dict.ConfigDict:
    """Every field with its default; locked, so that a mistyped field fails where it is set."""
    config = Config()
    for name, field in FIELDS.items():
        *parents, last = name.split(".")
        section = config
        for parent in parents:
            if parent not in section:
                section[parent] = config_dict.ConfigDict()
            section = section[parent]
        if field.mixed:
            section[last] = any_type(None)
        # A copy, since a dict may be changed in place; set afterwards, it stays one.
        section[last] = copy.copy(field.default)
    config.weighting = section_for(weighting, "attention")
    config.objective = section_for(losses, "sigmoid")
    return config.lock()
