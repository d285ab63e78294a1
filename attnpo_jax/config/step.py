"""What a config says about a training or evaluation step."""

from typing import TYPE_CHECKING

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.reading import weighting_needs
from attnpo_jax.config.sections import bind_section
from attnpo_jax.models.config import ModelConfig

if TYPE_CHECKING:
    from attnpo_jax.pair_loss import StepSettings


def step_settings(
    config: config_dict.ConfigDict,
    model: ModelConfig,
    source_layers: tuple[weighting.Source, ...],
    attention: str,
    weight_columns: tuple[str, ...] = (),
    reference: ModelConfig | None = None,
    num_layers: int | None = None,
) -> "StepSettings":
    """What the config says about a step.

    Args:
      config: see `attnpo_jax.config.default_config`.
      model: the model's shape.
      source_layers: what the prepared dataset's source axis holds.
      attention: the implementation that was chosen.
      weight_columns: the columns that the prepared dataset has for weightings to read by name.
      reference: the shape of the reference that training holds in memory; None where it holds none.
      num_layers: how many layers the judge has; None for as many as the model.
    """
    # Here, since a config is checked without the libraries that compute.
    import jax.numpy as jnp

    from attnpo_jax.pair_loss import StepSettings

    return StepSettings(
        model=model,
        weighting=weighting.shaped(
            bind_section(weighting, config.weighting), **dict(config.shaping.items())
        ),
        needs=weighting_needs(config),
        reference=reference,
        objective=bind_section(losses, config.objective),
        # An objective of one's own need not have a beta; its rewards are plain log-ratios.
        beta=config.objective.get("beta", 1.0),
        source_layers=source_layers,
        weight_columns=weight_columns,
        num_layers=num_layers,
        dtype=jnp.dtype(config.model.dtype),
        remat=config.model.remat,
        attention=attention,
        logps_chunk=config.model.logps_chunk,
    )
