"""The fields that say what the page of a run shows: the section `report`."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS = {
    "report.enabled": Field(
        True,
        rules.boolean(),
        "whether `attnpo run` and `attnpo sweep` end with a page of what came of them, "
        "`WORKDIR/report.html` ([report.md](report.md))",
    ),
    "report.pairs": Field(
        200,
        rules.integer(0, 100_000),
        "pairs that the page shows token by token, at most, of the held-out and the training ones; "
        "fewer where it would be larger than 5 MB",
    ),
    "report.policy": Field(
        True,
        rules.boolean(),
        "whether it has the trained model's log-probs of these pairs: one pass of the newest "
        "checkpoint, or with `train.keep_best` of the best",
    ),
}
