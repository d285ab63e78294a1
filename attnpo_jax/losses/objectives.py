"""Objectives: what is done with the weighted log-ratios of a pair.

An objective is a pure function `(chosen: ResponseScores, rejected: ResponseScores,
**hyperparameters) -> loss_B`, one loss a pair; whoever calls averages. It works under jit, grad,
vmap, pmap and shard_map. Add one with a decorator, here or in a file named in `config.plugins`;
its keyword-only arguments are its fields in `config.objective`:

    @losses.register
    def exponential(chosen, rejected, *, beta: float = 0.1):
        return jnp.exp(-beta * (chosen.log_ratio_B - rejected.log_ratio_B))

Shape suffixes: B pairs.
"""

import dataclasses

import chex
import jax
import jax.numpy as jnp

from attnpo_jax.registry import Registry

registry = Registry("objective", inputs=("chosen", "rejected"))
register = registry.register
get = registry.get
names = registry.names
hyperparameters = registry.hyperparameters
annotations = registry.annotations
bind = registry.bind


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class ResponseScores:
    """Sums over the tokens of B responses, w the token weights.

    Attributes:
      policy_B: float, sum of w times the policy's log-probabilities.
      reference_B: float, sum of w times the reference's log-probabilities.
      weight_B: float, sum of w.
      length_B: number of tokens of the response, closing template tokens included.
    """

    policy_B: jax.Array
    reference_B: jax.Array
    weight_B: jax.Array
    length_B: jax.Array

    @property
    def log_ratio_B(self) -> jax.Array:
        """Weighted log-ratio s(y) of policy to reference, (B,); the reference gets no gradient."""
        return self.policy_B - jax.lax.stop_gradient(self.reference_B)


def _check(chosen: ResponseScores, rejected: ResponseScores) -> None:
    chex.assert_rank(chosen.policy_B, 1, custom_message="chosen.policy_B")
    for side, scores in (("chosen", chosen), ("rejected", rejected)):
        for field in dataclasses.fields(scores):
            name = f"{side}.{field.name}"
            value = getattr(scores, field.name)
            chex.assert_shape(value, chosen.policy_B.shape, custom_message=name)
            if field.name in ("policy_B", "reference_B"):
                chex.assert_type(value, float, custom_message=name)


@register
def sigmoid(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """Logistic loss on the difference of the log-ratios: the objective of DPO and AttentionPO.

    With h = s(chosen) - s(rejected) and e the label smoothing:
    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    Where policy and reference agree, it is log 2, whatever e.

    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7
    (https://arxiv.org/abs/2305.18290), with every token weighted 1; AttentionPO (Huang et al.
    2026, https://arxiv.org/abs/2605.21883) with token weights. Label smoothing is conservative DPO
    ("A note on DPO with noisy preferences & relationship to IPO", Mitchell 2023).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> def scores(log_ratio):
    ...     ones = jnp.ones(1)
    ...     return ResponseScores(policy_B=log_ratio * ones, reference_B=0 * ones,
    ...                           weight_B=ones, length_B=ones)
    >>> round(float(sigmoid(scores(0.0), scores(0.0))[0]), 4)  # log 2
    0.6931
    >>> round(float(sigmoid(scores(5.0), scores(-5.0), beta=0.1)[0]), 4)  # log(1 + exp(-1))
    0.3133
    """
    _check(chosen, rejected)
    logits_B = beta * (chosen.log_ratio_B - rejected.log_ratio_B)
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
        logits_B
    ) - label_smoothing * jax.nn.log_sigmoid(-logits_B)


@register
def hinge(chosen: ResponseScores, rejected: ResponseScores, *, beta: float = 0.1) -> jax.Array:
    """Hinge loss on the difference of the log-ratios, as in SLiC.

    With h = s(chosen) - s(rejected): loss = max(0, 1 - beta h). Where policy and reference agree,
    it is 1.

    The rank-calibration loss of "SLiC-HF: Sequence Likelihood Calibration with Human Feedback"
    (https://arxiv.org/abs/2305.10425), with likelihoods normalized by the reference as in
    "Statistical Rejection Sampling Improves Preference Optimization"
    (https://arxiv.org/abs/2309.06657).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: inverse of the margin in nats beyond which a pair adds no loss, > 0.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> hinge(chosen, chosen).tolist()
    [1.0]
    """
    _check(chosen, rejected)
    return jax.nn.relu(1.0 - beta * (chosen.log_ratio_B - rejected.log_ratio_B))


@register
def ipo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    length_normalize: bool = False,
) -> jax.Array:
    """Squared distance of the difference of the log-ratios to 1 / (2 beta): IPO.

    With h = s(chosen) - s(rejected): loss = (h - 1 / (2 beta))^2. Where policy and reference
    agree, it is 1 / (4 beta^2).

    "A General Theoretical Paradigm to Understand Learning from Human Preferences", eq. 17
    (https://arxiv.org/abs/2310.12036), whose tau is `beta`.

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: regularization; the target margin is 1 / (2 beta), > 0.
      length_normalize: divide each response's log-ratio by its total weight (by its length, where
        every token weighs 1) before taking the difference. The paper does not; TRL's DPOTrainer
        does.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> ipo(chosen, chosen, beta=0.5).tolist()
    [1.0]
    """
    _check(chosen, rejected)
    log_ratios = []
    for scores in (chosen, rejected):
        log_ratio_B = scores.log_ratio_B
        if length_normalize:
            # A response whose weights are all 0 has the log-ratio 0; it stays 0.
            log_ratio_B = log_ratio_B / jnp.where(scores.weight_B > 0, scores.weight_B, 1.0)
        log_ratios.append(log_ratio_B)
    return jnp.square(log_ratios[0] - log_ratios[1] - 1.0 / (2.0 * beta))
