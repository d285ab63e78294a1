"""The weights that a probe holds against marked spans: of each layer, and those of no attention.

Shapes: R responses (of each pair the chosen one, then the rejected one), S judge sources, K kinds
of weights of a family, T text tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import weighting
from attnpo_jax.data.packing import round_up
from attnpo_jax.data.pair import SIDES
from attnpo_jax.weighting import ResponseTokens, Source

ORDERS = ("mean", "first", "second", "contrast")
DECAY = 0.98  # `weighting.d2po`'s own; what AUC it has does not depend on it
BASELINES = ("uniform", "decay", "surprisal", "diff")
_AT_ONCE = 128  # responses whose attention is padded to one length


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of weights.

    Attributes:
      name: what it is called.
      layer: of the model; None for weights that read no attention.
      heads: of the layer, whose weights' mean it is, each head's scaled to sum 1 before; () for
        the layer's attention, the mean over all of them.
      order, fix_sink: as `weighting.attention` has them; "" and False without attention.
      times_diff: whether tokens weigh 0 that are in the longest common subsequence with the other
        response.
    """

    name: str
    layer: int | None = None
    heads: tuple[int, ...] = ()
    order: str = ""
    fix_sink: bool = False
    times_diff: bool = False

    @property
    def plain(self) -> bool:
        """Whether it is told of first: no attention, or a layer's in both orders with sink fix."""
        return self.layer is None or (self.order == "mean" and self.fix_sink and not self.heads)

    @property
    def sources(self) -> tuple[Source, ...]:
        """What `weighting.layer` names it by."""
        return tuple(f"{self.layer}:{head}" for head in self.heads) or (self.layer,)


def layer_kind(
    layer: int,
    order: str = "mean",
    fix_sink: bool = True,
    times_diff: bool = False,
    heads: tuple[int, ...] = (),
) -> Kind:
    """A layer's kind, or that of some of its heads, with its name."""
    details = [] if not heads else [f"heads {heads[0]}-{heads[-1]}"]
    if len(heads) == 1:
        details = [f"head {heads[0]}"]
    details += [] if order == "mean" else [order]
    details += [] if fix_sink else ["no sink fix"]
    name = f"layer {layer}" + "".join(f", {one}" for one in details)
    return Kind(name + " x diff" * times_diff, layer, heads, order, fix_sink, times_diff)


def head_groups(num_heads: int, num_kv_heads: int) -> tuple[tuple[int, ...], ...]:
    """The heads that share keys and values; none where all of a layer's do.

    >>> head_groups(6, 2), head_groups(4, 1)
    (((0, 1, 2), (3, 4, 5)), ())
    """
    size = num_heads // num_kv_heads
    groups = tuple(tuple(range(k * size, (k + 1) * size)) for k in range(num_kv_heads))
    return groups if len(groups) > 1 else ()


def families(
    layers: Sequence[int], groups: Sequence[tuple[int, ...]] = ()
) -> Iterator[tuple[Kind, ...]]:
    """All kinds; those of a family are computed together.

    Args:
      layers: those that were read.
      groups: heads of each of them, see `head_groups`, as many in one as in another.
    """
    yield tuple(Kind(name) for name in BASELINES)
    yield tuple(layer_kind(layer) for layer in layers)
    yield tuple(layer_kind(layer, fix_sink=False) for layer in layers)
    for order in ORDERS[1:]:
        yield tuple(layer_kind(layer, order) for layer in layers)
    yield tuple(layer_kind(layer, times_diff=True) for layer in layers)
    for order in ORDERS if groups else ():
        yield tuple(layer_kind(layer, order, heads=heads) for layer in layers for heads in groups)


def weigh(
    rows: Sequence[Mapping[str, Any]], family: Sequence[Kind], sources: Sequence[Source]
) -> list[np.ndarray]:
    """Weights (K, T) of each response, float32; a response's sum to its number of text tokens.

    Args:
      rows: of a prepared dataset.
      family: one of `families`.
      sources: the judge's, as the dataset has them.
    """
    first, places = family[0], ()
    if first.layer is not None:
        at = {source: place for place, source in enumerate(sources)}
        places = tuple(tuple(at[source] for source in kind.sources) for kind in family)
    found: list[np.ndarray] = []
    for start in range(0, len(rows), _AT_ONCE // 2):
        some = rows[start : start + _AT_ONCE // 2]
        weights_RKT = _without_rounding(np.asarray(_family(first, places, _responses(some))))
        lengths = [row[f"{side}_text_length"] for row in some for side in SIDES]
        found += [weights_RKT[r, :, :n] for r, n in enumerate(lengths)]
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _family(first: Kind, places: tuple[tuple[int, ...], ...], batch: ResponseTokens) -> jax.Array:
    """The family's weights (B, K, T); `places` of each kind's sources on the axis S."""
    text_BT = batch.text_mask_BT
    if first.layer is None:
        kinds = (
            weighting.uniform(batch),
            weighting.d2po(batch, gamma=DECAY),
            weighting.reference_surprisal(batch),
            weighting.diff(batch),
        )
        return jnp.stack([weighting.to_length(x_BT, text_BT) for x_BT in kinds], axis=1)
    shares_BST = weighting.attention_shares(
        batch.judge_B2ST[:, :, sum(places, ())],
        text_BT,
        fix_sink=first.fix_sink,
        order=first.order,
    )
    shares_BST = shares_BST.reshape(len(text_BT), len(places), -1, text_BT.shape[1]).mean(axis=2)
    if first.times_diff:
        kept_BST = shares_BST * weighting.diff(batch)[:, None]
        each = jax.vmap(weighting.to_length, in_axes=(1, None), out_axes=1)
        return each(kept_BST, text_BT)
    return shares_BST * jnp.sum(text_BT, axis=-1)[:, None, None]


def _without_rounding(x: np.ndarray) -> np.ndarray:
    """To 18 bits, so that weights which only rounding sets apart are ties."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**18), exponent - 18)


def _responses(rows: Sequence[Mapping[str, Any]]) -> ResponseTokens:
    """The rows' responses, text tokens alone, padded to few lengths."""
    texts = [row[f"{side}_ids"][: row[f"{side}_text_length"]] for row in rows for side in SIDES]
    R, T = _AT_ONCE, round_up(max(map(len, texts)))
    S = rows[0]["judge_chosen"].shape[1]
    tokens, partners = (np.full((R, T), -1, np.int32) for _ in range(2))
    judge, logps = np.zeros((R, 2, S, T), np.float32), np.zeros((R, T), np.float32)
    for r, text in enumerate(texts):
        row, side, n = rows[r // 2], SIDES[r % 2], len(text)
        other = texts[r ^ 1]
        tokens[r, :n], partners[r, : len(other)] = text, other
        judge[r, :, :, :n] = row[f"judge_{side}"]
        # Of answers against themselves there are none, and nobody weighs by them.
        logps[r, :n] = row.get(f"ref_{side}_logps", logps[r])[:n]
    return ResponseTokens.of(
        tokens >= 0,
        judge_B2ST=judge,
        reference_logps_BT=logps,
        tokens_BT=tokens,
        partner_tokens_BT=partners,
    )
