"""From judged pairs and their marks to figures with intervals.

Shapes: N pairs, R = 2N responses, G groups, K kinds of weights, T text tokens.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from attnpo_jax.judge.figures import by_group
from attnpo_jax.probe import measures
from attnpo_jax.probe.weights import Kind, families, layer_kind, weigh
from attnpo_jax.runtime import intervals
from attnpo_jax.runtime.intervals import Estimate
from attnpo_jax.weighting import Source
from attnpo_jax.weighting.sources import head_of

MEASURES = ("auc", "lift", "auc_at_place", "lift_at_place", "auc_chosen", "auc_rejected")


@dataclasses.dataclass(frozen=True)
class Marks:
    """What is known of N pairs beside what the judge made of them.

    Attributes:
      masks: by response, the chosen one of each pair first: bool (T,), the marked text tokens.
      subsets, strata, groups: by pair; tokens are held against those of their stratum, at their
        place.
    """

    masks: Sequence[np.ndarray]
    subsets: Sequence[str]
    strata: Sequence[str]
    groups: Sequence[str]

    @property
    def marked(self) -> list[int]:
        """The pairs with a marked token."""
        pairs = range(len(self.groups))
        return [i for i in pairs if self.masks[2 * i].any() or self.masks[2 * i + 1].any()]

    def of(self, pairs: Sequence[int]) -> "Marks":
        """Those of some pairs."""
        masks = [self.masks[2 * i + side] for i in pairs for side in (0, 1)]
        by_pair = (self.subsets, self.strata, self.groups)
        return Marks(masks, *([of[i] for i in pairs] for of in by_pair))


@dataclasses.dataclass(frozen=True)
class KindFigures:
    """How one kind of weights finds the marks.

    Attributes:
      kind: the weights.
      all: by measure, of `MEASURES`.
      subsets: by subset, the same; none where there is one subset alone, nor for kinds that are
        not `plain`.
      auc_G, at_place_G: each group's AUC, and that at its place.
    """

    kind: Kind
    all: dict[str, Estimate]
    subsets: dict[str, dict[str, Estimate]]
    auc_G: np.ndarray
    at_place_G: np.ndarray


def find_marks(
    rows: Sequence,
    marks: Marks,
    sources: Sequence[Source],
    groups: Sequence[tuple[int, ...]] = (),
) -> list[KindFigures]:
    """All kinds of weights against the marks.

    A response's AUC and lift are means over its marked tokens; a pair's are means over its marked
    responses, and a group's over its pairs. Figures are means over groups, and intervals those of
    the bootstrap over groups.

    Args:
      rows: of the prepared dataset, all pairs with marks.
      marks: theirs.
      sources: the judge's: layers, and heads where there are `groups`.
      groups: of heads, see `weights.head_groups`.
    """
    of_response = [[x for x in of for _ in (0, 1)] for of in (marks.strata, marks.groups)]
    names = list(dict.fromkeys(marks.subsets))
    parts = {"": range(len(marks.groups))}
    if len(names) > 1:
        parts |= {name: [i for i, of in enumerate(marks.subsets) if of == name] for name in names}
    found = []
    layers = [source for source in sources if head_of(source) is None]
    for family in families(layers, groups):
        weights = weigh(rows, family, sources)
        values_NMK = _of_pairs(weights, marks.masks, *of_response)
        estimates, whole = {}, None
        for name, pairs in parts.items():
            if name and not family[0].plain:
                continue
            groups_GMK = by_group(values_NMK[list(pairs)], [marks.groups[i] for i in pairs])
            whole = groups_GMK if whole is None else whole
            estimates[name] = _estimates(groups_GMK)
        for k, kind in enumerate(family):
            by_part = {name: of_part[k] for name, of_part in estimates.items()}
            of_all = by_part.pop("")
            found.append(KindFigures(kind, of_all, by_part, whole[:, 0, k], whole[:, 2, k]))
    return found


def _of_pairs(weights, masks, strata, groups) -> np.ndarray:
    """Each pair's measures (N, M, K), means over its responses where they have marks."""
    each = [
        np.stack([f(w_KT, mask) for w_KT, mask in zip(weights, masks, strict=True)])
        for f in (measures.auc, measures.lift)
    ]
    each += measures.at_place(weights, masks, strata, groups)
    sides_MN2K = np.stack(each).reshape(4, -1, 2, each[0].shape[1])
    known = ~np.isnan(sides_MN2K)
    sums = np.where(known, sides_MN2K, 0).sum(axis=2)
    mean_MNK = np.where(known.any(axis=2), sums / np.maximum(known.sum(axis=2), 1), np.nan)
    both = [*mean_MNK, sides_MN2K[0, :, 0], sides_MN2K[0, :, 1]]
    return np.stack(both, axis=1)


def _estimates(groups_GMK: np.ndarray) -> list[dict[str, Estimate]]:
    """By kind, then by measure."""
    G, M, K = groups_GMK.shape
    found = intervals.bootstrap_means(groups_GMK.reshape(G, M * K))
    return [dict(zip(MEASURES, found[k::K], strict=True)) for k in range(K)]


@dataclasses.dataclass(frozen=True)
class Alone:
    """What a layer's lift on a wrong answer's marks is where the judge sees no other answer.

    Attributes:
      lift: of the answer judged against itself.
      kept: that, over the lift of the same answers judged against the right ones.
    """

    lift: Estimate
    kept: Estimate


def against_itself(
    rows: Sequence, alone: Sequence, masks: Sequence[np.ndarray], sources: Sequence[Source]
) -> list[Alone]:
    """By layer, with both orders' mean and the sink fix.

    Args:
      rows: of the pairs, of whose rejected responses this is about.
      alone: of these responses, each on both sides.
      masks: their marked tokens.
      sources: the judge's.
    """
    kinds = [layer_kind(source) for source in sources if head_of(source) is None]
    lifts = []
    for of in (rows, alone):
        weights = weigh(of, kinds, sources)[1::2]
        each = [measures.lift(w_KT, mask) for w_KT, mask in zip(weights, masks, strict=True)]
        lifts.append(np.stack(each))
    found = []
    for k in range(len(kinds)):
        before, after = (lift_NK[:, k] for lift_NK in lifts)

        def kept(drawn, before=before, after=after) -> float:
            return float(after[drawn].sum() / before[drawn].sum())

        ratio = Estimate(kept(slice(None)), *intervals.bootstrap(len(before), kept))
        found.append(Alone(Estimate.of_mean(after), ratio))
    return found
