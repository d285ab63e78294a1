"""The training and evaluation steps: pure functions of a state and a batch.

Shapes: as in `data.batching`; P pairs (rows times pairs a row), n microbatches.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from attnpo_jax.data.batching import PairBatch
from attnpo_jax.models.decoder import Params
from attnpo_jax.pair_loss import Metrics, StepSettings, batch_losses
from attnpo_jax.parallel.state import TrainState, policy_params


def make_train_step(
    settings: StepSettings,
    optimizer: optax.GradientTransformation,
    schedule: Callable[[jax.Array], jax.Array],
    axis_name: str | None = None,
) -> Callable[[TrainState, PairBatch], tuple[TrainState, Metrics]]:
    """A pure optimizer step over a batch of n microbatches.

    Gradients of the sum of the pairs' losses are accumulated in float32 with `lax.scan`, then
    divided by the number of pairs: the step is the same however the batch is cut. The optimizer
    gets them in float32, whatever the parameters' dtype.

    Args:
      settings: the step's settings.
      optimizer: turns gradients into updates, learning rate included.
      schedule: step -> learning rate, for the report alone.
      axis_name: the `jax.pmap` axis that a batch's rows are spread over, None outside of it.

    Returns:
      `step(state, batch) -> (state, metrics)`. Metrics are means over the pairs, `grad_norm`
      (before clipping), `learning_rate`, the counts `pairs` and `tokens`, and arrays over the
      batch's slots: `pair` (row of the prepared dataset, -1 for empty), `pair_loss`, and
      `log_ratio` (of policy to reference, unweighted: chosen, rejected; without a reference,
      none).
    """

    def loss_sum(trained, base, microbatch, reference):
        policy = policy_params(trained, base)
        loss_P, metrics = batch_losses(settings, policy, microbatch, reference)
        totals = jax.tree.map(jnp.sum, {"loss": loss_P, **metrics})
        by_slot = {"pair_loss": loss_P}
        if microbatch.reference_logps_BG2T is not None:
            policy_P2 = jnp.stack([metrics["logps/chosen"], metrics["logps/rejected"]], axis=-1)
            reference_P2 = jnp.sum(microbatch.reference_logps_BG2T, axis=-1).reshape(-1, 2)
            by_slot["log_ratio"] = policy_P2 - reference_P2
        return totals["loss"], (totals, jax.lax.stop_gradient(by_slot))

    gradient = jax.grad(loss_sum, has_aux=True)

    def train_step(state: TrainState, batch: PairBatch) -> tuple[TrainState, Metrics]:
        def accumulate(grads, microbatch):
            g, reports = gradient(state.params, state.base, microbatch, state.reference)
            return jax.tree.map(jnp.add, grads, g), reports

        if batch.tokens_BL.shape[0] == 1:
            only = jax.tree.map(lambda x: x[0], batch)
            grads, (totals, by_slot) = gradient(state.params, state.base, only, state.reference)
        else:
            zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), state.params)
            grads, (totals, by_slot) = jax.lax.scan(accumulate, zeros, batch)
            totals = jax.tree.map(jnp.sum, totals)
            by_slot = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), by_slot)
        grads = jax.tree.map(lambda g: g.astype(jnp.float32), grads)
        pairs, tokens = jnp.sum(batch.valid_BG), jnp.sum(batch.branch_BL > 0)
        by_slot["pair"] = batch.pair_BG.reshape(-1)
        if axis_name is not None:
            grads, totals, pairs, tokens = jax.lax.psum((grads, totals, pairs, tokens), axis_name)
            by_slot = jax.lax.all_gather(by_slot, axis_name, tiled=True)
        grads = jax.tree.map(lambda g: g / pairs, grads)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        metrics = {
            **jax.tree.map(lambda total: total / pairs, totals),
            "grad_norm": optax.global_norm(grads),
            "learning_rate": jnp.asarray(schedule(state.step), jnp.float32),
            "pairs": pairs,
            "tokens": tokens,
            **by_slot,
        }
        new_state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
        )
        return new_state, metrics

    return train_step


def make_eval_step(settings: StepSettings, axis_name: str | None = None) -> Callable[..., Metrics]:
    """A pure evaluation step: `(params, batch) -> sums` over the batch's pairs.

    The sums carry the names of the training metrics, with `pairs` for the count to divide by.
    `axis_name` is as for `make_train_step`. Where the settings have a reference, a third argument
    is its parameters.
    """

    def eval_step(params: Params, batch: PairBatch, reference: Params | None = None) -> Metrics:
        def sum_up(_, microbatch):
            loss_P, metrics = batch_losses(settings, params, microbatch, reference)
            return None, jax.tree.map(jnp.sum, {"loss": loss_P, **metrics})

        _, totals = jax.lax.scan(sum_up, None, batch)
        sums = {**jax.tree.map(jnp.sum, totals), "pairs": jnp.sum(batch.valid_BG)}
        return sums if axis_name is None else jax.lax.psum(sums, axis_name)

    return eval_step
