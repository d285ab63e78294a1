"""What to set, picked on one half of the marked groups and confirmed on the other."""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from attnpo_jax.probe.figures import KindFigures
from attnpo_jax.probe.weights import BASELINES, Kind, layer_kind
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.intervals import Estimate

# With fewer in each half, an interval of resampled groups tells too little.
LEAST = 10


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A kind of weights against another one, on the half that it was not picked on.

    Attributes:
      name, other: the two.
      auc, difference: the AUC, and by how much it is the higher one.
    """

    name: str
    other: str
    auc: Estimate
    difference: Estimate

    @property
    def better(self) -> bool:
        return self.difference.low > 0

    @property
    def worse(self) -> bool:
        return self.difference.high < 0


@dataclasses.dataclass(frozen=True)
class Choice:
    """What the marks speak for.

    Attributes:
      layer, fix_sink: what `weighting.layer` and `weighting.fix_sink` should be.
      picked: the layer with the highest AUC on the first half.
      also: that on the second half, which is looked at for nothing else.
      over_last: the picked layer against the last one, which is the paper's.
      over_raw: that of `layer`, with the sink fix against without.
      over_baselines: the picked layer against weights without attention.
      over_diff: the layer that is best times `diff`, against `diff` alone.
      group: the group of heads with the highest AUC on the first half, as `weighting.layer` names
        it; () where there are none.
      over_layer: that group against the picked layer; None where there are none.
      at_place: the picked layer's AUC with position divided out, on the second half.
      halves: how many groups each has.
    """

    layer: int
    fix_sink: bool
    picked: int
    also: int
    over_last: Comparison
    over_raw: Comparison
    over_baselines: tuple[Comparison, ...]
    over_diff: Comparison
    group: tuple[str, ...]
    over_layer: Comparison | None
    at_place: Estimate
    halves: tuple[int, int]


def split(groups: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of some groups, by a digest of their names: places in the list, ascending."""
    ranked = sorted(range(len(groups)), key=lambda i: hashlib.sha256(groups[i].encode()).digest())
    middle = len(groups) // 2
    return np.sort(ranked[:middle]), np.sort(ranked[middle:])


def choose(kinds: Sequence[KindFigures], names: Sequence[str], num_layers: int) -> Choice | None:
    """Picks and confirms; None where there are too few groups.

    Args:
      kinds: see `figures.find_marks`.
      names: of the marked items (groups of pairs), in the order of their figures.
      num_layers: how many layers the model has.
    """
    first, second = split(names)
    if len(first) < LEAST:
        return None
    auc = {one.kind: one.auc_G for one in kinds}
    layers = sorted({kind.layer for kind in auc if kind.layer is not None})

    def best(half: np.ndarray, times_diff: bool = False) -> int:
        means = [
            np.nanmean(auc[layer_kind(layer, times_diff=times_diff)][half]) for layer in layers
        ]
        return layers[int(np.argmax(means))]

    def compare(kind: Kind, other: Kind) -> Comparison:
        values = np.stack([auc[kind][second], (auc[kind] - auc[other])[second]], axis=1)
        return Comparison(kind.name, other.name, *intervals.bootstrap_means(values))

    picked, last = best(first), layers[-1]
    over_last = compare(layer_kind(picked), layer_kind(last))
    layer = picked if over_last.better else last
    over_raw = compare(layer_kind(layer), layer_kind(layer, fix_sink=False))
    with_diff = layer_kind(best(first, times_diff=True), times_diff=True)
    groups = [kind for kind in auc if kind.heads and kind.order == "mean"]
    group = max(groups, key=lambda kind: np.nanmean(auc[kind][first]), default=None)
    of_picked = next(one for one in kinds if one.kind == layer_kind(picked))
    (at_place,) = intervals.bootstrap_means(of_picked.at_place_G[second][:, None])
    return Choice(
        layer=layer if layer != num_layers - 1 else -1,
        fix_sink=not over_raw.worse,
        picked=picked,
        also=best(second),
        over_last=over_last,
        over_raw=over_raw,
        over_baselines=tuple(compare(layer_kind(picked), Kind(name)) for name in BASELINES[1:]),
        over_diff=compare(with_diff, Kind("diff")),
        group=group.sources if group else (),
        over_layer=compare(group, layer_kind(picked)) if group else None,
        at_place=at_place,
        halves=(len(first), len(second)),
    )
