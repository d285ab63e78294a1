"""From token weights and log-probs to losses and metrics, pair by pair: pure functions.

Shapes: P pairs, B = 2P responses (of each pair the chosen one, then the rejected one), T response
tokens.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from attnpo_jax.losses import ResponseScores
from attnpo_jax.weighting import ResponseTokens

Metrics = dict[str, jax.Array]


def pair_losses(
    weigh: Callable[[ResponseTokens], jax.Array],
    objective: Callable[[ResponseScores, ResponseScores], jax.Array],
    policy_BT: jax.Array,
    responses: ResponseTokens,
    valid_P: jax.Array,
    *,
    beta: float,
) -> tuple[jax.Array, Metrics]:
    """TwDPO (Huang et al. 2026): an objective of the weighted sums of both responses' log-probs.

    Args:
      weigh: gives weights (B, T); no gradient goes through them.
      objective: gives losses (P,).
      policy_BT: the policy's log-probs; the loss is differentiable in them.
      responses: the same tokens, with the reference's log-probs, as `weigh` sees them.
      valid_P: bool, false for empty slots.
      beta: scale of the reported rewards.

    Returns:
      loss_P, 0 for empty slots, and a dict of metrics (P,): `unweighted_loss` (what the loss would
      be with uniform weights), and `rewards/*` and `logps/*`, plain and weighted, under the names
      that TRL gives them.
    """
    # The reference is frozen, and a weighting that reads the policy is not differentiated through.
    weights, reference = jax.lax.stop_gradient((weigh(responses), responses.reference_logps_BT))
    mask, T = responses.mask_BT, policy_BT.shape[-1]

    def score(weights, side):
        w, pi, rho, m = (
            x.reshape(-1, 2, T)[:, side] for x in (weights, policy_BT, reference, mask)
        )
        return ResponseScores(
            policy_B=jnp.sum(w * pi, axis=-1),
            reference_B=jnp.sum(w * rho, axis=-1),
            # An objective may divide by these. For empty slots they are 1: a NaN there would get
            # into the gradient, although the slot's loss is left out.
            weight_B=jnp.where(valid_P, jnp.sum(w, axis=-1), 1),
            length_B=jnp.where(valid_P, jnp.sum(m, axis=-1), 1),
        )

    chosen, rejected = score(weights, 0), score(weights, 1)
    loss_P = jnp.where(valid_P, objective(chosen, rejected), 0.0)
    ones = mask.astype(weights.dtype)
    plain = score(ones, 0), score(ones, 1)
    metrics = {
        "unweighted_loss": objective(*plain),
        **_reports(beta, *plain, ""),
        **_reports(beta, chosen, rejected, "weighted_"),
    }
    return loss_P, jax.tree.map(
        lambda x: jnp.where(valid_P, x, 0.0), jax.lax.stop_gradient(metrics)
    )


def _reports(beta: float, chosen: ResponseScores, rejected: ResponseScores, prefix: str) -> Metrics:
    reward_c = beta * (chosen.policy_B - chosen.reference_B)
    reward_r = beta * (rejected.policy_B - rejected.reference_B)
    return {
        f"rewards/{prefix}chosen": reward_c,
        f"rewards/{prefix}rejected": reward_r,
        f"rewards/{prefix}accuracies": (reward_c > reward_r).astype(jnp.float32),
        f"rewards/{prefix}margins": reward_c - reward_r,
        f"logps/{prefix}chosen": chosen.policy_B,
        f"logps/{prefix}rejected": rejected.policy_B,
    }
