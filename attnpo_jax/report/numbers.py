"""The numbers of the shown pairs: every view's weights, log-probs of both models, losses.

One pass over the pairs gives them all, with the trained model where there is one.

Shapes: as in `data.batching`; K rows of tokens' numbers, F figures a pair.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from attnpo_jax import config as config_lib
from attnpo_jax import pair_loss
from attnpo_jax.data.batching import EvalBatches, PairBatch
from attnpo_jax.generate import model as models
from attnpo_jax.losses import traits
from attnpo_jax.models.attention import implementations
from attnpo_jax.pair_loss import StepSettings
from attnpo_jax.parallel import processes
from attnpo_jax.report.shown import Shown
from attnpo_jax.report.views import TRAINED, View
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.progress import CountProgress
from attnpo_jax.sampling.model import SampledModel

if TYPE_CHECKING:
    from attnpo_jax.run import Run

FIGURES = (
    "loss",
    "unweighted_loss",
    "rewards/weighted_accuracies",
    "rewards/accuracies",
    "rewards/weighted_margins",
    "rewards/margins",
)
"""Of each pair: those of `pair_loss.pair_losses`, with its loss."""

# Shapes that the pass is compiled for: of a few hundred pairs, padding costs less than another one.
_MOST_SHAPES = 2
_NEEDS_POLICY = "it reads the trained model's log-probs, which are not here"
_Sides = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class PairNumbers:
    """What is known of a pair.

    Attributes:
      weights: by view, of the tokens of the chosen and of the rejected response.
      policy: the trained model's log-probs of these; None where it is not at hand.
      before, after: `FIGURES` with the reference in the policy's place, and with the policy; None
        where they can't be computed.
    """

    weights: dict[str, _Sides]
    policy: _Sides | None
    before: np.ndarray | None
    after: np.ndarray | None


@dataclasses.dataclass(frozen=True)
class Policy:
    """The trained model, or why it is not at hand.

    Attributes:
      sampled: it, with its parameters.
      name: what it is called, such as `step-14`.
      missing: why there is none.
    """

    sampled: SampledModel | None
    name: str = ""
    missing: str = ""


def load_policy(run: "Run") -> Policy:
    """The newest checkpoint's model, or the best one's where the config keeps that."""
    if not run.config.report.policy:
        return Policy(None, missing="config.report.policy is False")
    if processes.team().count > 1:
        return Policy(None, missing="the page was made by one of several processes")
    which = f"{models.TRAINED}@best" if run.config.train.keep_best else models.TRAINED
    run.drop_params()
    try:
        sampled = models.load(run, which)
    except (UserError, OSError) as error:
        return Policy(None, missing=str(error))
    return Policy(sampled, sampled.name.rpartition("/")[2])


def take(
    run: "Run", shown: Shown, views: Sequence[View], policy: Policy
) -> tuple[list[View], list[PairNumbers]]:
    """The numbers of all shown pairs.

    Args:
      run: whose config says how the loss is taken.
      shown: the pairs, at least one.
      views: what weights are wanted.
      policy: the trained model, or none.

    Returns:
      The views, those that turn out not to be computable with the reason why, and the numbers of
      each pair, in its order.
    """
    settings = _settings(run, shown, views, policy.sampled)
    batches = EvalBatches(
        shown,
        batch_size=run.config.train.eval_batch_size,
        num_buckets=min(run.config.data.num_buckets, _MOST_SHAPES),
        row_multiple=1 if policy.sampled is None else policy.sampled.backend.row_shards,
    )
    first = _without_microbatches(batches[0])
    views = [_tried(view, settings, first) for view in views]
    computed = [view for view in views if view.weigh is not None]
    static: dict[str, Any] = {
        "settings": settings,
        "weighings": tuple(view.weigh for view in computed),
        "with_figures": _has_losses(settings, first),
        "knows_loss": not config_lib.reads_distribution(run.config),
        "begins_as_reference": run.reference is None and first.reference_logps_BG2T is not None,
    }
    if policy.sampled is None:
        numbers = jax.jit(_numbers, static_argnames=tuple(static))
        arrays = functools.partial(numbers, None, **static)
    else:
        backend, params = policy.sampled.backend, policy.sampled.model.params
        arrays = functools.partial(backend.row_pass(_numbers, (0, 0), **static), params)
    found = _of_batches(arrays, batches, shown, computed, policy.sampled is not None, run)
    return [_with_reason(view, found) for view in views], found


def _of_batches(
    arrays: Callable[[PairBatch], tuple[jax.Array, jax.Array]],
    batches: EvalBatches,
    shown: Shown,
    computed: Sequence[View],
    has_policy: bool,
    run: "Run",
) -> list[PairNumbers]:
    lengths = shown.lengths()
    found: dict[int, PairNumbers] = {}
    bar = run.config.log.progress
    with CountProgress("pairs of the report", len(batches), "batches", bar=bar) as progress:
        for number in range(len(batches)):
            batch = _without_microbatches(batches[number])
            tokens_BGK2T, figures_BG2F = map(np.asarray, arrays(batch))
            for b, g in np.argwhere(batch.valid_BG):
                pair = int(batch.pair_BG[b, g])
                n = lengths["chosen"][pair], lengths["rejected"][pair]
                sides = [(row_2T[0, : n[0]], row_2T[1, : n[1]]) for row_2T in tokens_BGK2T[b, g]]
                of_views = {view.key: one for view, one in zip(computed, sides[1:], strict=True)}
                before, after = (x if np.isfinite(x).any() else None for x in figures_BG2F[b, g])
                found[pair] = PairNumbers(of_views, sides[0] if has_policy else None, before, after)
            progress.add(1)
    return [found[pair] for pair in range(len(shown))]


@dataclasses.dataclass(frozen=True)
class _Shape:
    """Stands for a model that is not at hand."""

    num_layers: int


def _settings(
    run: "Run", shown: Shown, views: Sequence[View], sampled: SampledModel | None
) -> StepSettings:
    model, attention = _Shape(shown.num_layers), "xla"
    if sampled is not None:
        model = sampled.model.config
        attention = implementations.choose(
            run.config.model.attention, model, run.config.model.dtype, sampled.backend.devices
        ).implementation
    settings = config_lib.step_settings(
        run.config,
        model,
        shown.source_layers,
        attention,
        shown.columns,
        num_layers=shown.num_layers,
    )
    if config_lib.reads_distribution(run.config):  # for which the reference would have to be loaded
        settings = pair_loss.without_losses(settings)
    needs = dict.fromkeys((*settings.needs, *(need for view in views for need in view.needs)))
    return dataclasses.replace(settings, needs=tuple(needs))


def _without_microbatches(batch: PairBatch) -> PairBatch:
    return jax.tree.map(lambda x: x[0], batch)


def _numbers(
    params: Any,
    batch: PairBatch,
    *,
    settings: StepSettings,
    weighings: tuple[Callable, ...],
    with_figures: bool,
    knows_loss: bool,
    begins_as_reference: bool,
) -> tuple[jax.Array, jax.Array]:
    """Tokens' numbers (B, G, K, 2, T), the policy's log-probs before the weights, and figures
    (B, G, 2, F), with the reference as policy and with the policy; NaN for what is not known.
    """
    unknown = _unknown(settings, batch)
    policy = unknown if params is None else pair_loss.policy_logps(settings, params, batch)
    responses = pair_loss.response_tokens(settings, *policy, batch)
    shape = batch.mask_BG2T.shape
    rows = [policy[0], *(weigh(responses).reshape(shape) for weigh in weighings)]
    B, G = shape[:2]
    figures_BG2F = jnp.full((B, G, 2, len(FIGURES)), jnp.nan)
    if with_figures:
        # Before the first step the policy is its reference, unless that is another model.
        same = unknown if not begins_as_reference else (batch.reference_logps_BG2T, unknown[1])
        both = [_figures(settings, *logps, batch) for logps in (same, policy)]
        figures_BG2F = jnp.stack(both, axis=1).reshape(figures_BG2F.shape)
        if not knows_loss:
            is_loss_F = jnp.array(["loss" in name for name in FIGURES])
            figures_BG2F = jnp.where(is_loss_F, jnp.nan, figures_BG2F)
    return jnp.stack(rows, axis=2).astype(jnp.float32), figures_BG2F


def _unknown(settings: StepSettings, batch: PairBatch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """What `pair_loss.policy_logps` gives, of a policy that nothing is known of: NaN."""
    nan_BG2T = jnp.where(batch.mask_BG2T, jnp.nan, 0.0)
    needs = {*settings.needs, *traits(settings.objective).needs}
    of_policy = [need for need in sorted(needs) if need.startswith("policy_")]
    return nan_BG2T, {need.removeprefix("policy_"): nan_BG2T for need in of_policy}


def _figures(settings: StepSettings, logps_BG2T, statistics, batch: PairBatch) -> jax.Array:
    loss_P, metrics = pair_loss.losses_of_logps(settings, logps_BG2T, statistics, batch)
    return jnp.stack([{"loss": loss_P, **metrics}[name] for name in FIGURES], axis=-1)


def _tried(view: View, settings: StepSettings, batch: PairBatch) -> View:
    """The view, or why its weights can't be computed of such a batch."""

    def weigh(batch):
        return view.weigh(pair_loss.response_tokens(settings, *_unknown(settings, batch), batch))

    if view.weigh is None:
        return view
    try:
        shape = jax.eval_shape(weigh, batch).shape
        size = (2 * batch.valid_BG.size, batch.mask_BG2T.shape[-1])
        reason = None if shape == size else f"it gives weights {shape}, not {size}"
    except Exception as error:  # a plugin may raise anything
        reason = str(error) if isinstance(error, UserError) else repr(error)
    return view if reason is None else dataclasses.replace(view, weigh=None, missing=reason)


def _has_losses(settings: StepSettings, batch: PairBatch) -> bool:
    def figures(batch):
        return _figures(settings, *_unknown(settings, batch), batch)

    try:
        jax.eval_shape(figures, batch)
    except Exception:  # likewise; the view of the weights says why, and the step does
        return False
    return True


def _with_reason(view: View, found: Sequence[PairNumbers]) -> View:
    """The view; where it gave no numbers at all, with what it lacked."""
    if view.weigh is None or any(
        np.isfinite(side).any() for one in found for side in one.weights[view.key]
    ):
        return view
    known = found[0].policy is not None
    reason = "it gives numbers that are not finite" if known else _NEEDS_POLICY
    return dataclasses.replace(view, weigh=None, missing=reason)


def trained_weights(numbers: PairNumbers) -> _Sides | None:
    """The weights that the run trained with."""
    return numbers.weights.get(TRAINED)
