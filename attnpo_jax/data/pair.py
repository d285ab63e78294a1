"""A preference pair, the weights that may come with it, and why an example is no pair.

An example is one entry of a source: a line of a file, a place in a list or table.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

import numpy as np

from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.schema import Maybe, Table, Text, Whole

SIDES = ("chosen", "rejected")
NUMBERS = ("weight", "margin")
"""What of a pair is a number, where the data have it."""

# `role`, `content` (a text), and what else a chat template may read of a turn: `tool_calls`,
# `reasoning_content`, ... Of these none is null or empty.
Message = dict[str, Any]


@dataclasses.dataclass(frozen=True, eq=False)
class PrecomputedWeights:
    """The token weights that came with a pair, on the tokens that they came with."""

    # By side (`chosen`, `rejected`): ids, int32 (T,), or strings, the tokens' texts or the
    # vocabulary's entries.
    tokens: Mapping[str, np.ndarray | tuple[str, ...]]
    weights: Mapping[str, np.ndarray]  # by side: float32 (K, T), by column and token

    def digest(self) -> bytes:
        """sha256 of tokens and weights."""
        digest = hashlib.sha256()
        for side in SIDES:
            tokens = self.tokens[side]
            ids = isinstance(tokens, np.ndarray)
            digest.update(tokens.tobytes() if ids else json.dumps(tokens).encode())
            digest.update(self.weights[side].tobytes())
        return digest.digest()


@dataclasses.dataclass(frozen=True)
class Pair:
    """A preference pair.

    Attributes:
        id: unique among the pairs that were loaded together.
        prompt: chat messages, the last one the user's or a tool's.
        chosen: the content of the preferred response, as in the source (white space kept).
        rejected: that of the other response, likewise.
        origin: the source, as the user named it, and the example's number there.
        precomputed: token weights that came with the pair, where they were asked for.
        tools: the JSON schemas of the tools that the model may call.
        chosen_fields, rejected_fields: what the responses' messages hold beside role and content.
        numbers: of `NUMBERS`, those that came with the pair: the weight of its loss, and the margin
            that its logits are to have.
    """

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    origin: tuple[str, int] | None = dataclasses.field(default=None, compare=False)
    precomputed: PrecomputedWeights | None = dataclasses.field(default=None, compare=False)
    tools: tuple[dict[str, Any], ...] = ()
    chosen_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rejected_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    numbers: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def response(self, side: str) -> Message:
        """A response, `chosen` or `rejected`, as the assistant's message."""
        fields = getattr(self, f"{side}_fields")
        return {"role": "assistant", "content": getattr(self, side), **fields}


def extra_fields(message: Message) -> dict[str, Any]:
    """What a message holds beside its role and content."""
    return {key: value for key, value in message.items() if key not in ("role", "content")}


class BadExample(UserError):
    """An example that is no pair, or a pair that cannot be tokenized as the config asks.

    Attributes:
        reason: what was found, and what would be accepted.
        file: the source as the user named it; None where it is not known.
        number: 1-based, with `file`: the line in a `.jsonl` file, the place in a list or table.
        id: the example's id, or None when it has none.
    """

    def __init__(
        self, reason: str, file: str | None = None, number: int | None = None, id: str | None = None
    ):
        where = "" if id is None else f"pair {id}: "
        if file is not None:
            where = f"{file}, example {number}: "
        super().__init__(where + reason)
        self.reason, self.file, self.number, self.id = reason, file, number, id

    @classmethod
    def of(cls, pair: Pair, reason: str) -> Self:
        """The example that a pair came from."""
        file, number = pair.origin or (f"pair {pair.id}", 1)
        return cls(reason, file, number, pair.id)

    # What processes tell each other of one.
    FORM = Table(
        {"reason": Text(), "file": Maybe(Text()), "number": Maybe(Whole()), "id": Maybe(Text())}
    )

    def as_json(self) -> dict[str, Any]:
        """Its attributes: `BadExample(**as_json())` is its like in another process."""
        return {name: getattr(self, name) for name in self.FORM.forms}

    def as_record(self) -> dict[str, Any]:
        """The line of `bad_rows.jsonl` for this example; its file and number must be known."""
        record = {"file": self.file, "row": self.number, "reason": self.reason}
        return record if self.id is None else record | {"id": self.id}
