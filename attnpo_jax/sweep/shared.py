"""What the runs of a sweep read of their one prepared dataset: all of it, prepared once."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ml_collections import config_dict

from attnpo_jax import config as config_lib
from attnpo_jax.config.scoring import union
from attnpo_jax.models.config import ModelConfig
from attnpo_jax.run import Run
from attnpo_jax.sweep.grid import Point


def to_prepare(run: Run, points: Sequence[Point]) -> list[Run]:
    """Runs that prepare all that those of the grid read: one for each kind of columns.

    All have the scorers of all points, and those of one judge all of its layers that any reads:
    what serves the most serves each.

    Args:
      run: what all points have in common.
      points: the grid.

    Raises:
      ConfigError: a layer that a judge does not have, or a scorer that two points have under one
        name, and not alike.
    """
    scorers = union([point.config.prepare.scorers for point in points])
    judges: dict[Any, dict[Any, None]] = {}
    shapes: dict[Any, ModelConfig] = {}
    whole: dict[Any, bool] = {}
    for point in points:
        one, judge = dataclasses.replace(run, config=point.config), _judge(point.config)
        if judge not in shapes:
            shapes[judge] = run.model if one.judge is None else one.judge.shape
        shape = shapes[judge]
        layers = config_lib.check_layers(
            point.config, shape.num_layers, shape.layer_windows, shape.num_heads
        )
        judges.setdefault(judge, {}).update(dict.fromkeys(layers))
        whole[judge] = whole.get(judge, False) or point.config.judge.whole_responses
    kinds: dict[Any, Run] = {}
    for point in points:
        reads, judge = config_lib.reads(point.config), _judge(point.config)
        # A copy, in which fields still take values of all their types.
        config = config_lib.from_json(config_lib.to_json(point.config))
        config.judge.layers = tuple(judges[judge]) or "none"
        config.judge.heads = "mean"  # single heads are among the layers by name
        config.judge.whole_responses = whole[judge]
        config.prepare.scorers = scorers
        one = dataclasses.replace(run, config=config)
        kinds.setdefault((reads, config.reference.source, judge), one)
    # Who reads most comes first, and may leave nothing to do.
    return sorted(kinds.values(), key=lambda one: -len(one.reads))


def _judge(config: config_dict.ConfigDict) -> tuple[Any, ...]:
    """The same for configs whose judge is the same model, with the same tokenizer and template."""
    section = config.judge
    own = section.source if section.source != config.model.source else ""
    return own, section.chat_template, repr(section.chat_template_kwargs)
