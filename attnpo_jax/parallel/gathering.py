"""Arrays that lie on the devices of several processes, whole in the first one's hands, one by one.

The first process asks for one array, or one layer of a stack, after the other; all of them gather
it, and the first one gets it. No host, and no device, ever has more than what was asked for last.
"""

import contextlib
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # the coordination service's key-value store has no public name
from jax.sharding import NamedSharding, PartitionSpec

from attnpo_jax.parallel import processes
from attnpo_jax.parallel.messages import MessageError
from attnpo_jax.runtime.errors import UserError

_FOLDER = "attnpo_jax/gather/"
_DONE, _FAILED = "done", "failed"

_QUESTIONS = itertools.count()


class FirstProcessFailed(UserError, RuntimeError):
    """The first process gave up on what all were gathering for; it says itself why."""


@contextlib.contextmanager
def for_first(tree: Any) -> Iterator[Any]:
    """Lets the first process read a tree of arrays; all processes enter, in step.

    Args:
      tree: a pytree of arrays on a mesh over all processes.

    Yields:
      The tree itself where there is one process. Of several, a tree of stand-ins in the first one:
      they have `shape` and `dtype`, and turn into NumPy arrays whole (`np.asarray(x)`) or a layer
      at a time (`x[3]`). None in the others, which must have nothing to do in the `with` block and
      serve the first one at its end.

    Raises:
      FirstProcessFailed: in the others, when the block of the first one ends with an error.
    """
    if jax.process_count() == 1:
        yield tree
        return
    leaves, structure = jax.tree.flatten(tree)
    if processes.is_first():
        try:
            yield structure.unflatten([_StandIn(i, leaf) for i, leaf in enumerate(leaves)])
        except BaseException:
            _ask(_FAILED)
            raise
        _ask(_DONE)
        return
    yield None
    while (question := _next_question()) != _DONE:
        if question == _FAILED:
            raise FirstProcessFailed("process 0 gave up on what it was writing; it says why")
        index, _, layer = question.partition(" ")
        _gather(leaves[int(index)], int(layer) if layer else None)


class _StandIn:
    def __init__(self, index: int, leaf: jax.Array):
        self.shape, self.dtype, self.ndim = leaf.shape, leaf.dtype, leaf.ndim
        self._index, self._leaf = index, leaf

    def __getitem__(self, layer: int) -> np.ndarray:
        _ask(f"{self._index} {layer}")
        return np.asarray(_gather(self._leaf, layer).addressable_data(0))

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        _ask(f"{self._index}")
        return np.asarray(_gather(self._leaf, None).addressable_data(0), dtype)


def _ask(question: str) -> None:
    # Not by a collective of devices: those may give up while the first process writes to a disk.
    number = next(_QUESTIONS)
    signature = processes.key.sign(f"gather {number}", 0, question.encode()).hex()
    client = distributed.global_state.client
    client.key_value_set(f"{_FOLDER}{number}", f"{signature} {question}")


def _next_question() -> str:
    number = next(_QUESTIONS)
    text = distributed.global_state.client.blocking_key_value_get(
        f"{_FOLDER}{number}", processes.BARRIER_SECONDS * 1000
    )
    signature, _, question = text.partition(" ")
    expected = processes.key.sign(f"gather {number}", 0, question.encode()).hex()
    if signature != expected:
        raise MessageError("a question of process 0 is not signed with the key of this run")
    return question


def _gather(leaf: jax.Array, layer: int | None) -> jax.Array:
    whole = NamedSharding(leaf.sharding.mesh, PartitionSpec())
    if layer is None:
        return _copy(whole)(leaf)
    return _take(whole)(leaf, np.int32(layer))


@functools.cache
def _copy(sharding: NamedSharding):
    return jax.jit(lambda x: x, out_shardings=sharding)


@functools.cache
def _take(sharding: NamedSharding):
    return jax.jit(
        lambda x, layer: jax.lax.dynamic_index_in_dim(x, layer, keepdims=False),
        out_shardings=sharding,
    )
