"""The reference pass: log-probs of all response tokens under the reference, and their entropies.

Shapes: as in `data.batching`.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax.data.batching import Example, RowShape, fill_rows
from attnpo_jax.data.packing import choose_buckets, round_up
from attnpo_jax.data.pair import SIDES
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.data.tokenizer_files import load_backend
from attnpo_jax.judge.language_model import LanguageModel
from attnpo_jax.models import scoring
from attnpo_jax.models.decoder import ModelConfig
from attnpo_jax.models.io.model_source import ModelSource
from attnpo_jax.parallel import backend as backends
from attnpo_jax.parallel.batches import Batches
from attnpo_jax.runtime.errors import UserError

if TYPE_CHECKING:
    from attnpo_jax.prepare.stage import _Passes
    from attnpo_jax.run import Run


def compile_pass(
    backend: backends.Backend,
    *,
    config: ModelConfig,
    dtype,
    chunk: int,
    attention: str,
    entropy: bool = False,
) -> Callable:
    """The reference's pass over a batch, as `Backend.row_pass` returns it.

    It takes parameters and a `PairBatch` without a microbatch axis, and returns (log-probs,), or
    with `entropy` (log-probs, entropies), each (B, G, 2, T).
    """
    statistics = ("entropy",) if entropy else ()
    return backend.row_pass(
        _score_rows,
        out_axes=(0,) * (1 + len(statistics)),
        config=config,
        statistics=statistics,
        dtype=jnp.dtype(dtype),
        attention=attention,
        chunk=chunk,
    )


def _score_rows(
    params: Any, batch: Any, *, config: ModelConfig, statistics: tuple[str, ...], **options: Any
) -> tuple[jax.Array, ...]:
    logps, found = scoring.response_scores(config, params, batch, statistics=statistics, **options)
    return (logps, *(found[name] for name in statistics))


class Reference:
    """The reference's log-probs, in batches of few shapes chosen from a sample.

    Args:
      model: the reference.
      sample: pairs like those to come, at least one.
      entropy: whether the entropies of the tokens' distributions are wanted too.
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
        entropy: bool = False,
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
            backend,
            config=model.config,
            dtype=dtype,
            chunk=chunk,
            attention=attention,
            entropy=entropy,
        )

    def run(
        self, tokenized: Sequence[TokenizedPair]
    ) -> Iterator[list[tuple[int, dict[str, np.ndarray]]]]:
        """Yields, batch by batch, lists of places and the columns of the pair there."""
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
        for items, found in self._batches.run(lengths, tuple(self._shapes), start):
            done = []
            for b, i in enumerate(items.tolist()):
                columns = {}
                for name, values_BG2T in zip(("logps", "entropy"), found, strict=False):
                    for r, side in enumerate(SIDES):
                        length = len(examples[i].response_ids[r])
                        columns[f"ref_{side}_{name}"] = values_BG2T[b, 0, r, :length]
                done.append((i, columns))
            yield done


def fitted(
    run: "Run", passes: "_Passes", groups: Collection[str], sample: Sequence[TokenizedPair]
) -> Reference:
    """The reference of a run, or a scorer, fitted to a sample of what it reads.

    Args:
      passes: what it runs on.
      groups: of `data.shards.GROUPS`, what is wanted.
    """
    config = run.config
    return Reference(
        passes.model,
        sample,
        entropy="reference_entropy" in groups,
        dtype=jnp.dtype(config.model.dtype),
        chunk=config.model.logps_chunk,
        batch_size=config.judge.batch_size,
        token_budget=config.judge.token_budget,
        num_buckets=config.judge.num_buckets,
        backend=passes.backend,
        attention=passes.attention,
    )


def check_vocabulary(run: "Run", reference: ModelSource) -> None:
    """Checks that the run's reference reads the ids that its tokenizer gives.

    Raises:
      UserError: a token of the run's tokenizer has another id in the reference's, or none.
    """
    own = run.tokenizer.tokenizer.get_vocab()
    theirs = load_backend(str(reference.folder)).get_vocab()
    others = sorted((id, token) for token, id in own.items() if theirs.get(token) != id)
    if others:
        id, token = others[0]
        there = f"the id {theirs[token]}" if token in theirs else "no id"
        raise UserError(
            f"config.reference.source = {reference.source!r}: its tokenizer has {there} for the "
            f"token {token!r}, which is {id} in that of config.model.source, and {len(others)} of "
            f"{len(own)} tokens differ; accepted: a model with the same vocabulary"
        )


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
