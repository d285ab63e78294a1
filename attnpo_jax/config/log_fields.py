"""The fields of the section `log`: what a run shows, and whom it reports to."""

from typing import Any

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field
from attnpo_jax.config.profiling import ACCEPTED, profiled


def _is_profiled(value: Any) -> bool:
    if not isinstance(value, str):
        return False
    try:
        profiled(value)
    except ValueError:
        return False
    return True


FIELDS: dict[str, Field] = {
    "log.progress": Field(
        True,
        rules.boolean(),
        "progress bars on the terminal",
    ),
    "log.tensorboard": Field(
        False,
        rules.boolean(),
        "event files in `WORKDIR/tensorboard`; needs the extra `tensorboard`",
    ),
    "log.wandb": Field(
        False,
        rules.boolean(),
        "report to Weights & Biases; needs the extra `wandb`",
    ),
    "log.wandb_project": Field(
        "attnpo_jax",
        rules.text(),
        "the project there",
    ),
    "log.profile": Field(
        "",
        rules.Rule(_is_profiled, ACCEPTED),
        "training steps that JAX's profiler traces, into `WORKDIR/profile`: START is the first, "
        "STOP the first that is not ([performance.md](performance.md#profiles)); `''`: none",
    ),
}
