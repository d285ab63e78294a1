"""A compiled pass over many rows, batch by batch, the devices one batch ahead of who reads.

Both passes of `attnpo prepare`, the judge's and the reference's, run this way.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from attnpo_jax.data.packing import plan_batches


class Batches:
    """Cuts rows into batches of few shapes, which it keeps in mind from one `run` to the next.

    Args:
      row_shards: in how many parts a batch's rows are, see `Backend`.
      token_budget: tokens in a batch, at most (a longer row is a batch of its own).
    """

    def __init__(self, row_shards: int, batch_size: int, token_budget: int):
        self._limits = batch_size, token_budget, row_shards
        self._compiled: set[tuple[int, int]] = set()

    def run(
        self,
        lengths: np.ndarray,
        buckets: Sequence[int],
        start: Callable[[np.ndarray, int, int], Any],
        *groups: np.ndarray,
    ) -> Iterator[tuple[np.ndarray, Any]]:
        """Yields (which rows, their output on the host), while the next batch is under way.

        Args:
          lengths: int (n,), tokens of each row.
          buckets: row lengths to use, see `plan_batches`.
          start: takes which rows, the batch's row length and the number of rows to pad it to;
            returns the output's arrays without waiting for them.
          *groups: which rows may share a batch, one group after the other; none for all.
        """
        waiting = None
        for group in groups or (np.arange(len(lengths)),):
            plan = plan_batches(lengths[group], buckets, *self._limits, compiled=self._compiled)
            for chosen, length, size in plan:
                items = group[chosen]
                started = items, start(items, length, size)
                if waiting is not None:
                    yield waiting[0], jax.device_get(waiting[1])
                waiting = started
        if waiting is not None:
            yield waiting[0], jax.device_get(waiting[1])
