"""Attention in parts that need no mask, joined by their log-sum-exps: for kernels such as cuDNN's.

With a mask, such a kernel computes all of a row's square, and reads the mask beside. Of a pair
`[prefix | branch 1 | branch 2]`, three parts are all there is to compute:

- prefix and branch 1, which stand one after the other: causal;
- branch 2 over itself: causal;
- branch 2 over the prefix: all of it.

Branch 2 is in two of them; what its queries get there is weighed by the parts' sums of exponentials
(Dao et al. 2022, arXiv 2205.14135, section 3.1). A shared past is a part of its own. In the
backward pass a part's gradient is what a flash kernel gives for it, were it told the output and the
log-sum-exp of the whole in place of the part's own: with p = exp(score - log-sum-exp), the gradient
of a score is p * (d_out . value - d_out . out), whichever part it is in (algorithm 4 there).

Where a pair's pieces stand is data: every row has its own lengths, and may hold several pairs. A
kernel is told for each row how many queries and how many keys count, from the start of its arrays
on. So what starts elsewhere is first copied to the start of an array of its own. cuDNN could be
told of offsets instead; but not before compute capability 9.0, jax 0.10.2 scales those of keys by
the number of query heads (github.com/jax-ml/jax/pull/39521), and cuDNN before 9.25 gives NaN for
pieces without a token (github.com/NVIDIA/cudnn-frontend/issues/943), of which rows have many.

The g-th longest of pairs that share a row of L tokens has at most L / g of them: with the pairs
sorted by length, arrays for all of them are 1 + 1/2 + ... + 1/G times as long as the row, once for
prefixes with first branches and once for second branches.

Shapes: as in `core`; T queries and S keys of a part, G pairs a row.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from attnpo_jax.models.attention.blocks import RESIDUALS
from attnpo_jax.models.attention.core import MASKED, Past, RowLayout, ScoreRule

# Of a query that a part has nothing for: its probabilities, exp(score - this), are all 0.
_NOBODY = -MASKED

# Kernels work on tiles of as many tokens.
_TILE = 128


@dataclasses.dataclass(frozen=True)
class Part:
    """A kernel for attention without a mask, and its gradient.

    Both take queries (B, T, N, H), keys and values (B, S, K, H), and int32 (B,) each, from 1 on,
    how many queries and how many keys count; with `causal`, query i sees keys 0 to i, else all.
    What they give for queries and keys that do not count may be anything, NaN too.

    Attributes:
      forward: (queries, keys, values, query lengths, key lengths, *, causal, scale) -> outputs
        (B, T, N, H), log-sum-exps of the scores, float32 (B, N, T).
      backward: (the same, outputs, log-sum-exps, gradient of the outputs, *, causal, scale) ->
        gradients of queries, keys and values. The outputs and log-sum-exps need not be those that
        `forward` gave: queries that do not count come with sums that make their probabilities 0.
    """

    forward: Callable[..., tuple[jax.Array, jax.Array]]
    backward: Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


class _Piece(NamedTuple):
    """Tokens of each row that stand together."""

    start_B: jax.Array | None  # None: at the row's start
    count_B: jax.Array


class _Pair(NamedTuple):
    """One pair of each row, in arrays of a length that all of them fit in."""

    length: int
    prefix: _Piece
    first: _Piece  # prefix and branch 1
    second: _Piece  # branch 2


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Pieces:
    """Where the pieces of each row stand: int32 (B, G), the row's longest pair first."""

    start_BG: jax.Array  # the pair's first token
    prefix_BG: jax.Array  # tokens of its prefix,
    first_BG: jax.Array  # of prefix and branch 1 together,
    second_BG: jax.Array  # and of branch 2; all 0 where there is no pair

    @classmethod
    def of(cls, layout: RowLayout) -> "Pieces":
        """Those of rows as `RowLayout` has them; the same for all layers of a model."""
        branch_BL, segment_BL = layout.branch_BL, layout.segment_BL
        pairs = 1 if segment_BL is None else layout.most_segments
        real_BL = branch_BL > 0
        number_BL = jnp.zeros_like(branch_BL)
        if segment_BL is not None:
            before = jnp.where(real_BL, segment_BL, -1)
            before = jnp.pad(before, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
            number_BL = jnp.cumsum(real_BL & (segment_BL != before), axis=1) - 1
        of_pair_BGL = (number_BL[:, None] == jnp.arange(pairs)[:, None]) & real_BL[:, None]
        prefix, first, second = (
            jnp.sum(of_pair_BGL & (branch_BL == code)[:, None], axis=2, dtype=jnp.int32)
            for code in (1, 2, 3)
        )
        start = jnp.argmax(of_pair_BGL, axis=2).astype(jnp.int32)
        order = jnp.argsort(-(prefix + first + second), axis=1)
        fields = (start, prefix, prefix + first, second)
        return cls(*(jnp.take_along_axis(field, order, axis=1) for field in fields))

    def pairs(self, L: int) -> Iterator[_Pair]:
        """The pairs of rows of L tokens, longest first."""
        pairs = self.start_BG.shape[1]
        for g in range(pairs):
            start, prefix, first, second = (
                field[:, g]
                for field in (self.start_BG, self.prefix_BG, self.first_BG, self.second_BG)
            )
            length = min(L, -(-L // (g + 1) // _TILE) * _TILE)
            # The only pair stands where its row does: nothing to copy but branch 2.
            begin = None if pairs == 1 else start
            pieces = _Piece(begin, prefix), _Piece(begin, first), _Piece(start + first, second)
            yield _Pair(length, *pieces)


def serves(layout: RowLayout, rule: ScoreRule, past_length: int = 0) -> bool:
    """Whether attention of such rows comes in parts.

    It does not where a window may hide a part of a prefix, or where nobody knows how many pairs a
    row has at most; nor with a cap on scores.
    """
    longest = past_length + layout.branch_BL.shape[1]
    near = rule.window is None or (isinstance(rule.window, int) and rule.window >= longest)
    counted = layout.segment_BL is None or layout.most_segments is not None
    return near and counted and rule.softcap is None


def attend(
    q_BLNH: jax.Array,
    k_BLKH: jax.Array,
    v_BLKH: jax.Array,
    past: Past | None,
    pieces: Pieces,
    *,
    rule: ScoreRule,
    part: Part,
) -> jax.Array:
    """As `core.attend`, of rows that `serves` is true for; what padding gets is open."""
    H = q_BLNH.shape[-1]
    scale = H**-0.5 if rule.scale is None else rule.scale
    return _attention(q_BLNH, k_BLKH, v_BLKH, past, pieces, float(scale), part)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attention(q_BLNH, k_BLKH, v_BLKH, past, pieces, scale, part):
    return _forward(q_BLNH, k_BLKH, v_BLKH, past, pieces, scale, part)[0]


def _forward(q_BLNH, k_BLKH, v_BLKH, past, pieces, scale, part):
    L = q_BLNH.shape[1]
    alone, over_prefix = [], []  # (out_BTNH, log_sums_BTN) and where they belong
    for pair in pieces.pairs(L):
        first, second = (
            [_cut(x, piece, pair.length) for x in (q_BLNH, k_BLKH, v_BLKH)]
            for piece in (pair.first, pair.second)
        )
        for piece, qkv in ((pair.first, first), (pair.second, second)):
            run = _run(part.forward, piece.count_B, piece.count_B, causal=True, scale=scale)
            alone.append((run(*qkv), piece))
        run = _run(part.forward, pair.second.count_B, pair.prefix.count_B, scale=scale)
        seen = jnp.where(pair.prefix.count_B > 0, pair.second.count_B, 0)
        over_prefix.append((run(second[0], *first[1:]), pair.second._replace(count_B=seen)))
    found = [_in_rows(alone, L), _in_rows(over_prefix, L)]
    real_BLN = found[0][1] > MASKED / 2
    if past is not None:
        B = q_BLNH.shape[0]
        run = _over_past(part.forward, B * L, past, scale)
        out, log_sums_1NT = run(_as_one(q_BLNH), past.keys[None], past.values[None])
        log_sums_BLN = log_sums_1NT[0].T.reshape(real_BLN.shape)
        found.append((out.reshape(q_BLNH.shape), jnp.where(real_BLN, log_sums_BLN, MASKED)))
    out_BLNH, log_sums_BLN = _joined(found)
    out_BLNH = out_BLNH.astype(v_BLKH.dtype)
    log_sums_BLN = jnp.where(real_BLN, log_sums_BLN, _NOBODY)
    out_BLNH, log_sums_BLN = map(checkpoint_name, (out_BLNH, log_sums_BLN), RESIDUALS)
    return out_BLNH, (q_BLNH, k_BLKH, v_BLKH, past, pieces, out_BLNH, log_sums_BLN)


def _backward(scale, part, residuals, d_out_BLNH):
    q_BLNH, k_BLKH, v_BLKH, past, pieces, out_BLNH, log_sums_BLN = residuals
    B, L = q_BLNH.shape[:2]
    d_q, d_k, d_v = [], [], []
    for pair in pieces.pairs(L):
        first, second = (
            [
                _cut(x, piece, pair.length)
                for x in (q_BLNH, k_BLKH, v_BLKH, out_BLNH, log_sums_BLN, d_out_BLNH)
            ]
            for piece in (pair.first, pair.second)
        )
        for piece, (q, k, v, *of_out) in ((pair.first, first), (pair.second, second)):
            run = _run(part.backward, piece.count_B, piece.count_B, causal=True, scale=scale)
            found = run(q, k, v, *_for_backward(piece, *of_out))
            for total, gradient in zip((d_q, d_k, d_v), found, strict=True):
                total.append(_paste(gradient, piece, L))
        run = _run(part.backward, pair.second.count_B, pair.prefix.count_B, scale=scale)
        found = run(second[0], *first[1:3], *_for_backward(pair.second, *second[3:]))
        both = (pair.prefix.count_B > 0) & (pair.second.count_B > 0)
        where = (pair.second, pair.prefix, pair.prefix)
        for total, gradient, piece in zip((d_q, d_k, d_v), found, where, strict=True):
            piece = piece._replace(count_B=jnp.where(both, piece.count_B, 0))
            total.append(_paste(gradient, piece, L))
    d_past = None
    if past is not None:
        run = _over_past(part.backward, B * L, past, scale)
        q, out, log_sums, d_out = map(_as_one, (q_BLNH, out_BLNH, log_sums_BLN, d_out_BLNH))
        of_out = out, log_sums.swapaxes(1, 2), d_out
        found = run(q, past.keys[None], past.values[None], *of_out)
        d_q.append(found[0].reshape(q_BLNH.shape).astype(jnp.float32))
        d_past = Past(found[1][0], found[2][0])
    totals = (sum(d).astype(x.dtype) for d, x in zip((d_q, d_k, d_v), residuals, strict=False))
    return *totals, d_past, None


_attention.defvjp(_forward, _backward)


def _run(function, query_count_B, key_count_B, *, scale: float, causal: bool = False):
    """A part's kernel on rows of which some tokens count; at least one, for cuDNN's sake."""
    lengths = jnp.maximum(query_count_B, 1), jnp.maximum(key_count_B, 1)

    def call(q, k, v, *of_out):
        return function(q, k, v, *lengths, *of_out, causal=causal, scale=scale)

    return call


def _over_past(function, queries: int, past: Past, scale: float):
    """A part's kernel on the queries of all rows as one, over the past that they share."""
    counts = (jnp.full((1,), n, jnp.int32) for n in (queries, past.keys.shape[0]))
    return _run(function, *counts, scale=scale)


def _as_one(x_BL: jax.Array) -> jax.Array:
    """(1, B * L, ...)."""
    return x_BL.reshape(1, -1, *x_BL.shape[2:])


def _for_backward(piece: _Piece, out_BTNH, log_sums_BTN, d_out_BTNH):
    """What a part's gradient needs of the outputs, for queries of the piece alone."""
    inside_BT = jnp.arange(out_BTNH.shape[1]) < piece.count_B[:, None]
    log_sums_BTN = jnp.where(inside_BT[..., None], log_sums_BTN, _NOBODY)
    return out_BTNH, log_sums_BTN.swapaxes(1, 2), d_out_BTNH


def _cut(x_BL: jax.Array, piece: _Piece, length: int) -> jax.Array:
    """(B, length, ...) of x (B, L, ...) from the piece's start on; past the row's end, anything."""
    if piece.start_B is None:
        return x_BL
    places_BT = jnp.minimum(piece.start_B[:, None] + jnp.arange(length), x_BL.shape[1] - 1)
    return jax.vmap(lambda x, places: x[places])(x_BL, places_BT)


def _paste(x_BT: jax.Array, piece: _Piece, L: int, fill: float = 0.0) -> jax.Array:
    """x (B, T, ...) at the piece's place in rows (B, L, ...), float32, and `fill` elsewhere."""
    places_BL = jnp.arange(L)[None]
    if piece.start_B is not None:
        places_BL = places_BL - piece.start_B[:, None]
        within = jnp.clip(places_BL, 0, x_BT.shape[1] - 1)
        x_BT = jax.vmap(lambda x, places: x[places])(x_BT, within)
    inside_BL = (places_BL >= 0) & (places_BL < piece.count_B[:, None])
    inside = inside_BL.reshape(*inside_BL.shape, *(1,) * (x_BT.ndim - 2))
    return jnp.where(inside, x_BT.astype(jnp.float32), fill)


def _in_rows(parts, L: int) -> tuple[jax.Array, jax.Array]:
    """Outputs (B, L, N, H) and log-sum-exps (B, L, N) of parts whose queries are not the same."""
    out_BLNH = sum(_paste(out, piece, L) for (out, _), piece in parts)
    log_sums = [_paste(sums.swapaxes(1, 2), piece, L, MASKED) for (_, sums), piece in parts]
    return out_BLNH, functools.reduce(jnp.maximum, log_sums)


def _joined(found) -> tuple[jax.Array, jax.Array]:
    """Output and log-sum-exps over all parts' keys together."""
    outs, log_sums = zip(*found, strict=True)
    log_sums_BLN = functools.reduce(jnp.logaddexp, log_sums)
    shares = (jnp.exp(sums - log_sums_BLN)[..., None] for sums in log_sums)
    return sum(share * out for share, out in zip(shares, outs, strict=True)), log_sums_BLN
