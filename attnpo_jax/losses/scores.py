"""What an objective reads of a pair: the two responses' scores.

Shape suffixes: B pairs.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from attnpo_jax.registry import NotComputed


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseScores:
    """Sums over the tokens of B responses, w the token weights.

    Of the reference, an objective that declares itself free of it has a `NotComputed` each.

    Attributes:
      policy_B: float, sum of w times the policy's log-probabilities.
      reference_B: float, sum of w times the reference's log-probabilities.
      weight_B: float, sum of w.
      length_B: number of tokens of the response, closing template tokens included.
      policy_sum_B: float, sum of the policy's log-probabilities, every token counted once. Left
        out, it is `policy_B`: that of weights of 1.
      reference_sum_B: float, the same of the reference.
      collision_sum_B: float, sum over the tokens of log sum_v p_v^2, p the policy's distribution
        over the vocabulary; None unless the objective declares that it needs `policy_collision`.
      kl_B: float, sum over the tokens, every token counted once, of KL(reference || policy) of the
        distributions over the vocabulary; None unless the objective declares that it needs
        `reference_kl`. No gradient flows to the reference.
      margin_B: float, of the chosen response's scores: what the pair's logits are to exceed, as the
        data have it; None for no margins.
    """

    policy_B: jax.Array
    reference_B: jax.Array
    weight_B: jax.Array
    length_B: jax.Array
    policy_sum_B: jax.Array | None = None
    reference_sum_B: jax.Array | None = None
    collision_sum_B: jax.Array | None = None
    kl_B: jax.Array | None = None
    margin_B: jax.Array | None = None

    def __post_init__(self):
        for name in ("policy", "reference"):
            if getattr(self, f"{name}_sum_B") is None:
                object.__setattr__(self, f"{name}_sum_B", getattr(self, f"{name}_B"))

    @property
    def log_ratio_B(self) -> jax.Array:
        """Weighted log-ratio s(y) of policy to reference, (B,); the reference gets no gradient."""
        return self.policy_B - jax.lax.stop_gradient(self.reference_B)

    def per_weight(self, total_B: jax.Array) -> jax.Array:
        """A weighted sum (B,) divided by the total weight: the mean over the tokens.

        A response whose weights are all 0 has the sum 0, and the mean 0.
        """
        return total_B / jnp.where(self.weight_B > 0, self.weight_B, 1.0)

    @property
    def negative_log_likelihood_B(self) -> jax.Array:
        """Mean over the tokens of -log p under the policy, every token counted once, (B,)."""
        return -self.policy_sum_B / jnp.maximum(self.length_B, 1)


def beyond_margin(logits_B: jax.Array, chosen: ResponseScores) -> jax.Array:
    """A pair's logits (B,) less its margin, where the data have margins.

    "Direct Preference Optimization with an Offset" (https://arxiv.org/abs/2402.10571), whose
    offsets are the margins.
    """
    return logits_B if chosen.margin_B is None else logits_B - chosen.margin_B


_FLOATS = ("policy_B", "reference_B", "policy_sum_B", "reference_sum_B")


def check(chosen: ResponseScores, rejected: ResponseScores, *needed: str) -> None:
    """Checks that all fields of both are float (B,) where they have to be.

    Args:
      needed: names of optional fields that have to be there.

    Raises:
      AssertionError: a field has another shape or type; the message names it.
      ValueError: a needed field is missing.
    """
    chex.assert_rank(chosen.policy_B, 1, custom_message="chosen.policy_B")
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        for field in dataclasses.fields(scores):
            name = f"{side}.{field.name}"
            value = getattr(scores, field.name)
            if value is None or isinstance(value, NotComputed):
                if field.name in needed:
                    raise ValueError(f"{name} is None; this objective needs it")
                continue
            chex.assert_shape(value, chosen.policy_B.shape, custom_message=name)
            if field.name in _FLOATS:
                chex.assert_type(value, float, custom_message=name)
