"""The fields that say which checkpoint is the best, when training stops, and on which pairs."""

from typing import Any

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field
from attnpo_jax.runtime.best import ACCEPTED, Choice


def _is_choice(value: Any) -> bool:
    if not rules.text_or_none().accepts(value):
        return False
    try:
        return not value or bool(Choice.parse(value))
    except ValueError:
        return False


_CHOICE = rules.Rule(_is_choice, f"'', or {ACCEPTED.replace('`', chr(39))}")

IN_TRAINING = {
    "train.pairs": Field(
        0,
        rules.integer(0, 1_000_000_000),
        "how many of the training pairs are trained on, drawn by `seed`, more pairs holding fewer; "
        "0: all",
        decisive=True,
    ),
    "train.keep_best": Field(
        "",
        _CHOICE,
        "the metric of evaluations that says which checkpoint is the best one: it is saved when it "
        "is evaluated, kept beside the newest ones, and evaluated, exported and sampled from in "
        "the newest one's place; `''`: none",
    ),
    "train.early_stopping.metric": Field(
        "",
        _CHOICE,
        "training stops when this metric of evaluations gets no better; `''`: it goes on to its "
        "last step",
    ),
    "train.early_stopping.patience": Field(
        3,
        rules.integer(1, 1_000_000),
        "how many evaluations in a row may not be better than the best one before, that before the "
        "first step included",
    ),
    "train.early_stopping.min_gain": Field(
        0.0, rules.not_negative(), "by how much an evaluation is better, at least, to count so"
    ),
}
