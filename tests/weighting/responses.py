"""Random responses that have everything a weighting may read."""

import jax.numpy as jnp
import numpy as np

from attnpo_jax import weighting

LAYERS = (0, 5, 11)
COLUMNS = ("mine", "3", "7")

# Of the weightings that read columns.
REQUIRED = {"column": "mine", "against": "3"}


def random_responses(pairs=4, length=9, seed=0, **fields):
    """Two rows a pair, chosen then rejected; the last pair is an empty slot."""
    rng = np.random.default_rng(seed)
    B, T = 2 * pairs, length
    text_lengths = rng.integers(1, T, B)
    text_lengths[-2:] = 0
    place = np.arange(T)
    mask = (place < text_lengths[:, None] + 1) & (text_lengths[:, None] > 0)
    text = place < text_lengths[:, None]
    tokens = np.where(mask, rng.integers(0, 5, (B, T)), -1).astype(np.int32)

    def partners(x):
        return x.reshape(pairs, 2, *x.shape[1:])[:, ::-1].reshape(x.shape)

    def logps():
        return np.where(mask, -rng.exponential(1.5, (B, T)), 0).astype(np.float32)

    columns = np.stack([logps() for _ in COLUMNS], axis=1)
    known = {
        "text_mask_BT": text,
        "judge_B2ST": rng.random((B, 2, len(LAYERS), T), np.float32),
        "verdict_B2": rng.normal(size=(B, 2)).astype(np.float32),
        "reference_logps_BT": logps(),
        "policy_logps_BT": logps(),
        "is_chosen": np.tile([True, False], pairs),
        "source_layers": LAYERS,
        "num_layers": 12,
        "ready_BKT": np.where(text[:, None], columns, 0),
        "weight_columns": COLUMNS,
        "tokens_BT": tokens,
        "partner_tokens_BT": partners(tokens),
        "partner_length_B": partners(mask.sum(axis=-1).astype(np.int32)),
        "reference_entropy_BT": np.where(mask, 2 * rng.random((B, T)), 0).astype(np.float32),
        "policy_entropy_BT": np.where(mask, rng.random((B, T)), 0).astype(np.float32),
        "policy_collision_BT": logps(),
    }
    return weighting.ResponseTokens.of(mask, **known | fields)


def bound(name, **hyperparameters):
    """A registered weighting with a value for every hyperparameter that needs one."""
    contrast = "against" in weighting.hyperparameters(name)
    return weighting.bind(name, (REQUIRED if contrast else {}) | hyperparameters)


def from_toy(golden, **fields):
    """The toy batch of the goldens as rows of pairs, chosen then rejected, in turn."""

    def in_turn(rows):
        rows = jnp.asarray(rows)
        return rows.reshape(2, -1, *rows.shape[1:]).swapaxes(0, 1).reshape(rows.shape)

    mask = in_turn(golden["mask"]).astype(bool)
    lengths = mask.sum(axis=-1)
    return weighting.ResponseTokens.of(
        mask,
        policy_logps_BT=in_turn(golden["policy_logps"]),
        reference_logps_BT=in_turn(golden["reference_logps"]),
        is_chosen=jnp.tile(jnp.array([True, False]), len(mask) // 2),
        partner_length_B=lengths.reshape(-1, 2)[:, ::-1].reshape(-1),
        **{name: x if isinstance(x, tuple) else in_turn(x) for name, x in fields.items()},
    )
