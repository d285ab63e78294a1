"""The fields of the section `log`: what a run shows, and whom it reports to."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

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
}
