"""How long the pairs are that a plan is made for, and the batches of them, as shapes alone."""

import dataclasses
from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp

from attnpo_jax.data.batch_plan import Microbatches
from attnpo_jax.data.batching import PairBatch, RowShape, fill_rows
from attnpo_jax.data.packing import round_up
from attnpo_jax.plan.accelerators import PlanError

# Tokens of the default judge prompt without its slots, chat template included: about as many in
# every vocabulary.
_TEMPLATE = 192


@dataclasses.dataclass(frozen=True)
class Lengths:
    """Tokens of the pair that all pairs are taken to be like."""

    prompt: int  # tokens of the prompt
    response: int  # tokens of each response
    judge_prefix: int  # tokens that both orders of the judge prompt begin with
    judge_order: int  # tokens of the judge prompt in one order, `judge_prefix` included

    @classmethod
    def of(cls, config: Any, row: int | None = None, response: int | None = None) -> "Lengths":
        """The pair of a given row length, or the longest that the config lets through.

        Args:
          config: its `data` and `judge` sections say what is cut off.
          row: tokens of prompt and both responses. None: the most there can be, two responses that
            are cut off behind a prompt of one token.
          response: tokens of each response. None: a third of the row, or more where the config
            would cut prompt and response off otherwise.
        """
        longest = config.data.max_length
        row = 2 * longest - 1 if row is None else row
        if not 3 <= row < 2 * longest:
            raise PlanError(
                f"--row-length={row}: accepted: 3 to {2 * longest - 1}, with data.max_length = "
                f"{longest}"
            )
        if response is None:
            response = max(row - longest, row // 3)
        prompt = row - 2 * response
        if response < 1 or prompt < 1 or prompt + response > longest:
            raise PlanError(
                f"--response-length={response}: accepted for rows of {row} tokens: "
                f"{max(1, row - longest)} to {(row - 1) // 2}"
            )
        answer, limit = response, config.judge.max_length - 1
        if _TEMPLATE + prompt + 2 * answer > limit:
            answer = min(answer, config.judge.max_answer_length)
        prefix = max(1, min(_TEMPLATE + prompt, limit - 2 * answer))
        return cls(prompt, response, prefix, min(limit, prefix + 2 * answer))

    @property
    def row(self) -> int:
        return self.prompt + 2 * self.response

    @property
    def judge_row(self) -> int:
        return 2 * self.judge_order - self.judge_prefix


@dataclasses.dataclass(frozen=True)
class Batching:
    """How many rows a program takes at a time."""

    microbatches: int  # how many of them a step accumulates over
    rows: int  # rows of a microbatch; a pair each, some empty where they are too many
    pairs: int  # pairs of all microbatches

    @classmethod
    def training(cls, config: Any, row_shards: int) -> "Batching":
        pairs = config.train.batch_size
        microbatches = Microbatches.of(pairs, config.train.microbatch_size, row_shards)
        most = microbatches.most_rows(1, 1)  # of rows of one pair
        of_group = microbatches.rows_for(-(-pairs // microbatches.groups), most)
        return cls(*microbatches.cut(of_group, most), pairs)

    @classmethod
    def preparing(cls, config: Any, row: int, row_shards: int) -> "Batching":
        rows = max(1, min(config.judge.batch_size, config.judge.token_budget // round_up(row)))
        rows = round_up(rows, row_shards)
        return cls(1, rows, rows)


def train_batch(
    lengths: Lengths,
    batching: Batching,
    num_sources: int,
    num_columns: int = 0,
    groups: Collection[str] = ("reference_logps",),
    whole_responses: bool = False,
) -> PairBatch:
    """A training batch (n, B, ...) as `jax.ShapeDtypeStruct`s."""
    one = reference_batch(lengths, 1, num_sources, num_columns, groups, whole_responses)
    n_B = batching.microbatches, batching.rows
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((*n_B, *x.shape[1:]), x.dtype), one)


def reference_batch(
    lengths: Lengths,
    rows: int,
    num_sources: int = 0,
    num_columns: int = 0,
    groups: Collection[str] = ("reference_logps",),
    whole_responses: bool = False,
) -> PairBatch:
    """A batch (B, ...) for the reference's pass, as `jax.ShapeDtypeStruct`s."""
    shape = RowShape(
        length=round_up(lengths.row),
        scored=round_up(2 * lengths.response),
        response=round_up(lengths.response),
    )
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
        fill_rows([[]], shape, num_sources, num_columns, groups, whole_responses),
    )


def judge_rows(lengths: Lengths, rows: int) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Tokens, positions, branches and read positions for the judge's pass, as shapes."""
    tokens = jax.ShapeDtypeStruct((rows, round_up(lengths.judge_row)), jnp.int32)
    return tokens, tokens, tokens, jax.ShapeDtypeStruct((rows, 2), jnp.int32)
