"""What weighting and objective of a config read of the passes of `prepare`."""

from ml_collections import config_dict

from attnpo_jax import losses, weighting
from attnpo_jax.config.sections import bind_section

_JUDGE, _LOGPS, _ENTROPY = "judge", "reference_logps", "reference_entropy"


def reads(config: config_dict.ConfigDict) -> tuple[str, ...]:
    """The columns, by `data.shards.GROUPS`, that a step of this config reads; no others are needed.

    A weighting declares that it reads the judge or the reference; one with a hyperparameter `layer`
    reads the judge. An objective reads the reference, unless it declares itself free of it.
    """
    needs = weighting_needs(config)
    objective = losses.traits(bind_section(losses, config.objective))
    found = {
        _JUDGE: reads_judge(config) and config.judge.layers != "none",
        _LOGPS: not objective.reference_free or _LOGPS in needs,
        _ENTROPY: _ENTROPY in needs,
    }
    return tuple(group for group, read in found.items() if read)


def reads_judge(config: config_dict.ConfigDict) -> bool:
    """Whether the weighting reads what the judge says."""
    return _JUDGE in weighting_needs(config) or "layer" in config.weighting


def reads_distribution(config: config_dict.ConfigDict) -> bool:
    """Whether the objective reads the reference's distributions, which no prepared dataset has."""
    return "reference_kl" in losses.traits(bind_section(losses, config.objective)).needs


def weighting_needs(config: config_dict.ConfigDict) -> tuple[str, ...]:
    """What the weighting declares that it reads, of `weighting.NEEDS`."""
    hyperparameters = {k: v for k, v in config.weighting.items() if k != "name"}
    return weighting.needs(config.weighting.name, hyperparameters)
