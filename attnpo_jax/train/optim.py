"""Learning-rate schedules and the optimizer: AdamW behind a global-norm clip."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

SCHEDULES = ("cosine", "linear", "constant")


def make_schedule(optim: Any, total_steps: int) -> Schedule:
    """The learning rate as a function of the number of optimizer steps done before this one.

    The first `ceil(warmup_ratio * total_steps)` steps rise linearly from 0; after them the rate
    falls to 0 at the end of the last step along half a cosine or a line, or stays. These are
    Hugging Face's `get_cosine_schedule_with_warmup`, `get_linear_...` and `get_constant_...`.

    Args:
      optim: the `optim` section of the config: `learning_rate`, `schedule`, `warmup_ratio`.
      total_steps: optimizer steps of the whole run.

    Raises:
      ValueError: unknown schedule, or `total_steps` below 1.
    """
    if optim.schedule not in SCHEDULES:
        raise ValueError(
            f"optim.schedule is {optim.schedule!r}; accepted: {', '.join(map(repr, SCHEDULES))}"
        )
    if total_steps < 1:
        raise ValueError(f"a schedule needs 1 step or more, got {total_steps}")
    peak, kind = optim.learning_rate, optim.schedule
    warmup_steps = math.ceil(optim.warmup_ratio * total_steps)

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        rising = step / max(1, warmup_steps)
        done = jnp.clip((step - warmup_steps) / max(1, total_steps - warmup_steps), 0.0, 1.0)
        if kind == "cosine":
            falling = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        elif kind == "linear":
            falling = 1.0 - done
        else:
            falling = jnp.ones_like(done)
        return peak * jnp.where(step < warmup_steps, rising, falling)

    return schedule


def make_optimizer(optim: Any, schedule: Schedule) -> optax.GradientTransformation:
    """Global-norm clip, then AdamW (arXiv 1711.05101) with the scheduled learning rate.

    Moments are float32 whatever the parameters' dtype: in bfloat16 the second moment's change of
    0.1% a step would round away. Norm scales and biases do not decay, as in Hugging Face's Trainer.

    Args:
      optim: the `optim` section of the config: `b1`, `b2`, `eps`, `weight_decay`, `max_grad_norm`
        (0 = no clip).
      schedule: step -> learning rate; step 0 is the first update.
    """
    adamw = optax.adamw(
        schedule,
        b1=optim.b1,
        b2=optim.b2,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        mask=decays,
    )
    clip = clip_by_global_norm(optim.max_grad_norm) if optim.max_grad_norm else optax.identity()
    return _in_float32(optax.chain(clip, adamw))


def clip_by_global_norm(max_norm: float) -> optax.GradientTransformation:
    """Scales all gradients by min(1, max_norm / (norm + 1e-6)), as torch's `clip_grad_norm_` does.

    One scalar factor fuses into the optimizer's update. `optax.clip_by_global_norm` selects between
    each gradient and its quotient instead, for which XLA keeps a second copy of all gradients on
    CPU (513 MiB of temporaries for 135M float32 parameters; none here).
    """

    def update(updates, state, params=None):
        del params
        factor = jnp.minimum(1.0, max_norm / (optax.tree.norm(updates) + 1e-6))
        return jax.tree.map(lambda g: (g * factor).astype(g.dtype), updates), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def decays(params: Any) -> Any:
    """The same tree of booleans: whether weight decay applies to a parameter, judged by its name.

    All decay but norm scales (`norm`, `*_norm`) and biases (`bias`, `*_bias`).
    """

    def by_name(path, _) -> bool:
        return path[-1].key.rsplit("_", 1)[-1] not in ("norm", "bias")

    return jax.tree_util.tree_map_with_path(by_name, params)


def _in_float32(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """Runs `inner` on float32 copies; the caller's `apply_updates` rounds the sum once."""

    def cast(tree):
        return jax.tree.map(lambda x: x.astype(jnp.float32), tree)

    def init(params):
        return inner.init(cast(params))

    def update(updates, state, params=None):
        return inner.update(cast(updates), state, None if params is None else cast(params))

    return optax.GradientTransformation(init, update)
