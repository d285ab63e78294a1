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
_AT_ONCE = 128  # responses of a batch


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
    first = family[0]
    at = {source: place for place, source in enumerate(sources)}
    places = [at[s] for kind in family for s in kind.sources if kind.layer is not None]
    # All batches have one shape: less is compiled than padding costs.
    length = round_up(max(row[f"{side}_text_length"] for row in rows for side in SIDES))
    found: list[np.ndarray] = []
    for start in range(0, len(rows), _AT_ONCE // 2):
        some = rows[start : start + _AT_ONCE // 2]
        responses = _responses(some, places, length)
        if first.layer is None:
            weights_RKT = _baselines(responses)
        else:
            weights_RKT = _of_attention(
                responses, len(family), first.order, first.fix_sink, first.times_diff
            )
        weights_RKT = _without_rounding(np.asarray(weights_RKT))
        lengths = [row[f"{side}_text_length"] for row in some for side in SIDES]
        found += [weights_RKT[r, :, :n] for r, n in enumerate(lengths)]
    return found


@jax.jit
def _baselines(responses: ResponseTokens) -> jax.Array:
    """Weights (R, K, T) by the `BASELINES`."""
    kinds = (
        weighting.uniform(responses),
        weighting.d2po(responses, gamma=DECAY),
        weighting.reference_surprisal(responses),
        weighting.diff(responses),
    )
    return jnp.stack([weighting.to_length(x, responses.text_mask_BT) for x in kinds], axis=1)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _of_attention(
    responses: ResponseTokens, kinds: int, order: str, fix_sink: bool, times_diff: bool
) -> jax.Array:
    """Weights (R, K, T) of so many kinds, each the mean of as many sources, one after the other."""
    text_RT = responses.text_mask_BT
    shares_RST = weighting.attention_shares(
        responses.judge_B2ST, text_RT, fix_sink=fix_sink, order=order
    )
    shares_RKT = shares_RST.reshape(len(text_RT), kinds, -1, text_RT.shape[1]).mean(axis=2)
    if times_diff:
        kept_RKT = shares_RKT * weighting.diff(responses)[:, None]
        each = jax.vmap(weighting.to_length, in_axes=(1, None), out_axes=1)
        return each(kept_RKT, text_RT)
    return shares_RKT * jnp.sum(text_RT, axis=-1)[:, None, None]


def _without_rounding(x: np.ndarray) -> np.ndarray:
    """To 18 bits, so that weights which only rounding sets apart are ties."""
    mantissa, exponent = np.frexp(x)
    return np.ldexp(np.round(mantissa * 2**18), exponent - 18)


def _responses(
    rows: Sequence[Mapping[str, Any]], places: Sequence[int], length: int
) -> ResponseTokens:
    """The rows' responses, text tokens alone, with some of the judge's sources."""
    texts = [row[f"{side}_ids"][: row[f"{side}_text_length"]] for row in rows for side in SIDES]
    R, S, T = _AT_ONCE, len(places), length
    tokens, partners = (np.full((R, T), -1, np.int32) for _ in range(2))
    judge, logps = np.zeros((R, 2, S, T), np.float32), np.zeros((R, T), np.float32)
    for r, text in enumerate(texts):
        row, side, n = rows[r // 2], SIDES[r % 2], len(text)
        other = texts[r ^ 1]
        tokens[r, :n], partners[r, : len(other)] = text, other
        judge[r, :, :, :n] = row[f"judge_{side}"][:, places]
        # Of answers against themselves there are none, and nobody weighs by them.
        logps[r, :n] = row.get(f"ref_{side}_logps", logps[r])[:n]
    return ResponseTokens.of(
        tokens >= 0,
        judge_B2ST=judge,
        reference_logps_BT=logps,
        tokens_BT=tokens,
        partner_tokens_BT=partners,
    )
