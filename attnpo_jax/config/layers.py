"""What a config's layers and columns mean for the model and the data that there are."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import config_dict

from attnpo_jax import weighting
from attnpo_jax.config.errors import ConfigError
from attnpo_jax.config.reading import reads_judge
from attnpo_jax.config.rules import as_sampling, as_tuple
from attnpo_jax.sampling.rules import SETTINGS
from attnpo_jax.weighting.sources import (
    Source,
    counted_from_0,
    head_of,
    in_order,
    is_source,
    layer_of,
)

if TYPE_CHECKING:
    from attnpo_jax.data.columns import Columns
    from attnpo_jax.data.trained import TrainedForm

_LOG = logging.getLogger(__name__)


def source_layers(
    judge_layers: str | Source | Sequence[str | Source],
    num_layers: int,
    global_layers: Sequence[int] | None = None,
    *,
    heads: str = "mean",
    num_heads: int = 0,
) -> tuple[Source, ...]:
    """What the judge keeps the attention of, named as in `weighting.sources`, counted from 0.

    Args:
      judge_layers: `config.judge.layers`.
      num_layers: how many layers the model has.
      global_layers: the layers that see the whole judge prompt, ascending, of which `quartiles`
        chooses; None for all.
      heads: `config.judge.heads`.
      num_heads: how many heads a layer has; 0 where no heads are asked for.

    Raises:
      ConfigError: a layer or a head the model does not have, or `quartiles` of no global layer.

    >>> source_layers("quartiles", 30)
    (0, 6, 14, 21, 29)
    >>> source_layers((0, -1, "rollout"), 30)
    (0, 29, 'rollout')
    >>> source_layers("quartiles", 10, global_layers=(4, 9))
    (4, 9)
    >>> source_layers((9,), 10, heads="all", num_heads=2)
    (9, '9:0', '9:1')
    """
    if judge_layers == "none":
        return ()
    named: list[Source] = []
    for one in as_tuple(judge_layers):
        if one == "all":
            named += range(num_layers)
        elif one == "quartiles":
            named += _quartiles(range(num_layers) if global_layers is None else global_layers)
        else:
            named.append(one)
    outside = [x for x in named if not _is_there(x, num_layers, num_heads)]
    if outside:
        of_heads = f", heads 0 to {num_heads - 1}" if any(map(head_of, outside)) else ""
        raise ConfigError(
            [
                f"config.judge.layers = {judge_layers!r}: no layer "
                f"{', '.join(map(str, outside))}; accepted for this model of {num_layers} layers: "
                f"{-num_layers} to {num_layers - 1}{of_heads}"
            ]
        )
    # In one order and each once, so that (0, -1) and (0, 29) name the same prepared dataset.
    sources = [counted_from_0(source, num_layers) for source in named]
    if heads == "all":
        layers = [source for source in sources if isinstance(source, int)]
        sources += [f"{layer}:{head}" for layer in layers for head in range(num_heads)]
    return in_order(sources)


def _quartiles(candidates: Sequence[int]) -> list[int]:
    """The first, the last and the last of each quarter."""
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
    return [candidates[i] for i in sorted({0, *(max(quarter - 1, 0) for quarter in quarters)})]


def _is_there(source: Source, num_layers: int, num_heads: int) -> bool:
    layer, head = layer_of(source), head_of(source)
    if layer is None:
        return True
    return -num_layers <= layer < num_layers and (head is None or head[1] < num_heads)


def judge_layers(
    config: config_dict.ConfigDict,
    num_layers: int,
    layer_windows: Sequence[int | None] | None = None,
    num_heads: int = 0,
) -> tuple[Source, ...]:
    """What `judge.layers` and `judge.heads` mean for a model.

    `quartiles` takes global layers alone: one with a sliding window may not see both answers. Where
    all layers have a window, those will do whose window holds the whole judge prompt.

    Args:
      config: the run's config.
      num_layers, num_heads: how many layers the model has, and how many heads a layer.
      layer_windows: see `models.config.ModelConfig`.

    Raises:
      ConfigError: a layer or a head the model does not have.
    """
    return source_layers(
        config.judge.layers,
        num_layers,
        _global_layers(config, layer_windows),
        heads=config.judge.heads,
        num_heads=num_heads,
    )


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
    num_heads: int = 0,
) -> tuple[Source, ...]:
    """Checks `judge.layers` and `weighting.layer` against the layers of the model.

    Warns of a weighting's layer that may not see both answers, so it is asked once a command.

    Args:
      config: the run's config.
      num_layers, num_heads: how many layers the model has, and how many heads a layer.
      layer_windows: see `models.config.ModelConfig`.

    Returns:
      What the judge keeps, see `judge_layers`.

    Raises:
      ConfigError: a layer the model does not have, or a weighting's layer the judge does not keep.
    """
    sources = judge_layers(config, num_layers, layer_windows, num_heads)
    if reads_judge(config) and not sources:
        raise ConfigError(
            [
                "config.judge.layers = 'none': the weighting "
                f"{config.weighting.name!r} reads the judge's attention; accepted: layers, or "
                "another weighting"
            ]
        )
    if "layer" not in config.weighting:
        return sources
    try:
        weighting.select_sources(config.weighting.layer, sources, num_layers)
    except ValueError as error:
        raise ConfigError(
            [f"config.weighting.layer: {error}; config.judge.layers says which layers are kept"]
        ) from error
    if not config.weighting.get("renormalize", True) and not config.judge.whole_responses:
        raise ConfigError(
            [
                "config.weighting.renormalize = False needs config.judge.whole_responses = True: "
                "without it, nothing is known of what truncation cuts off"
            ]
        )
    if layer_windows is not None and is_source(config.weighting.layer):
        _warn_of_window(config, num_layers, layer_windows)
    return sources


def _warn_of_window(
    config: config_dict.ConfigDict, num_layers: int, layer_windows: Sequence[int | None]
) -> None:
    """Warns where the one layer that the weighting reads may not see both answers."""
    layer = layer_of(counted_from_0(config.weighting.layer, num_layers))
    window = None if layer is None else layer_windows[layer]
    if window is not None and window < config.judge.max_length:
        _LOG.warning(
            "weighting.layer = %s is of layer %d, which sees %d positions back, and judge prompts "
            "may have %d: it may not see both answers; layers that do: %s",
            config.weighting.layer,
            layer,
            window,
            config.judge.max_length,
            ", ".join(map(str, _global_layers(config, layer_windows))) or "none",
        )


def columns(config: config_dict.ConfigDict) -> "Columns":
    """How `data.fields`, `ignored_columns`, `ranked` and `empty_response` have examples read."""
    # Here, since a config is checked without the libraries that read data.
    from attnpo_jax.data.columns import Columns

    return Columns(
        names={field: column for field, column in config.data.fields.items() if column},
        ignored=as_tuple(config.data.ignored_columns),
        ranked=config.data.ranked,
        empty_responses=config.data.empty_response != "refuse",
    )


def trained_form(config: config_dict.ConfigDict) -> "TrainedForm":
    """What `data` says of how a pair becomes what is trained on."""
    from attnpo_jax.data.trained import TrainedForm

    names = [field.name for field in dataclasses.fields(TrainedForm)]
    return TrainedForm(**{name: config.data[name] for name in names})


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
