"""From a batch, or log-probs and weights, to losses and metrics, pair by pair: pure functions.

Shapes: as in `data.batching`; P pairs (rows times pairs a row), B = 2P responses (of each pair the
chosen one, then the rejected one), T response tokens.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from attnpo_jax.data.batching import PairBatch
from attnpo_jax.losses import ResponseScores, traits
from attnpo_jax.models import lora
from attnpo_jax.models.decoder import ModelConfig, Params
from attnpo_jax.models.scoring import response_scores
from attnpo_jax.registry import NotComputed
from attnpo_jax.weighting import ResponseTokens, Source

Metrics = dict[str, jax.Array]

_RESOLUTION = {"float32": 6e-6, "bfloat16": 0.025}


def resolution(dtype) -> float:
    """The error of a token's log-prob that rounding makes, relative to the log-prob (or to 1, where
    it is smaller), in passes that compute in `dtype`, float32 or bfloat16.

    Tuned against SmolLM2-135M on the 152 builtin pairs: margins between the same model's log-probs,
    in the reference's rows and in packed ones of training, were within 4.3e-6 and 0.019 times the
    root of the sum that `pair_losses` takes (root mean squares: at most 1.5e-6 and 0.006).
    """
    return _RESOLUTION[jnp.dtype(dtype).name]


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What a step does, fixed before it is compiled.

    Attributes:
      model: the model's shape.
      weighting: `(ResponseTokens) -> weights_BT`, hyperparameters bound.
      objective: `(chosen, rejected: ResponseScores) -> loss_B`, hyperparameters bound.
      beta: scale of the reported rewards, where the objective has none of its own.
      source_layers: what the judge arrays' source axis holds, as `weighting.sources` names it.
      num_layers: how many layers the judge has; None for as many as the model.
      weight_columns: the names on the axis of the columns that weightings read by name.
      needs: what the weighting declared that it reads, of `weighting.NEEDS`; what neither it nor
        the objective declared is not computed.
      reference: the shape of the reference, of which a step gets a copy where the objective needs
        its distribution; None where it needs none, or the reference is the model without adapters.
      dtype: what activations are computed in.
      remat: a key of `models.decoder.REMAT_POLICIES`.
      attention: one of `models.attention.implementations.IMPLEMENTATIONS`.
      logps_chunk: tokens whose logits exist at a time.
    """

    model: ModelConfig
    weighting: Callable[[ResponseTokens], jax.Array]
    objective: Callable[[ResponseScores, ResponseScores], jax.Array]
    beta: float
    source_layers: tuple[Source, ...]
    num_layers: int | None = None
    weight_columns: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    reference: ModelConfig | None = None
    dtype: Any = jnp.float32
    remat: str = "dots"
    attention: str = "xla"
    logps_chunk: int = 2048


def batch_losses(
    settings: StepSettings, params: Params, batch: PairBatch, reference: Params | None = None
) -> tuple[jax.Array, Metrics]:
    """Each pair's loss and what is reported of it.

    Args:
      settings: the step's settings.
      params: the policy's parameters; the loss is differentiable in them.
      batch: rows without a microbatch axis.
      reference: see `policy_logps`.

    Returns:
      loss_P and metrics (P,), as `pair_losses` gives them.
    """
    return losses_of_logps(settings, *policy_logps(settings, params, batch, reference), batch)


def policy_logps(
    settings: StepSettings, params: Params, batch: PairBatch, reference: Params | None = None
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The policy's log-prob of each response token, and statistics of its distribution there.

    Args:
      settings: the step's settings.
      params: the policy's parameters.
      batch: rows without a microbatch axis.
      reference: the reference's parameters, of the shape `settings.reference`; None where that is
        None. Read where the objective needs the reference's distribution.

    Returns:
      float32 (B, G, 2, T), and by name what weighting and objective need of such statistics, of the
      same shape: of `lm_head.STATISTICS`, and `reference_kl`, KL(reference || policy).

    Raises:
      ValueError: the objective needs the reference's distribution, and there is no reference.
    """
    of_objective = traits(settings.objective).needs
    needs = dict.fromkeys((*settings.needs, *of_objective))
    against = None
    if "reference_kl" in of_objective:
        if settings.reference is None and settings.model.lora is None:
            raise ValueError(
                "the objective needs reference_kl, the reference's distribution over the "
                "vocabulary, and the settings have no reference; accepted: a `reference`, adapters "
                "on a model, or a call of the objective with scores that have kl_B"
            )
        if settings.reference is None:
            against = lora.without(settings.model), lora.base(params)
        else:
            against = settings.reference, reference
    return response_scores(
        settings.model,
        params,
        batch,
        statistics=tuple(
            need.removeprefix("policy_") for need in needs if need.startswith("policy_")
        ),
        reference=against,
        dtype=settings.dtype,
        remat=settings.remat,
        attention=settings.attention,
        chunk=settings.logps_chunk,
    )


def without_losses(settings: StepSettings) -> StepSettings:
    """The settings with all losses 0 and all else as it was, the rewards among it.

    For those who ask for no loss: what only losses are made of is not computed.
    """

    def no_loss(chosen: ResponseScores, rejected: ResponseScores) -> jax.Array:
        return jnp.zeros_like(chosen.policy_B)

    of = dataclasses.replace(traits(settings.objective), needs=())
    no_loss.objective_traits = lambda: of
    return dataclasses.replace(settings, objective=no_loss, reference=None)


def losses_of_logps(
    settings: StepSettings,
    policy_BG2T: jax.Array,
    statistics: Mapping[str, jax.Array],
    batch: PairBatch,
) -> tuple[jax.Array, Metrics]:
    """As `batch_losses`, of what `policy_logps` gives."""
    kl_BG2T = statistics.get("reference_kl")
    return pair_losses(
        settings.weighting,
        settings.objective,
        _by_response(policy_BG2T),
        response_tokens(settings, policy_BG2T, statistics, batch),
        batch.valid_BG.reshape(-1),
        beta=settings.beta,
        resolution=resolution(settings.dtype),
        weight_P=batch.weight_BG.reshape(-1),
        margin_P=batch.margin_BG.reshape(-1) if traits(settings.objective).margin else None,
        kl_BT=None if kl_BG2T is None else _by_response(kl_BG2T),
    )


def response_tokens(
    settings: StepSettings,
    policy_BG2T: jax.Array,
    statistics: Mapping[str, jax.Array],
    batch: PairBatch,
) -> ResponseTokens:
    """What a weighting sees of a batch's 2P responses, those of a pair in turn.

    Args:
      settings: its layers and columns are those that the batch has.
      policy_BG2T, statistics: as `policy_logps` gives them; no gradient flows through the former.
      batch: rows without a microbatch axis.
    """

    def declared(x, field, need):
        if x is not None:
            return _by_response(x)
        declares = f'@weighting.register(needs=("{need}",))'
        return NotComputed(
            field, f"nothing declares that it reads it; a weighting does so by {declares}"
        )

    judged = bool(settings.source_layers)
    verdict = jnp.repeat(batch.verdict_BG2[..., None, :], 2, axis=2) if judged else None
    mask = _by_response(batch.mask_BG2T)
    tokens = _by_response(_tokens(batch))
    lengths = jnp.sum(mask, axis=-1)
    return ResponseTokens(
        mask_BT=mask,
        text_mask_BT=_by_response(batch.text_mask_BG2T),
        judge_B2ST=declared(batch.judge_BG22ST if judged else None, "judge_B2ST", "judge"),
        verdict_B2=declared(verdict, "verdict_B2", "judge"),
        reference_logps_BT=declared(
            batch.reference_logps_BG2T, "reference_logps_BT", "reference_logps"
        ),
        reference_entropy_BT=declared(
            batch.reference_entropy_BG2T, "reference_entropy_BT", "reference_entropy"
        ),
        policy_logps_BT=jax.lax.stop_gradient(_by_response(policy_BG2T)),
        is_chosen=jnp.tile(jnp.array([True, False]), mask.shape[0] // 2),
        source_layers=settings.source_layers,
        num_layers=settings.num_layers or settings.model.num_layers,
        ready_BKT=None if batch.ready_BG2KT is None else _by_response(batch.ready_BG2KT),
        weight_columns=settings.weight_columns,
        whole_B2S4=None if batch.whole_BG22S4 is None else _by_response(batch.whole_BG22S4),
        tokens_BT=tokens,
        partner_tokens_BT=_partners(tokens),
        partner_length_B=_partners(lengths),
        **{
            f"policy_{name}_BT": _by_response(x)
            for name, x in statistics.items()
            if name != "reference_kl"
        },
    )


def _by_response(x: jax.Array) -> jax.Array:
    """(B, G, 2, ...) -> (2P, ...): the responses of a pair in turn."""
    return x.reshape(math.prod(x.shape[:3]), *x.shape[3:])


def _tokens(batch: PairBatch) -> jax.Array:
    """The ids of the responses' tokens, int32 (B, G, 2, T); -1 where there is none."""
    B = batch.index_BG2T.shape[0]
    flat = jnp.take_along_axis(batch.target_BM, batch.index_BG2T.reshape(B, -1), axis=1)
    return jnp.where(batch.mask_BG2T, flat.reshape(batch.index_BG2T.shape), -1)


def _partners(x: jax.Array) -> jax.Array:
    """Of (2P, ...), responses of a pair in turn: for each, what the other one of its pair has."""
    return jnp.flip(x.reshape(-1, 2, *x.shape[1:]), axis=1).reshape(x.shape)


def pair_losses(
    weigh: Callable[[ResponseTokens], jax.Array],
    objective: Callable[[ResponseScores, ResponseScores], jax.Array],
    policy_BT: jax.Array,
    responses: ResponseTokens,
    valid_P: jax.Array,
    *,
    beta: float,
    resolution: float = 0.0,
    weight_P: jax.Array | float = 1.0,
    margin_P: jax.Array | None = None,
    kl_BT: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
    """TwDPO (Huang et al. 2026): an objective of the weighted sums of both responses' log-probs.

    Args:
      weigh: gives weights (B, T); no gradient goes through them.
      objective: gives losses (P,).
      policy_BT: the policy's log-probs; the loss is differentiable in them.
      responses: the same tokens, with the reference's log-probs (but for a reference-free
        objective), as `weigh` sees them; with `policy_collision_BT`, 0 where there is no token, for
        objectives that declare it.
      valid_P: bool, false for empty slots.
      beta: scale of the reported rewards, where the objective has none of its own.
      resolution: relative error of a log-prob, see the function of this name.
      weight_P: the pairs' losses are multiplied by it.
      margin_P: what the pairs' logits are to exceed, for the objective; None for no margins.
      kl_BT: KL(reference || policy) of each token's distributions, 0 where there is no token, for
        objectives that declare it; the loss is differentiable in it.

    Returns:
      loss_P, 0 for empty slots, and a dict of metrics (P,): `unweighted_loss` (what the loss would
      be with uniform weights), and `rewards/*` and `logps/*`, plain and weighted, under the names
      that TRL gives them. A margin no larger than what rounding makes of it, with the tokens'
      errors independent, is a tie (`rewards/ties`), and no win (`rewards/accuracies`). With the
      rewards of a reference-free objective, or of one that has its own, ties are equal rewards.
    """
    # The reference is frozen, and a weighting that reads the policy is not differentiated through.
    weights, reference = jax.lax.stop_gradient((weigh(responses), responses.reference_logps_BT))
    mask = responses.mask_BT
    score = functools.partial(
        _score,
        policy_BT=policy_BT,
        reference_BT=None if traits(objective).reference_free else reference,
        responses=responses,
        valid_P=valid_P,
        margin_P=margin_P,
        kl_BT=kl_BT,
    )

    def rounding(weights):
        """What rounding makes of the pairs' margins of log-ratios (P,)."""
        squares = sum(jnp.square(jnp.maximum(1, jnp.abs(x))) for x in (policy_BT, reference))
        squares_B = jnp.sum(jnp.where(mask, jnp.square(weights) * squares, 0.0), axis=-1)
        return resolution * jnp.sqrt(jnp.sum(squares_B.reshape(-1, 2), axis=-1))

    chosen, rejected = score(weights, 0), score(weights, 1)
    loss_P = jnp.where(valid_P, weight_P * objective(chosen, rejected), 0.0)
    ones = mask.astype(weights.dtype)
    plain = score(ones, 0), score(ones, 1)
    reward = functools.partial(traits(objective).rewards, beta=beta)

    def reports(scores, weights, prefix):
        # Of rewards against the reference, from which rounding alone may set the policy apart.
        rounded = traits(objective).of_log_ratios
        return _reports(reward, *scores, beta * rounding(weights) if rounded else 0.0, prefix)

    metrics = {
        "unweighted_loss": weight_P * objective(*plain),
        **reports(plain, ones, ""),
        **reports((chosen, rejected), weights, "weighted_"),
    }
    return loss_P, jax.tree.map(
        lambda x: jnp.where(valid_P, x, 0.0), jax.lax.stop_gradient(metrics)
    )


def _score(
    weights_BT: jax.Array,
    side: int,
    *,
    policy_BT: jax.Array,
    reference_BT: jax.Array | None,
    responses: ResponseTokens,
    valid_P: jax.Array,
    margin_P: jax.Array | None,
    kl_BT: jax.Array | None,
) -> ResponseScores:
    """What an objective reads of the chosen responses (side 0) or the rejected ones (side 1)."""
    T = policy_BT.shape[-1]

    def of_side(x_BT):
        return x_BT.reshape(-1, 2, T)[:, side]

    def total(x_BT, where=None):
        return None if x_BT is None else jnp.sum(of_side(x_BT), axis=-1, where=where)

    w, pi, m = of_side(weights_BT), of_side(policy_BT), of_side(responses.mask_BT)
    if reference_BT is None:
        remedy = "the objective declares reference_free=True, so it is to read none"
        reference_B, reference_sum_B = (
            NotComputed(name, remedy) for name in ("reference_B", "reference_sum_B")
        )
    else:
        reference_B = jnp.sum(w * of_side(reference_BT), axis=-1)
        reference_sum_B = total(reference_BT, m)
    return ResponseScores(
        policy_B=jnp.sum(w * pi, axis=-1),
        reference_B=reference_B,
        # An objective may divide by these. For empty slots they are 1: a NaN there would get
        # into the gradient, although the slot's loss is left out.
        weight_B=jnp.where(valid_P, jnp.sum(w, axis=-1), 1),
        length_B=jnp.where(valid_P, jnp.sum(m, axis=-1), 1),
        policy_sum_B=total(policy_BT, m),
        reference_sum_B=reference_sum_B,
        collision_sum_B=total(responses.policy_collision_BT),
        kl_B=total(kl_BT),
        margin_B=margin_P if side == 0 else None,
    )


def _reports(
    reward: Callable[[ResponseScores], jax.Array],
    chosen: ResponseScores,
    rejected: ResponseScores,
    least: jax.Array | float,
    prefix: str,
) -> Metrics:
    """Metrics (P,) of scores; margins of rewards that are no larger than `least` are ties."""
    reward_c, reward_r = reward(chosen), reward(rejected)
    margin = reward_c - reward_r
    return {
        f"rewards/{prefix}chosen": reward_c,
        f"rewards/{prefix}rejected": reward_r,
        f"rewards/{prefix}accuracies": (margin > least).astype(jnp.float32),
        f"rewards/{prefix}ties": (jnp.abs(margin) <= least).astype(jnp.float32),
        f"rewards/{prefix}margins": margin,
        f"logps/{prefix}chosen": chosen.policy_B,
        f"logps/{prefix}rejected": rejected.policy_B,
    }
