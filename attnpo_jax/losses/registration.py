"""The registry of objectives, what an objective declares, and the option that all have: `wpo`."""

import dataclasses
import functools
import inspect
import types
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from attnpo_jax.losses.scores import ResponseScores, check
from attnpo_jax.registry import Registry, RegistryError

NEEDS = ("policy_collision", "reference_kl")
"""What an objective may declare: `collision_sum_B` and `kl_B` of `ResponseScores`."""


@dataclasses.dataclass(frozen=True)
class Traits:
    """What an objective is beside its loss.

    Attributes:
      needs: what has to be computed for it, of `NEEDS`.
      reference_free: whether it reads none of the reference's log-probs.
      margin: whether it reads the pairs' margins.
      reward: `(scores) -> reward_B` for the metrics; None for the default, beta times the
        log-ratio (times the policy's log-probs, if it is reference-free).
    """

    needs: tuple[str, ...] = ()
    reference_free: bool = False
    margin: bool = False
    reward: Callable[[ResponseScores], jax.Array] | None = None

    @property
    def of_log_ratios(self) -> bool:
        """Whether the rewards are beta times the log-ratios."""
        return self.reward is None and not self.reference_free

    def rewards(self, scores: ResponseScores, beta: float) -> jax.Array:
        """Rewards (B,) of responses, for the metrics; `beta` is that of the default."""
        if self.reward is not None:
            return self.reward(scores)
        reference_B = 0.0 if self.reference_free else scores.reference_B
        return beta * (scores.policy_B - reference_B)


class Objectives(Registry):
    """Objectives by name. Each has the hyperparameters of its signature, and `wpo`."""

    options = types.MappingProxyType(
        {
            "wpo": "True multiplies each pair's loss by how probable the policy finds its "
            'responses (WPO), "clamped" by 1 at most'
        }
    )

    def __init__(self):
        super().__init__("objective", inputs=("chosen", "rejected"), accepted_needs=NEEDS)

    def register(
        self,
        function: Callable[..., jax.Array] | None = None,
        *,
        needs: tuple[str, ...] = (),
        reference_free: bool = False,
        margin: bool = False,
        reward: Callable[..., jax.Array] | None = None,
        traits: Callable[..., Traits] | None = None,
    ) -> Callable[..., Any]:
        """Adds an objective under its own name; for use as a decorator, bare or with arguments.

        Args:
          needs: what it reads beyond the sums of log-probs, of `NEEDS`.
          reference_free: whether it reads none of the reference's log-probs.
          margin: whether it reads the pairs' margins, `chosen.margin_B`.
          reward: the reward of a response for the metrics, `(scores, *, ...) -> (B,)`, with
            keyword-only arguments that are hyperparameters of the objective too. The default is
            beta times the log-ratio (times the policy's log-probs, if it is reference-free).
          traits: instead of these four, a function of the hyperparameters that gives them.

        Raises:
          RegistryError: as for `Registry.register`; or a hyperparameter that is named as an option
            of all objectives, or one of `reward` that the objective lacks.
        """
        if function is None:
            return functools.partial(
                self.register,
                needs=needs,
                reference_free=reference_free,
                margin=margin,
                reward=reward,
                traits=traits,
            )
        name = function.__name__
        own = _defaults(function)
        taken = [key for key in self.options if key in own]
        if taken:
            raise RegistryError(
                f"objective {name!r} has the hyperparameter {taken[0]!r}, which all objectives "
                "have; give it another name"
            )
        lacking = [] if reward is None else [key for key in _defaults(reward) if key not in own]
        if lacking:
            raise RegistryError(
                f"the reward of objective {name!r} has the hyperparameter {lacking[0]!r}; "
                f"accepted: those of the objective, {', '.join(own) or 'none'}"
            )

        def declared(**hyperparameters) -> Traits:
            bound = reward
            if reward is not None:
                values = {**own, **hyperparameters}
                bound = functools.partial(reward, **{k: values[k] for k in _defaults(reward)})
            return Traits(tuple(needs), reference_free, margin, bound)

        super().register(function, needs=needs)
        function.objective_traits = traits or declared
        return function

    def hyperparameters(self, name: str) -> dict[str, Any]:
        """As `Registry.hyperparameters`, with the options that all objectives have."""
        return {**super().hyperparameters(name), "wpo": False}

    def annotations(self, name: str) -> dict[str, Any]:
        """As `Registry.annotations`, with those of the options."""
        return {**super().annotations(name), "wpo": Literal[False, True, "clamped"]}

    def bind(self, name: str, hyperparameters: Mapping[str, Any]) -> functools.partial:
        """As `Registry.bind`; an objective with `wpo` is wrapped in `policy_weighted`.

        Raises:
          RegistryError: as `Registry.bind`, or a hyperparameter whose value the objective refuses.
        """
        bound = super().bind(name, hyperparameters)
        function, keywords = bound.func, dict(bound.keywords)
        wpo = keywords.pop("wpo", False)
        bound = functools.partial(function, **keywords)
        if wpo:
            bound = functools.partial(policy_weighted, objective=bound, clamp=wpo == "clamped")
        traits(bound)  # of one that is made of others, all are looked up
        return bound


def _defaults(function: Callable) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def traits(objective: Callable[..., jax.Array]) -> Traits:
    """What an objective declared as it registered; nothing, for a function that never did.

    Args:
      objective: the function, or a `functools.partial` of it with hyperparameters.
    """
    keywords = {}
    if isinstance(objective, functools.partial):
        objective, keywords = objective.func, objective.keywords
    declared = getattr(objective, "objective_traits", None)
    return Traits() if declared is None else declared(**keywords)


def policy_weighted(
    chosen: ResponseScores,
    rejected: ResponseScores,
    *,
    objective: Callable[[ResponseScores, ResponseScores], jax.Array],
    clamp: bool = False,
) -> jax.Array:
    """An objective's losses times how probable the policy finds the pairs: WPO.

    The factor is exp(m(chosen) + m(rejected)), m the mean over a response's tokens, each counted
    once, of log p(token) - log sum_v p_v^2. No gradient flows through it.

    "WPO: Enhancing RLHF with Weighted Preference Optimization" (https://arxiv.org/abs/2406.11827).

    Args:
      chosen: scores (B,) of the chosen responses, with `collision_sum_B`.
      rejected: scores (B,) of the rejected responses, likewise.
      objective: the objective, hyperparameters bound.
      clamp: whether the factor is at most 1, as in earlier releases of TRL.

    Returns:
      Loss per pair, (B,).

    >>> import jax.numpy as jnp
    >>> ones = jnp.ones(1)
    >>> scores = ResponseScores(policy_B=-ones, reference_B=-ones, weight_B=ones, length_B=ones,
    ...                         collision_sum_B=-0.5 * ones)
    >>> loss = policy_weighted(scores, scores, objective=lambda c, r: c.weight_B)
    >>> round(float(loss[0]), 4)  # exp(2 (-1 + 0.5))
    0.3679
    """
    check(chosen, rejected, "collision_sum_B")
    exponent_B = 0.0
    for scores in (chosen, rejected):
        surplus_B = scores.policy_sum_B - scores.collision_sum_B
        exponent_B += surplus_B / jnp.maximum(scores.length_B, 1)
    factor_B = jnp.exp(jax.lax.stop_gradient(exponent_B))
    if clamp:
        factor_B = jnp.minimum(factor_B, 1.0)
    return factor_B * objective(chosen, rejected)


def _weighted_traits(*, objective, clamp=False) -> Traits:
    of = traits(objective)
    return dataclasses.replace(of, needs=tuple(dict.fromkeys((*of.needs, "policy_collision"))))


policy_weighted.objective_traits = _weighted_traits

registry = Objectives()
register = registry.register
get = registry.get
names = registry.names
hyperparameters = registry.hyperparameters
annotations = registry.annotations
bind = registry.bind
