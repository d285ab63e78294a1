"""Model FLOPs that a result needs, counted from the model's shape and the real lengths.

What is counted: matrix products, a multiplication and its addition as 2. What is not: norms,
softmax, rotary angles, activation functions, the optimizer; padding; anything computed twice, as
rematerialisation does. The rule is that work counts where a wanted number depends on it, once:

- A row `[prefix | branch 1 | branch 2]` runs every token through every layer once. The prefix that
  the two branches share is counted once, and so is what all judge prompts begin with.
- A score (query times key, and its weight times the value) counts for every token and every
  earlier one that it sees: its own branch's and the prefix's.
- In the last layer, only tokens whose hidden state is read need a query, an attention output and
  the feed-forward block; the others need key and value there. A response's last token predicts
  nothing, so it needs no layer at all.
- The LM head counts for the positions that are read. The prompt's last one predicts the first
  token of both responses and counts once.
- The backward pass takes twice the forward pass: one product for the gradient of each factor.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attnpo_jax.models.config import ModelConfig


@dataclasses.dataclass(frozen=True)
class Costs:
    """FLOPs of the parts of a forward pass.

    Attributes:
      key_value: key and value projections of a token in a layer.
      rest: query and output projections and the feed-forward block, of a token in a layer.
      score: one token's look at one other in a layer, all heads: score and weighted value.
      head: logits of one position.
      layers: number of layers.
    """

    key_value: int
    rest: int
    score: int
    head: int
    layers: int

    @classmethod
    def of(cls, config: ModelConfig) -> Costs:
        """The costs of a model whose layers all see the whole row.

        Raises:
          ValueError: a layer has a window; what it sees would be counted wrongly.
        """
        if config.layer_windows is not None:
            raise ValueError("FLOPs of layers with a sliding window are not counted here")
        D, H = config.hidden_size, config.head_dim
        N, K, F = config.num_heads, config.num_kv_heads, config.intermediate_size
        return cls(
            key_value=2 * (2 * D * K * H),
            rest=2 * (2 * D * N * H + 3 * D * F),
            score=2 * (2 * N * H),
            head=2 * D * config.vocab_size,
            layers=config.num_layers,
        )

    def forward(self, tokens: int, seen: int, read: int, seen_by_read: int) -> int:
        """A pass whose hidden states are wanted at some positions.

        Args:
          tokens: tokens that run through the layers.
          seen: over all of them, the sum of how many tokens each sees.
          read: positions whose final hidden state is wanted.
          seen_by_read: the sum of how many tokens these see.
        """
        lower = tokens * (self.key_value + self.rest) + seen * self.score
        last = tokens * self.key_value + read * self.rest + seen_by_read * self.score
        return (self.layers - 1) * lower + last


def seen_from(start: int, tokens: int) -> int:
    """How many tokens are seen by `tokens` consecutive ones that have `start` before them.

    Each sees those and, of its own, the ones up to itself.
    """
    return tokens * start + tokens * (tokens + 1) // 2


def response_logps(config: ModelConfig, prompt: int, responses: Sequence[int]) -> int:
    """Log-probs of all tokens of a pair's responses: the reference's pass over one pair.

    Args:
      config: the model's shape.
      prompt: tokens of the prompt.
      responses: tokens of each response, one or more.
    """
    costs = Costs.of(config)
    inner = [n - 1 for n in responses]
    in_branches = sum(seen_from(prompt, n) for n in inner)
    read = 1 + sum(inner)
    body = costs.forward(
        tokens=prompt + sum(inner),
        seen=seen_from(0, prompt) + in_branches,
        read=read,
        seen_by_read=prompt + in_branches,
    )
    return body + read * costs.head


def training(config: ModelConfig, prompt: int, responses: Sequence[int]) -> int:
    """Forward and backward pass over one pair."""
    return 3 * response_logps(config, prompt, responses)


def judge_common(config: ModelConfig, common: int) -> int:
    """Keys and values of what all judge prompts begin with, once for a whole dataset."""
    costs = Costs.of(config)
    return costs.forward(common, seen_from(0, common), read=0, seen_by_read=0)


def judge_row(config: ModelConfig, common: int, prefix: int, orders: Sequence[int]) -> int:
    """Attention rows and verdict of one pair in both orders.

    Args:
      config: the model's shape.
      common: tokens that all judge prompts begin with (see `judge_common`).
      prefix: tokens both orders begin with, `common` included.
      orders: tokens of each order's prompt, `prefix` included.
    """
    costs = Costs.of(config)
    branches = [n - prefix for n in orders]
    body = costs.forward(
        tokens=prefix - common + sum(branches),
        seen=seen_from(common, prefix - common) + sum(seen_from(prefix, n) for n in branches),
        read=len(branches),
        seen_by_read=sum(orders),
    )
    return body + len(branches) * costs.head
