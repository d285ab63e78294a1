"""Objectives of the difference of a pair's log-ratios: DPO and its kin.

With lc and lr the weighted log-ratios of the chosen and the rejected response, h = lc - lr.

Shape suffixes: B pairs.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from attnpo_jax.losses.registration import register
from attnpo_jax.losses.scores import ResponseScores, beyond_margin, check

# Of an exponent; e to this and the losses made of it are finite in float32, far from overflow.
_MOST_EXPONENT = 60.0


def pair_logits(chosen: ResponseScores, rejected: ResponseScores, beta: float) -> jax.Array:
    """beta h, less the pair's margin, (B,)."""
    return beyond_margin(beta * (chosen.log_ratio_B - rejected.log_ratio_B), chosen)


def smoothed_sigmoid(logits_B: jax.Array, label_smoothing: float) -> jax.Array:
    """-(1 - e) log sigmoid(logits) - e log sigmoid(-logits), with label smoothing e."""
    return -(1.0 - label_smoothing) * jax.nn.log_sigmoid(
        logits_B
    ) - label_smoothing * jax.nn.log_sigmoid(-logits_B)


@register(margin=True)
def sigmoid(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    divergence: Literal["reverse_kl", "forward_kl", "js", "alpha"] = "reverse_kl",
    alpha: float = 0.5,
) -> jax.Array:
    """Logistic loss on the difference of the log-ratios: the objective of DPO and AttentionPO.

    With h = s(chosen) - s(rejected) and e the label smoothing:
    loss = -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h).
    Where policy and reference agree, it is log 2, whatever e.

    "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7
    (https://arxiv.org/abs/2305.18290), with every token weighted 1; AttentionPO (Huang et al.
    2026, https://arxiv.org/abs/2605.21883) with token weights. Label smoothing is conservative DPO
    ("A note on DPO with noisy preferences & relationship to IPO", Mitchell 2023).

    Another divergence from the reference puts f'(exp(s)) in the place of s: with u = exp(s), log u
    for reverse_kl, -1/u for forward_kl, log(2u / (1 + u)) for js and (1 - u^-alpha) / alpha for
    alpha. "Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
    Constraints", table 1 (https://arxiv.org/abs/2309.16240).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).
      divergence: what pulls towards the reference.
      alpha: of the alpha divergence, > 0; 1 is the forward KL. TRL's coefficient is 1 - alpha.

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
    check(chosen, rejected)
    values = (_f_prime(x.log_ratio_B, divergence, alpha) for x in (chosen, rejected))
    chosen_B, rejected_B = values
    logits_B = beyond_margin(beta * (chosen_B - rejected_B), chosen)
    return smoothed_sigmoid(logits_B, label_smoothing)


def _f_prime(log_ratio_B: jax.Array, divergence: str, alpha: float) -> jax.Array:
    """f'(exp(log-ratio)) of a divergence, up to a constant, which the difference does not have."""
    match divergence:
        case "reverse_kl":
            return log_ratio_B
        case "forward_kl":
            return -jnp.exp(jnp.minimum(-log_ratio_B, _MOST_EXPONENT))
        case "js":
            return jax.nn.log_sigmoid(log_ratio_B)
        case "alpha":
            return -jnp.exp(jnp.minimum(-alpha * log_ratio_B, _MOST_EXPONENT)) / alpha
    raise ValueError(f"divergence is {divergence!r}; accepted: reverse_kl, forward_kl, js, alpha")


@register(margin=True)
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
    check(chosen, rejected)
    return jax.nn.relu(1.0 - pair_logits(chosen, rejected, beta))


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
    check(chosen, rejected)
    log_ratios = []
    for scores in (chosen, rejected):
        log_ratio_B = scores.log_ratio_B
        log_ratios.append(scores.per_weight(log_ratio_B) if length_normalize else log_ratio_B)
    return jnp.square(log_ratios[0] - log_ratios[1] - 1.0 / (2.0 * beta))


@register(margin=True)
def robust(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.1,
) -> jax.Array:
    """DPO whose expectation, over labels flipped at a known rate, is that of true labels.

    With e the label smoothing:
    loss = (-(1 - e) log sigmoid(beta h) + e log sigmoid(-beta h)) / (1 - 2 e).
    Where policy and reference agree, it is log 2, whatever e. It may be negative.

    "Provably Robust DPO: Aligning Language Models with Noisy Feedback"
    (https://arxiv.org/abs/2403.00409).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(robust(chosen, chosen)[0]), 4)  # log 2
    0.6931
    """
    check(chosen, rejected)
    logits_B = pair_logits(chosen, rejected, beta)
    as_labelled_B, flipped_B = jax.nn.log_sigmoid(logits_B), jax.nn.log_sigmoid(-logits_B)
    e = label_smoothing
    return (e * flipped_B - (1.0 - e) * as_labelled_B) / (1.0 - 2.0 * e)


@register(margin=True)
def exo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.001,
) -> jax.Array:
    """Reverse KL from the policy's preferences to the smoothed labels: EXO.

    With p = sigmoid(beta h) and e the label smoothing:
    loss = p (log p - log(1 - e)) + (1 - p) (log(1 - p) - log e).
    Where policy and reference agree, it is -log 2 - log(e (1 - e)) / 2.

    "Towards Efficient Exact Optimization of Language Model Alignment"
    (https://arxiv.org/abs/2402.00856).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      label_smoothing: probability that the labels give the rejected response, in (0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(exo(chosen, chosen, label_smoothing=0.2)[0]), 4)  # -log 2 - log(0.16) / 2
    0.2231
    """
    check(chosen, rejected)
    logits_B = pair_logits(chosen, rejected, beta)
    as_labelled_B = jax.nn.log_sigmoid(logits_B) - jnp.log(1.0 - label_smoothing)
    flipped_B = jax.nn.log_sigmoid(-logits_B) - jnp.log(label_smoothing)
    return jax.nn.sigmoid(logits_B) * as_labelled_B + jax.nn.sigmoid(-logits_B) * flipped_B


@register(margin=True)
def discopop(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    tau: float = 0.05,
) -> jax.Array:
    """Log-ratio modulated loss, found by a language model: DiscoPOP.

    With m = sigmoid(beta h / tau): loss = -(1 - m) log sigmoid(beta h) + m exp(-beta h).
    Where policy and reference agree, it is (log 2 + 1) / 2.

    "Discovering Preference Optimization Algorithms with and for Large Language Models"
    (https://arxiv.org/abs/2406.08414).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      tau: how fast one loss passes into the other, in (0, 1].

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(discopop(chosen, chosen)[0]), 4)  # (log 2 + 1) / 2
    0.8466
    """
    check(chosen, rejected)
    logits_B = pair_logits(chosen, rejected, beta)
    logistic_B = -jax.nn.sigmoid(-logits_B / tau) * jax.nn.log_sigmoid(logits_B)
    # As one exponential: far out on the wrong side, the product would be 0 times infinity.
    return logistic_B + jnp.exp(jax.nn.log_sigmoid(logits_B / tau) - logits_B)


@register(margin=True)
def sigmoid_norm(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """`sigmoid` on log-ratios per token: each divided by its response's total weight.

    With W the sums of weights, the numbers of tokens where all are 1, and h = lc / Wc - lr / Wr:
    the loss of `sigmoid`. Where policy and reference agree, it is log 2.

    Length-normalized DPO of "Tulu 3: Pushing Frontiers in Open Language Model
    Post-Training" (https://arxiv.org/abs/2411.15124).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0; the paper's is 5.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=5 * ones, reference_B=0 * ones, weight_B=5 * ones,
    ...                         length_B=5 * ones)
    >>> rejected = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(sigmoid_norm(chosen, rejected, beta=1.0)[0]), 4)  # log(1 + exp(-1))
    0.3133
    """
    check(chosen, rejected)
    chosen_B, rejected_B = (x.per_weight(x.log_ratio_B) for x in (chosen, rejected))
    logits_B = beyond_margin(beta * (chosen_B - rejected_B), chosen)
    return smoothed_sigmoid(logits_B, label_smoothing)


@register(margin=True)
def rdpo(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    alpha: float = 0.01,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """`sigmoid` that takes the difference of the lengths out of the logits: R-DPO.

    With n the numbers of tokens: loss = -log sigmoid(beta h - alpha (n_chosen - n_rejected)).
    Where policy and reference agree and lengths are the same, it is log 2.

    "Disentangling Length from Quality in Direct Preference Optimization"
    (https://arxiv.org/abs/2403.19159).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0.
      alpha: how much a token more of the chosen response takes off the logits, 0 or more.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> chosen = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=101 * ones)
    >>> rejected = ResponseScores(policy_B=ones, reference_B=ones, weight_B=ones, length_B=ones)
    >>> round(float(rdpo(chosen, rejected, alpha=0.01)[0]), 4)  # log(1 + e)
    1.3133
    """
    check(chosen, rejected)
    logits_B = pair_logits(chosen, rejected, beta)
    return smoothed_sigmoid(
        logits_B - alpha * (chosen.length_B - rejected.length_B), label_smoothing
    )


@register(margin=True)
def dpop(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    beta: float = 0.1,
    penalty: float = 50.0,
    label_smoothing: float = 0.0,
) -> jax.Array:
    """`sigmoid` with a penalty where the chosen response has become less likely: DPO-Positive.

    With lambda the penalty: loss = -log sigmoid(beta (h - lambda max(0, -lc))).
    Where policy and reference agree, it is log 2.

    "Smaug: Fixing Failure Modes of Preference Optimisation with DPO-Positive"
    (https://arxiv.org/abs/2402.13228).

    Args:
      chosen: scores (B,) of the chosen responses.
      rejected: scores (B,) of the rejected responses.
      beta: strength of the pull towards the reference, > 0; the paper's is 0.3.
      penalty: lambda, 0 or more.
      label_smoothing: assumed share of pairs whose label is wrong, in [0, 0.5).

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> less = ResponseScores(policy_B=-2 * ones, reference_B=-ones, weight_B=ones, length_B=ones)
    >>> round(float(dpop(less, less, beta=0.2, penalty=5.0)[0]), 4)  # log(1 + e)
    1.3133
    """
    check(chosen, rejected)
    fall_B = jax.nn.relu(-chosen.log_ratio_B)
    logits_B = pair_logits(chosen, rejected, beta) - beta * penalty * fall_B
    return smoothed_sigmoid(logits_B, label_smoothing)
