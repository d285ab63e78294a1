"""Names of what the judge's attention is kept of: layers, single heads, rollout.

A layer is its number, and stands for the mean over its heads; "23:4" is head 4 of layer 23, and
"rollout" what reaches the verdict through all layers. All count from 0, negative layers from the
last.
"""

import re
from collections.abc import Sequence

from attnpo_jax.registry import RegistryError

ROLLOUT = "rollout"
Source = int | str

_HEAD_RE = re.compile(r"(-?[0-9]+):([0-9]+)")


def head_of(source: Source) -> tuple[int, int] | None:
    """Layer and head that a source names; None for a layer's mean and for rollout.

    >>> head_of("-1:4"), head_of(23), head_of("rollout")
    ((-1, 4), None, None)
    """
    found = _HEAD_RE.fullmatch(source) if isinstance(source, str) else None
    return None if found is None else (int(found[1]), int(found[2]))


def is_source(value: object) -> bool:
    """Whether a value is the name of a source, of whatever model."""
    if isinstance(value, str):
        return value == ROLLOUT or head_of(value) is not None
    return isinstance(value, int) and not isinstance(value, bool)


def layer_of(source: Source) -> int | None:
    """The layer that a source is of; None for rollout.

    >>> layer_of("23:4"), layer_of(-1), layer_of("rollout")
    (23, -1, None)
    """
    if source == ROLLOUT:
        return None
    head = head_of(source)
    return int(source) if head is None else head[0]


def counted_from_0(source: Source, num_layers: int) -> Source:
    """The source with its layer counted from 0; one that the model lacks stays as it is.

    >>> counted_from_0(-1, 30), counted_from_0("-2:4", 30), counted_from_0("rollout", 30)
    (29, '28:4', 'rollout')
    """
    layer, head = layer_of(source), head_of(source)
    if layer is None or not -num_layers <= layer < 0:
        return source
    return layer + num_layers if head is None else f"{layer + num_layers}:{head[1]}"


def in_order(sources: Sequence[Source]) -> tuple[Source, ...]:
    """Each source once: by layer, its mean before its heads, and rollout last.

    >>> in_order(["rollout", "2:10", 2, "2:9", 0, 2])
    (0, 2, '2:9', '2:10', 'rollout')
    """

    def place(source: Source) -> tuple[float, int]:
        layer, head = layer_of(source), head_of(source)
        return (float("inf") if layer is None else layer), (-1 if head is None else head[1])

    return tuple(sorted(set(sources), key=place))


def select_sources(
    layer: Source | Sequence[Source],
    source_layers: Sequence[Source],
    num_layers: int | None,
) -> tuple[int, ...]:
    """Places on the source axis of the layers asked for.

    Args:
      layer: one source or several; negative layers count from `num_layers`.
      source_layers: those on the source axis, in its order.
      num_layers: how many layers the model has; needed for negative layers only.

    Raises:
      RegistryError: no source, or one that is not on the axis; the message lists those that are.

    >>> select_sources((-1, "2:5"), (0, 2, "2:5"), 3)
    (1, 2)
    """
    available = ", ".join(map(str, source_layers))
    layers = tuple(layer) if isinstance(layer, (tuple, list)) else (layer,)
    if not layers or not all(map(is_source, layers)):
        raise RegistryError(
            f"layer is {layer!r}; accepted: a layer's number, a head as '23:4', '{ROLLOUT}', or a "
            f"tuple of them, of {available}"
        )
    places = []
    for wanted in layers:
        if num_layers is None and (layer_of(wanted) or 0) < 0:
            raise RegistryError(
                f"layer {wanted} counts from the last one, but the number of layers is not known; "
                f"accepted: {available}"
            )
        resolved = wanted if num_layers is None else counted_from_0(wanted, num_layers)
        if resolved not in source_layers:
            of = "" if num_layers is None else f" (the model has {num_layers} layers)"
            raise RegistryError(
                f"layer {wanted} is not among the judge's layers; accepted: {available}{of}"
            )
        places.append(list(source_layers).index(resolved))
    return tuple(places)
