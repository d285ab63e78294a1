"""Which mesh axis splits what: the one table, and the constraints that the model's passes apply.

The mesh has three axes. `data` holds copies of the model, `fsdp` splits parameters and optimizer
state, and both split the rows of a batch; `tensor` splits heads, feed-forward and vocabulary.

The functions here say where an intermediate result lies. They act on the mesh that
`jax.set_mesh` has made current; without one (a single device, or `jax.pmap`) they do nothing.

Shapes: B rows, L row length, M scored tokens a row, D width, V vocabulary.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec

AXES = ("data", "fsdp", "tensor")

# Logical axis of a parameter (see `models.decoder.logical_axes`) -> the mesh axis that splits it.
RULES: dict[str, str | None] = {
    "layer": None,  # scanned over
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,  # small
    "rank": None,  # of adapters: small too
}

# The mesh axes that split the rows of a batch.
ROWS = ("data", "fsdp")

# How a batch's arrays are split: rows first, then heads on axis 2.
WHOLE = PartitionSpec()
BY_ROWS = PartitionSpec(ROWS)
BY_HEADS = PartitionSpec(None, "tensor")
BY_ROWS_AND_HEADS = PartitionSpec(ROWS, None, "tensor")


def parameter_spec(
    axes: Sequence[str], shape: Sequence[int], sizes: Mapping[str, int]
) -> PartitionSpec:
    """How a parameter is split.

    A vocabulary that its mesh axis does not divide stays whole; other lengths must be divisible
    (see `mesh.check_model`).
    """
    entries = []
    for axis, length in zip(axes, shape, strict=True):
        if axis not in RULES:
            raise ValueError(f"no rule for the logical axis {axis!r}; known: {', '.join(RULES)}")
        split = RULES[axis]
        if axis == "vocab" and split is not None and length % sizes[split]:
            split = None
        entries.append(split)
    return PartitionSpec(*entries)


def gather(weight: jax.Array, axes: Sequence[str]) -> jax.Array:
    """One layer's weight, whole over `fsdp`, for use; its gradient is reduced back to the parts.

    Left to itself, the partitioner may gather the batch's activations instead. The weight comes in
    the dtype it is used in, so that no more than that travels.
    """
    sizes = _sizes()
    if sizes.get("fsdp", 1) == 1:
        return weight
    parts = parameter_spec(axes, weight.shape, sizes)
    whole = PartitionSpec(*(None if entry == "fsdp" else entry for entry in parts))
    if whole == parts:
        return weight
    return _move(weight, parts, whole)


def checkpoint_policy(policy):
    """A policy for `jax.checkpoint` under which gathered weights are not kept; None for none."""
    if policy is not None or _sizes().get("fsdp", 1) == 1:
        return policy
    # A constraint's result is its operand in another place: it can always be had again.
    return lambda primitive, *_, **__: primitive.name != "sharding_constraint"


def kept(x: jax.Array, name: str) -> jax.Array:
    """x, which the backward pass may keep by name; for functions that have a gradient of their own.

    bfloat16 is kept as words of 16 bits. XLA's CPU code moves those as they are; to put one layer's
    bfloat16 among all layers' it would rewrite them all, as float32 and back.
    """
    if x.dtype != jnp.bfloat16:
        return checkpoint_name(x, name)
    words = checkpoint_name(jax.lax.bitcast_convert_type(x, jnp.uint16), name)
    return jax.lax.bitcast_convert_type(words, jnp.bfloat16)


def by_rows(x: jax.Array) -> jax.Array:
    """Activations (B, ...), split by rows and not otherwise."""
    if not _splits_rows(x):
        return x
    return _constrain(x, BY_ROWS)


def per_device(
    function: Callable[..., Any], inputs: Sequence[Any], output: Any, *, rows: int
) -> Callable[..., Any]:
    """Runs a function on each device's own rows and heads: for kernels, which nobody partitions.

    Args:
      inputs: how each argument is split: `WHOLE`, `BY_ROWS`, ..., or a pytree of those.
      rows: of the batch; where the mesh does not divide them, each device takes all.
    """
    if not _sizes():
        return function
    if rows % row_shards():
        inputs, output = jax.tree.map(
            lambda spec: PartitionSpec(*(None if entry == ROWS else entry for entry in spec)),
            (tuple(inputs), output),
            is_leaf=lambda x: isinstance(x, PartitionSpec),
        )
    # Kernels do not say along which axes their results vary.
    return jax.shard_map(function, in_specs=tuple(inputs), out_specs=output, check_vma=False)


def lookup(table_VD: jax.Array, tokens_BL: jax.Array, dtype) -> jax.Array:
    """The rows of an embedding table for tokens: (B, L, D) of `dtype`, split by rows.

    Every device looks all of its group's tokens up in its columns; then columns are exchanged for
    rows. The table stays where it is, and so does its gradient.
    """
    if not _splits_rows(tokens_BL):
        return table_VD[tokens_BL].astype(dtype)
    if _sizes()["fsdp"] == 1:
        return by_rows(table_VD[tokens_BL].astype(dtype))
    columns, rows = PartitionSpec("data", None, "fsdp"), PartitionSpec(ROWS)
    tokens_BL = _constrain(tokens_BL, PartitionSpec("data"))
    return _move(table_VD[tokens_BL].astype(dtype), columns, rows)


def over_vocabulary(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Runs a function of scored tokens with the vocabulary split over all devices of a model copy.

    Each device then has the logits of its part of the vocabulary for the tokens of its group, which
    the function takes few at a time; gathering the matrix would take gigabytes. Its gradient is
    summed over `data` once, after the last token.

    The function is `(hidden_BMD, unembedding_VD, target_BM, vocabulary) -> (B, M)`, and takes from
    its last argument, a `Vocabulary`, what depends on all of it; the result takes the other three.
    The first two may be trees of arrays, of several models with one vocabulary.
    """

    def call(hidden_BMD, unembedding_VD, target_BM):
        sizes = _sizes()
        parts = math.prod(sizes.get(axis, 1) for axis in _VOCABULARY)
        if not _splits_rows(target_BM):
            return function(hidden_BMD, unembedding_VD, target_BM, Vocabulary())
        V = jax.tree.leaves(unembedding_VD)[0].shape[0]
        padded = jax.tree.map(lambda x: jnp.pad(x, ((0, -V % parts), (0, 0))), unembedding_VD)

        def local(hidden, unembedding, target):
            # Made to vary here and not at its use, so that gradients are summed after the loop.
            unembedding = jax.tree.map(
                lambda x: jax.lax.pcast(x, "data", to="varying"), unembedding
            )
            place = jax.lax.axis_index(_VOCABULARY)
            vocabulary = _Part(V, place * jax.tree.leaves(unembedding)[0].shape[0])
            return function(hidden, unembedding, target, vocabulary)

        rows = PartitionSpec(ROWS)
        return jax.shard_map(
            local, in_specs=(rows, PartitionSpec(_VOCABULARY), rows), out_specs=rows
        )(hidden_BMD, padded, target_BM)

    return call


# In this order, a device's part of the vocabulary lies within the one that it stores.
_VOCABULARY = ("tensor", "fsdp")


class Vocabulary:
    """The whole vocabulary on this device."""

    def rows_of_group(self, x: jax.Array) -> jax.Array:
        """Rows (B, ...) of all devices that share one copy of the model."""
        return x

    def own_rows(self, x: jax.Array) -> jax.Array:
        """This device's rows of `rows_of_group`."""
        return x

    def length(self, unembedding_VD: jax.Array) -> jax.Array:
        """How many of this device's words there are; the rest of its part is padding."""
        return jnp.asarray(unembedding_VD.shape[0])

    def place(self, target_BM: jax.Array) -> jax.Array:
        """Where in this device's part the targets are; outside of it where they are not."""
        return target_BM

    @staticmethod
    def constant(x: jax.Array) -> jax.Array:
        """A constant that a loop over this part's words can start with."""
        return x

    def total(self, x_BM: jax.Array) -> jax.Array:
        """The sum (B, M) of all parts' values."""
        return x_BM

    def log_probs(self, picked_BM: jax.Array, log_sum_BM: jax.Array) -> jax.Array:
        """Log-probs (B, M) from this part's logit of the target, or 0, and its log-sum-exp."""
        return picked_BM - log_sum_BM


class _Part(Vocabulary):
    """This device's part of a vocabulary of `size` tokens, from token `first` on."""

    def __init__(self, size: int, first: jax.Array):
        self._size, self._first = size, first

    def rows_of_group(self, x):
        # What devices do with them differs: the transpose sums it up.
        x = jax.lax.all_gather(x, "fsdp", axis=0, tiled=True)
        return jax.lax.pcast(x, "tensor", to="varying")

    def own_rows(self, x):
        B = x.shape[0] // jax.lax.axis_size("fsdp")
        return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("fsdp") * B, B)

    def length(self, unembedding_VD):
        length = jnp.clip(self._size - self._first, 0, unembedding_VD.shape[0])
        return jax.lax.pcast(length, "data", to="varying")

    def place(self, target_BM):
        return target_BM - self._first

    @staticmethod
    def constant(x):
        return jax.lax.pcast(x, AXES, to="varying")

    def total(self, x_BM):
        return jax.lax.psum(x_BM, _VOCABULARY)

    def log_probs(self, picked_BM, log_sum_BM):
        highest = jax.lax.pmax(jax.lax.stop_gradient(log_sum_BM), _VOCABULARY)
        total = jax.lax.psum(jnp.exp(log_sum_BM - highest), _VOCABULARY)
        return jax.lax.psum(picked_BM, _VOCABULARY) - highest - jnp.log(total)


def split_logits(hidden_BMD: jax.Array, unembedding_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Both factors of a few tokens' logits, placed so that the vocabulary stays split."""
    if not _splits_rows(hidden_BMD) or _sizes()["fsdp"] == 1:
        return hidden_BMD, unembedding_VD
    return (
        _constrain(hidden_BMD, PartitionSpec("data")),
        _constrain(unembedding_VD, PartitionSpec(_VOCABULARY)),
    )


def whole_logits(logits_BMV: jax.Array) -> jax.Array:
    """The logits of `split_logits`, by rows, with all words of a row in one place.

    Said first that they are split as the vocabulary is, so that they are what travels, and not the
    unembedding.
    """
    if not _splits_rows(logits_BMV):
        return logits_BMV
    return by_rows(_constrain(logits_BMV, PartitionSpec("data", None, _VOCABULARY)))


def row_shards() -> int:
    """How many parts the rows of a batch are in, on the current mesh."""
    return math.prod(_sizes().get(axis, 1) for axis in ROWS)


def first_row(count: int) -> jax.Array | int:
    """Within `per_device`: where this device's rows begin, of which each device has `count`."""
    return jax.lax.axis_index(ROWS) * count if _sizes() else 0


_constrain = jax.lax.with_sharding_constraint


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _move(x, source: PartitionSpec, target: PartitionSpec):
    """x from one placement to another; its cotangent the other way.

    The transpose of a plain constraint keeps the cotangent at the target, whole on every device.
    """
    return _constrain(_constrain(x, source), target)


def _move_forward(x, source, target):
    # Not through `_move`: a rematerialisation policy sees the constraints themselves only.
    return _constrain(_constrain(x, source), target), None


def _move_backward(source, target, _, cotangent):
    del target
    return (_constrain(cotangent, source),)


_move.defvjp(_move_forward, _move_backward)


def _sizes() -> Mapping[str, int]:
    """Sizes of the current mesh's axes; empty for a single device, or a mesh not of ours."""
    mesh = jax.sharding.get_abstract_mesh()
    ours = not mesh.empty and set(mesh.axis_names) == set(AXES) and mesh.size > 1
    return dict(mesh.shape) if ours else {}


def _splits_rows(x: jax.Array) -> bool:
    shards = row_shards()
    return bool(_sizes()) and x.shape[0] % shards == 0
