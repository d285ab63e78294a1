"""Model FLOPs that a result needs, counted from the model's shape and the real lengths.

What is counted: matrix products, a multiplication and its addition as 2. What is not: norms,
softmax, rotary angles, activation functions, the optimizer; padding; anything computed twice, as
rematerialisation does. The rule is that work counts where a wanted number depends on it, once:

- A row `[prefix | branch 1 | branch 2]` runs every token through every layer once. The prefix that
  the two branches share is counted once, and so is what all judge prompts begin with.
- A score (query times key, and its weight times the value) counts for every token and every
  earlier one that it sees: its own branch's and the prefix's, in a layer with a sliding window
  those within it.
- In the last layer, only tokens whose hidden state is read need a query, an attention output and
  the feed-forward block; the others need key and value there. A response's last token predicts
  nothing, so it needs no layer at all.
- The LM head counts for the positions that are read. The prompt's last one predicts the first
  token of both responses and counts once.
- The backward pass takes twice the forward pass: one product for the gradient of each factor.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnpo_jax.models.config import ModelConfig

Seen = Callable[[int | None], int]


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of the parts of a forward pass."""

    key_value: int  # key and value projections of a token in a layer
    query: int  # query projection of a token in a layer
    rest: int  # that, the output projection and the feed-forward block, of a token in a layer
    score: int  # one token's look at one other in a layer, all heads: score and weighted value
    head: int  # logits of one position
    # For each layer, how many tokens up to and with itself one sees; None for all.
    windows: tuple[int | None, ...]

    @classmethod
    def of(cls, config: ModelConfig) -> Costs:
        """The costs of a model."""
        D, H = config.hidden_size, config.head_dim
        N, K, F = config.num_heads, config.num_kv_heads, config.intermediate_size
        return cls(
            key_value=2 * (2 * D * K * H),
            query=2 * D * N * H,
            rest=2 * (2 * D * N * H + 3 * D * F),
            score=2 * (2 * N * H),
            head=2 * D * config.vocab_size,
            windows=config.layer_windows or (None,) * config.num_layers,
        )

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.windows)

    def forward(self, tokens: int, seen: Seen, read: int, seen_by_read: Seen) -> int:
        """A pass whose hidden states are wanted at some positions.

        Args:
          tokens: tokens that run through the layers.
          seen: for a window, the sum over all of them of how many tokens each sees.
          read: positions whose final hidden state is wanted.
          seen_by_read: the same as `seen` for these alone.
        """
        lower = (self.layers - 1) * tokens * (self.key_value + self.rest)
        # A few kinds of layers, many of each.
        for window, layers in Counter(self.windows[:-1]).items():
            lower += layers * seen(window) * self.score
        last = tokens * self.key_value + read * self.rest
        return lower + last + seen_by_read(self.windows[-1]) * self.score


def seen_from(start: int, tokens: int, window: int | None = None) -> int:
    """How many tokens are seen by `tokens` consecutive ones that have `start` before them.

    Each sees those and, of its own, the ones up to itself, but no more than `window` in all.
    """
    inside = tokens if window is None else min(tokens, max(0, window - start))
    full = 0 if window is None else (tokens - inside) * window
    return inside * start + inside * (inside + 1) // 2 + full


def response_logps(config: ModelConfig, prompt: int, responses: Sequence[int]) -> int:
    """Log-probs of all tokens of a pair's responses: the reference's pass over one pair.

    Args:
      prompt: tokens of the prompt.
      responses: tokens of each response, one or more.
    """
    costs = Costs.of(config)
    inner = [n - 1 for n in responses]
    read = 1 + sum(inner)

    def in_branches(window):
        return sum(seen_from(prompt, n, window) for n in inner)

    body = costs.forward(
        tokens=prompt + sum(inner),
        seen=lambda w: seen_from(0, prompt, w) + in_branches(w),
        read=read,
        seen_by_read=lambda w: seen_from(prompt - 1, 1, w) + in_branches(w),
    )
    return body + read * costs.head


def training(config: ModelConfig, prompt: int, responses: Sequence[int]) -> int:
    """Forward and backward pass over one pair."""
    return 3 * response_logps(config, prompt, responses)


def decoded(config: ModelConfig, held: int, tokens: int) -> int:
    """Logits of `tokens` tokens that are read one after the other, with `held` before them."""
    costs = Costs.of(config)

    def seen(window):
        return seen_from(held, tokens, window)

    return costs.forward(tokens, seen, tokens, seen) + tokens * costs.head


def keys_and_values(config: ModelConfig, common: int) -> int:
    """Keys and values of a beginning: of a prompt, or of what all judge prompts share."""
    costs = Costs.of(config)
    return costs.forward(
        common, lambda w: seen_from(0, common, w), read=0, seen_by_read=lambda w: 0
    )


def judge_row(
    config: ModelConfig,
    common: int,
    prefix: int,
    orders: Sequence[int],
    last_layer: int | None = None,
) -> int:
    """Attention rows, and the verdict, of one pair in both orders.

    Args:
      common: tokens that all judge prompts begin with (see `keys_and_values`).
      prefix: tokens both orders begin with, `common` included.
      orders: tokens of each order's prompt, `prefix` included.
      last_layer: the last layer whose attention is wanted, where the verdict is not; else None.
    """
    costs = Costs.of(config)
    if last_layer is not None:
        costs = dataclasses.replace(costs, windows=costs.windows[: last_layer + 1])
    branches = [n - prefix for n in orders]
    body = costs.forward(
        tokens=prefix - common + sum(branches),
        seen=lambda w: (
            seen_from(common, prefix - common, w) + sum(seen_from(prefix, n, w) for n in branches)
        ),
        read=len(branches),
        seen_by_read=lambda w: sum(seen_from(n - 1, 1, w) for n in orders),
    )
    if last_layer is None:
        return body + len(branches) * costs.head
    # Of the last layer, keys, and the queries and scores of the read positions.
    tokens = prefix - common + sum(branches)
    scored = sum(seen_from(n - 1, 1, costs.windows[-1]) for n in orders)
    values = tokens * costs.key_value // 2 + scored * costs.score // 2
    return body - values - len(branches) * (costs.rest - costs.query)
