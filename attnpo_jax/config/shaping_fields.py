"""The fields of the section `shaping`: what is made of the weights that the weighting gives."""

from attnpo_jax.config import rules
from attnpo_jax.config.field import Field

FIELDS: dict[str, Field] = {
    "shaping.top_share": Field(
        1.0,
        rules.positive_share(),
        "of a response's tokens, the share with the highest weights that keep theirs, rounded up; "
        "the others weigh 0",
        decisive=True,
    ),
    "shaping.smooth": Field(
        0,
        rules.integer(0, 64),
        "each weight becomes the mean of those up to this many tokens before and behind it",
        decisive=True,
    ),
    "shaping.normalize": Field(
        "raw",
        rules.one_of("raw", "length", "pair"),
        "`raw` leaves the weights' sums; `length` scales a response's weights so that they sum to "
        "its number of tokens, `pair` those of both responses so that their mean is 1; closing "
        "template tokens count, as they do in DPO",
        decisive=True,
    ),
    "shaping.floor": Field(
        None,
        rules.or_none(rules.number()),
        "no weight is below it; None: no floor",
        mixed=True,
        decisive=True,
    ),
    "shaping.mix": Field(
        1.0,
        rules.share(1, inclusive=True),
        "weights become (1 - mix) + mix times themselves: 0 is DPO, 1 the weighting alone",
        decisive=True,
    ),
}
