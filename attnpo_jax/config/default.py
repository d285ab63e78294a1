"""The default config."""

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
        section[last] = any_type(field.default) if field.mixed else field.default
    config.weighting = section_for(weighting, "attention")
    config.objective = section_for(losses, "sigmoid")
    return config.lock()
