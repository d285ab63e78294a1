"""The reference pass: log-probs of all response tokens under the model that training starts from.

Shapes: as in `data.batching`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.packing import choose_buckets, round_up
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import scoring
from attnpo_jax.models.decoder import ModelConfig
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.batches import Batches


def compile_pass(
    backend: backends.Backend, *, config: ModelConfig, dtype, chunk: int, attention: str
) -> Callable:
    """The reference's pass over a batch, as `Backend.row_pass` returns it.

    It takes parameters and a `PairBatch` without a microbatch axis, and returns (log-probs,).
    """
    score = functools.partial(
        scoring.response_logps,
        config,
        dtype=jnp.dtype(dtype),
        attention=attention,
        chunk=chunk,
    )
    return backend.row_pass(lambda params, batch: (score(params, batch),), out_axes=(0,))


class Reference:
    """The reference's log-probs, in batches of few shapes chosen from a sample.

    Args:
      model: the reference.
      sample: pairs like those to come, at least one.
      dtype: what activations are computed in.
      chunk: tokens whose logits exist at a time.
      batch_size: rows in a batch, at most.
      token_budget: tokens in a batch, at most (a longer row is a batch of its own).
      num_buckets: row lengths that are compiled for the sample.
      backend: where to run; the model's parameters lie as it says.
      attention: one of `models.attention.implementations.IMPLEMENTATIONS`.
    """

    def __init__(
        self,
        model: LanguageModel,
        sample: Sequence[TokenizedPair],
        *,
        dtype,
        chunk: int,
        batch_size: int,
        token_budget: int,
        num_buckets: int,
        backend: backends.Backend,
        attention: str,
    ):
        self._model = model
        self._batches = Batches(backend.row_shards, batch_size, token_budget)
        examples = [_example(i, pair) for i, pair in enumerate(sample)]
        lengths = np.array([e.row_length for e in examples])
        self._shapes = {
            length: RowShape(
                length,
                round_up(max(e.scored_length for e in examples if e.row_length <= length)),
                round_up(max(_longest(e) for e in examples if e.row_length <= length)),
            )
            for length in choose_buckets(lengths, num_buckets)
        }
        self._logps = compile_pass(
            backend, config=model.config, dtype=dtype, chunk=chunk, attention=attention
        )

    def run(
        self, tokenized: Sequence[TokenizedPair]
    ) -> Iterator[list[tuple[int, tuple[np.ndarray, np.ndarray]]]]:
        """Yields, batch by batch, (place, (chosen's log-probs, rejected's)) lists."""
        examples = [_example(i, pair) for i, pair in enumerate(tokenized)]

        def start(items: np.ndarray, length: int, size: int):
            batch = [examples[i] for i in items]
            shape = self._shapes.get(length)
            if shape is None or any(
                e.scored_length > shape.scored or _longest(e) > shape.response for e in batch
            ):
                # Not like anything in the sample: the roomiest shape of this length.
                shape = RowShape(length, length, length)
            rows = [[e] for e in batch] + [[]] * (size - len(batch))
            return self._logps(self._model.params, fill_rows(rows, shape, num_sources=0))

        lengths = np.array([e.row_length for e in examples], int)
        for items, (logps_BG2T,) in self._batches.run(lengths, tuple(self._shapes), start):
            done = []
            for b, i in enumerate(items.tolist()):
                chosen, rejected = (len(ids) for ids in examples[i].response_ids)
                chosen_logps, rejected_logps = logps_BG2T[b, 0]
                done.append((i, (chosen_logps[:chosen], rejected_logps[:rejected])))
            yield done


def _example(index: int, pair: TokenizedPair) -> Example:
    return Example(
        index,
        pair.prompt_ids,
        (pair.chosen_ids, pair.rejected_ids),
        (pair.chosen_text_length, pair.rejected_text_length),
        rejected_prompt_ids=pair.rejected_prompt_ids,
    )


def _longest(example: Example) -> int:
    return max(len(ids) for ids in example.response_ids)
