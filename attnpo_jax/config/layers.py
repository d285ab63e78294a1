"""What a config's layers and columns mean for the model and the data that there are."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from attnpo_jax import weighting
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.reading import reads_judge
from attnpo_jax.config.rules import as_sampling, as_tuple
from attnpo_jax.sampling.rules import SETTINGS

if TYPE_CHECKING:
    from attnpo_jax.data.columns import Columns

_LOG = logging.getLogger(__name__)


def source_layers(
    judge_layers: str | Sequence[int],
    num_layers: int,
    global_layers: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """The layers whose attention the judge keeps, counted from 0.

    Args:
      judge_layers: `config.judge.layers`.
      num_layers: how many layers the model has.
      global_layers: the layers that see the whole judge prompt, ascending, of which `quartiles`
        chooses; None for all.

    Raises:
      ConfigError: a layer the model does not have, or `quartiles` of no global layer.

    >>> source_layers("quartiles", 30)
    (0, 6, 14, 21, 29)
    >>> source_layers((0, -1), 30)
    (0, 29)
    >>> source_layers("quartiles", 10, global_layers=(4, 9))
    (4, 9)
    """
    if judge_layers == "none":
        return ()
    if judge_layers == "all":
        return tuple(range(num_layers))
    if judge_layers == "quartiles":
        candidates = range(num_layers) if global_layers is None else global_layers
        if not candidates:
            raise ConfigError(
                [
                    "config.judge.layers = 'quartiles': every layer of this model has a sliding "
                    "window shorter than judge.max_length, so none is sure to see both answers; "
                    "accepted: layers by number, or a judge.max_length within the window"
                ]
            )
        n = len(candidates)
        quarters = (n // 4, n // 2, 3 * n // 4, n)
        places = sorted({0, *(max(quarter - 1, 0) for quarter in quarters)})
        return tuple(candidates[place] for place in places)
    outside = [x for x in judge_layers if not -num_layers <= x < num_layers]
    if outside:
        raise ConfigError(
            [
                f"config.judge.layers = {tuple(judge_layers)!r}: no layer "
                f"{', '.join(map(str, outside))}; accepted for this model of {num_layers} layers: "
                f"{-num_layers} to {num_layers - 1}"
            ]
        )
    # Ascending and each once, so that (0, -1) and (0, 29) name the same prepared dataset.
    return tuple(sorted({x % num_layers for x in judge_layers}))


def judge_layers(
    config: config_dict.ConfigDict,
    num_layers: int,
    layer_windows: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    """The layers that `judge.layers` means for a model.

    `quartiles` takes global layers alone: one with a sliding window may not see both answers. Where
    all layers have a window, those will do whose window holds the whole judge prompt.

    Args:
      config: the run's config.
      num_layers: how many layers the model has.
      layer_windows: see `models.config.ModelConfig`.

    Raises:
      ConfigError: a layer the model does not have.
    """
    return source_layers(config.judge.layers, num_layers, _global_layers(config, layer_windows))


def _global_layers(
    config: config_dict.ConfigDict, layer_windows: Sequence[int | None] | None
) -> list[int] | None:
    """The layers that see whole judge prompts; None for all of them."""
    if layer_windows is None:
        return None
    return [i for i, window in enumerate(layer_windows) if window is None] or [
        i for i, window in enumerate(layer_windows) if window >= config.judge.max_length
    ]


def check_layers(
    config: config_dict.ConfigDict,
    num_layers: int,
    layer_windows: Sequence[int | None] | None = None,
) -> tuple[int, ...]:
    """Checks `judge.layers` and `weighting.layer` against the layers of the model.

    Warns of a weighting's layer that may not see both answers, so it is asked once a command.

    Args:
      config: the run's config.
      num_layers: how many layers the model has.
      layer_windows: see `models.config.ModelConfig`.

    Returns:
      The judge's layers, see `judge_layers`.

    Raises:
      ConfigError: a layer the model does not have, or a weighting's layer the judge does not keep.
    """
    sources = judge_layers(config, num_layers, layer_windows)
    if reads_judge(config) and not sources:
        raise ConfigError(
            [
                "config.judge.layers = 'none': the weighting "
                f"{config.weighting.name!r} reads the judge's attention; accepted: layers, or "
                "another weighting"
            ]
        )
    if "layer" in config.weighting:
        try:
            weighting.select_sources(config.weighting.layer, sources, num_layers)
        except ValueError as error:
            raise ConfigError(
                [f"config.weighting.layer: {error}; config.judge.layers says which layers are kept"]
            ) from error
        layer = range(num_layers)[config.weighting.layer] if _is_layer(config, num_layers) else None
        window = None if layer_windows is None or layer is None else layer_windows[layer]
        if window is not None and window < config.judge.max_length:
            _LOG.warning(
                "weighting.layer = %d is layer %d, which sees %d positions back, and judge prompts "
                "may have %d: it may not see both answers; layers that do: %s",
                config.weighting.layer,
                layer,
                window,
                config.judge.max_length,
                ", ".join(map(str, _global_layers(config, layer_windows))) or "none",
            )
    return sources


def _is_layer(config: config_dict.ConfigDict, num_layers: int) -> bool:
    """Whether the weighting reads one layer."""
    layer = config.weighting.layer
    return isinstance(layer, int) and -num_layers <= layer < num_layers


def columns(config: config_dict.ConfigDict) -> "Columns":
    """How `data.fields`, `data.ignored_columns` and `data.ranked` have examples read."""
    # Here, since a config is checked without the libraries that read data.
    from attnpo_jax.data.columns import Columns

    return Columns(
        names={field: column for field, column in config.data.fields.items() if column},
        ignored=as_tuple(config.data.ignored_columns),
        ranked=config.data.ranked,
    )


def sampling(section: config_dict.ConfigDict) -> dict[str, Any]:
    """What the section `generate` says of `sampling.SamplingSettings`; no more than it says."""
    values = {name: as_sampling(name, section[name]) for name in SETTINGS}
    return {name: value for name, value in values.items() if value is not None}


def weight_columns(config: config_dict.ConfigDict) -> str | tuple[str, ...]:
    """The ready-made weights to read: "all", or names, ready for `data.sources.load_pairs`."""
    columns = config.data.weight_columns
    return "all" if columns == "all" else tuple(map(str, as_tuple(columns)))


def check_columns(config: config_dict.ConfigDict, available: Sequence[str]) -> None:
    """Checks `weighting.column` and `weighting.against` against the columns that there are.

    Args:
      config: the run's config.
      available: the names of its scorers, then of the data's columns.

    Raises:
      ConfigError: a column that there is none of, or a scorer that is named as one of the data.
    """
    for name in config.prepare.scorers:
        if list(available).count(name) > 1:
            raise ConfigError(
                [
                    f"config.prepare.scorers has {name!r}, which the data have weights of too; "
                    "accepted: another name"
                ]
            )
    for field in ("column", "against"):
        if config.weighting.get(field) is None:
            continue
        try:
            weighting.select_columns(config.weighting[field], available)
        except ValueError as error:
            raise ConfigError([f"config.weighting.{field}: {error}"]) from error
