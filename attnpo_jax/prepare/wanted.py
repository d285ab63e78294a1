"""What a run reads of a split's prepared dataset: its cache key, and what is kept beside it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from attnpo_jax import config as config_lib
from attnpo_jax.data import column_sets
from attnpo_jax.data.cache_key import cache_key

if TYPE_CHECKING:
    from attnpo_jax.run import Run


def wanted(
    run: "Run",
    split: str,
    pairs_digest: str | None,
    weight_columns: Sequence[str] = (),
    reads: Sequence[str] | None = None,
) -> column_sets.Wanted:
    """All that a run reads of a split.

    Args:
      run: the run.
      split: `train` or `eval`.
      pairs_digest: that of the split's pairs; None leaves it out.
      weight_columns: the precomputed weights that the data have.
      reads: of `data.shards.GROUPS`, what rows are to have; None for what training reads.
    """
    settings = {
        "template": run.template.digest(),
        "max_length": run.config.judge.max_length,
        "max_answer_length": run.config.judge.max_answer_length,
        "verdict": run.config.judge.verdict,
        # Only where it is asked for, so that what was prepared without stays valid.
        **({"whole_responses": True} if run.config.judge.whole_responses else {}),
    }
    reads = tuple(run.reads if reads is None else reads)
    judge = None
    if run.judge is not None and "judge" in reads:
        judge = {
            "judge": {**settings, **run.judge.identity},
            "source_layers": list(run.source_layers),
            "num_layers": run.judge.shape.num_layers,
        }
    return column_sets.Wanted(
        _components(run, split, pairs_digest, weight_columns, settings),
        reads,
        None if run.reference is None else run.reference.identity,
        judge,
        {name: scorer.identity for name, scorer in run.scorers.items()},
    )


def _components(
    run: "Run",
    split: str,
    pairs_digest: str | None,
    weight_columns: Sequence[str],
    judge: dict[str, Any],
) -> dict[str, Any]:
    """The cache key of the dataset itself, which knows nothing of another judge."""
    config = run.config
    return cache_key(
        model={
            "weights": run.weights_digest,
            "config": run.model.facts(),
            "dtype": config.model.dtype,
            "param_dtype": config.model.param_dtype,
            "prepare_weights": config.model.prepare_weights,
        },
        tokenizer=run.tokenizer_digest,
        judge=judge,
        sources=config.data[split],
        pairs_digest=pairs_digest,
        columns=run.columns,
        lengths={
            "max_length": config.data.max_length,
            "max_prompt_length": config.data.max_prompt_length,
        },
        form=config_lib.trained_form(config).changes(),
        source_layers=run.source_layers if run.judge is None else (),
        num_layers=run.model.num_layers,
        weight_columns=weight_columns,
        weights_tokenizer=config.data.weights_tokenizer,
    )
