"""What a model's log-probs say about each pair of a prepared dataset, beside the reference's.

Shapes: B rows, G pairs a row, T response tokens, N figures a pair (those of `fields`).
"""

import contextlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import pair_loss
from attnpo_jax.data.batching import EvalBatches, PairBatch
from attnpo_jax.data.prepared import Prepared
from attnpo_jax.models.decoder import Params
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.parallel.backend import Sharded
from attnpo_jax.runtime import schema
from attnpo_jax.runtime.errors import Preempted, UserError
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.model import SampledModel

_METRICS = {
    f"{weighted}{name}": f"rewards/{weighted}{of}"
    for weighted in ("", "weighted_")
    for name, of in (
        ("chosen_reward", "chosen"),
        ("rejected_reward", "rejected"),
        ("margin", "margins"),
        ("accuracy", "accuracies"),
        ("tie", "ties"),
    )
}
_OF_TOKENS = ("chosen_log_ratio", "rejected_log_ratio", "chosen_kl", "rejected_kl")
FIELDS = (*_METRICS, *_OF_TOKENS)


def fields(dataset: Prepared) -> tuple[str, ...]:
    """Of `FIELDS`, those of a dataset's pairs: means over tokens where it has the reference."""
    return FIELDS if "reference_logps" in dataset.groups else (*_METRICS,)


# What processes tell each other: a pair's row of the dataset, and its figures.
_SCORES = schema.Listed(schema.Row((schema.Whole(), schema.Listed(schema.Maybe(schema.Number())))))


def pair_scores(params: Params, batch: PairBatch, *, settings: StepSettings) -> tuple[jax.Array]:
    """Figures of each pair.

    Args:
      params: the model's.
      batch: rows without a microbatch axis.
      settings: the step's.

    Returns:
      (B, G, N): rewards, margins, accuracies and ties as `pair_loss.pair_losses` gives them, plain
      and weighted; then means over a response's tokens, of r = log pi - log rho, and of
      exp(-r) - 1 + r. Of tokens that pi has drawn the latter estimates KL(pi || rho) without bias,
      and is never negative (Schulman 2020, http://joschu.net/blog/kl-approx.html, "k3"); of the
      tokens at hand, which neither model has drawn, it says how far apart the two are on them.
      Without the reference's log-probs, these means are left out.
    """
    settings = pair_loss.without_losses(settings)
    policy_BG2T, statistics = pair_loss.policy_logps(settings, params, batch)
    _, metrics = pair_loss.losses_of_logps(settings, policy_BG2T, statistics, batch)
    shape = batch.valid_BG.shape
    of_pairs = [metrics[name].reshape(shape) for name in _METRICS.values()]
    if batch.reference_logps_BG2T is None:
        return (jnp.stack(of_pairs, axis=-1),)
    r_BG2T = policy_BG2T - batch.reference_logps_BG2T  # 0 where there is no token
    counts_BG2 = jnp.maximum(1, jnp.sum(batch.mask_BG2T, axis=-1))
    # expm1, since r is near 0 where the model has hardly moved.
    of_tokens = [
        jnp.sum(x, axis=-1)[..., side] / counts_BG2[..., side]
        for x in (r_BG2T, jnp.expm1(-r_BG2T) + r_BG2T)
        for side in (0, 1)
    ]
    return (jnp.stack([*of_pairs, *of_tokens], axis=-1),)


def score(
    sampled: SampledModel,
    settings: StepSettings,
    dataset: Prepared,
    *,
    batch_size: int,
    num_buckets: int,
    bar: bool,
) -> np.ndarray:
    """Figures of all pairs of a dataset.

    Of several processes, each scores its part of the batches, on its own devices; or all score the
    same together, where the model lies on the devices of all.

    Args:
      sampled: the model.
      settings: the step's, for the model.
      dataset: prepared with the reference, and the judge where weights need one.
      batch_size: pairs in a batch.
      num_buckets: shapes that batches may have.
      bar: whether progress is shown.

    Returns:
      float64 (pairs, N), the same in all processes.

    Raises:
      UserError: a log-prob is no number.
      Preempted: SIGTERM or Ctrl-C came.
    """
    batches = EvalBatches(
        dataset,
        batch_size=batch_size,
        num_buckets=num_buckets,
        row_multiple=sampled.backend.row_shards,
    )
    team = processes.team()
    mine = range(len(batches))
    if not sampled.together:
        mine = mine[team.index :: team.count]
    found, stopped = _scores(sampled, settings, batches, mine, bar)
    if preemption.agreed(stopped):
        raise Preempted("told to stop while scoring pairs; the same command starts that anew")
    scores = np.full((len(dataset), len(fields(dataset))), np.nan)
    for part in team.exchange(found, _SCORES):
        for row, values in part:
            scores[row] = [np.nan if value is None else value for value in values]
    (bad,) = np.nonzero(~np.isfinite(scores).all(axis=1))
    if len(bad):
        raise UserError(
            f"{sampled.name}: log-probs of {len(bad)} of {len(scores)} pairs are no numbers (NaN "
            f"or infinite), the first one {dataset[int(bad[0])]['id']}"
        )
    return scores


def _scores(
    sampled: SampledModel,
    settings: StepSettings,
    batches: EvalBatches,
    mine: Sequence[int],
    bar: bool,
) -> tuple[list[list[Any]], bool]:
    """Row and figures of the pairs of some batches; whether it was told to stop before the end."""
    backend: Sharded = sampled.backend
    score_rows = backend.row_pass(pair_scores, (0,), settings=settings)
    found: list[list[Any]] = []
    with contextlib.ExitStack() as stack:
        noticed = stack.enter_context(preemption.watch())
        shown = bar and processes.is_first()
        progress = stack.enter_context(CountProgress("pairs", len(mine), "batches", bar=shown))
        for number in mine:
            # Those that work together must leave off together.
            if preemption.agreed(noticed()) if sampled.together else noticed():
                return found, True
            batch = jax.tree.map(lambda x: x[0], batches[number])
            (values_BGN,) = score_rows(sampled.model.params, batch)
            values = np.asarray(values_BGN, np.float64)[batch.valid_BG]
            for row, of_pair in zip(batch.pair_BG[batch.valid_BG].tolist(), values, strict=True):
                kept = [float(value) if np.isfinite(value) else None for value in of_pair]
                found.append([row, kept])
            progress.add(1)
        return found, noticed()
