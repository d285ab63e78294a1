"""The reference pass: log-probs of all response tokens under the model that training starts from.

Shapes: as in `data.batching`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import config_dict

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.packing import choose_buckets, plan_batches, round_up
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import scoring
from attnpo_jax.models.decoder import ModelConfig
from attnpo_jax.parallel import backend as backends


def compile_pass(
    config: config_dict.ConfigDict, model: ModelConfig, backend: backends.Backend, attention: str
) -> Callable:
    """The reference's pass over a batch, as `Backend.row_pass` returns it.

    It takes parameters and a `PairBatch` without a microbatch axis, and returns (log-probs,).
    """
    score = functools.partial(
        scoring.response_logps,
        model,
        dtype=jnp.dtype(config.model.dtype),
        attention=attention,
        chunk=config.model.logps_chunk,
    )
    return backend.row_pass(lambda params, batch: (score(params, batch),), out_axes=(0,))


class Reference:
    """The reference's log-probs, in batches of few shapes chosen from a sample.

    Args:
      config: the run's config.
      model: the reference.
      backend: where to run; the model's parameters lie as it says.
      attention: one of `models.attention.implementations.IMPLEMENTATIONS`.
      sample: pairs like those to come, at least one.
    """

    def __init__(
        self,
        config,
        model: LanguageModel,
        backend: backends.Backend,
        attention: str,
        sample: Sequence[TokenizedPair],
    ):
        self._model = model
        self._row_shards = backend.row_shards
        self._batch_size = config.judge.batch_size
        self._token_budget = config.judge.token_budget
        examples = [_example(i, pair) for i, pair in enumerate(sample)]
        lengths = np.array([e.row_length for e in examples])
        self._shapes = {
            length: RowShape(
                length,
                round_up(max(e.scored_length for e in examples if e.row_length <= length)),
                round_up(max(_longest(e) for e in examples if e.row_length <= length)),
            )
            for length in choose_buckets(lengths, config.judge.num_buckets)
        }
        self._compiled: set[tuple[int, int]] = set()
        self._logps = compile_pass(config, model.config, backend, attention)

    def run(
        self, tokenized: Sequence[TokenizedPair]
    ) -> Iterator[list[tuple[int, tuple[np.ndarray, np.ndarray]]]]:
        """Yields, batch by batch, (place, (chosen's log-probs, rejected's)) lists."""
        examples = [_example(i, pair) for i, pair in enumerate(tokenized)]
        lengths = np.array([e.row_length for e in examples])
        waiting = None
        for items, length, size in plan_batches(
            lengths,
            tuple(self._shapes),
            self._batch_size,
            self._token_budget,
            row_multiple=self._row_shards,
            compiled=self._compiled,
        ):
            batch = [examples[i] for i in items]
            shape = self._shapes.get(length)
            if shape is None or any(
                e.scored_length > shape.scored or _longest(e) > shape.response for e in batch
            ):
                # Not like anything in the sample: the roomiest shape of this length.
                shape = RowShape(length, length, length)
            rows = [[e] for e in batch] + [[]] * (size - len(batch))
            (output,) = self._logps(self._model.params, fill_rows(rows, shape, num_sources=0))
            if waiting is not None:
                yield _read_logps(*waiting)
            waiting = batch, output
        if waiting is not None:
            yield _read_logps(*waiting)


def _example(index: int, pair: TokenizedPair) -> Example:
    return Example(
        index,
        pair.prompt_ids,
        (pair.chosen_ids, pair.rejected_ids),
        (pair.chosen_text_length, pair.rejected_text_length),
    )


def _longest(example: Example) -> int:
    return max(len(ids) for ids in example.response_ids)


def _read_logps(batch: Sequence[Example], output: jax.Array):
    logps_BG2T = jax.device_get(output)
    return [
        (e.index, tuple(logps_BG2T[b, 0, r, : len(ids)] for r, ids in enumerate(e.response_ids)))
        for b, e in enumerate(batch)
    ]
