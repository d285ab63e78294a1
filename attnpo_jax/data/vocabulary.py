"""Whether token ids have a row in the model's embedding.

A tokenizer may have more tokens than its model: one that was given new tokens, or another model's.
JAX reads the last row for any id beyond it, so nothing else would tell. Only ids that occur count:
a tokenizer's spare tokens do no harm.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.runtime.errors import UserError


def may_exceed(tokenizer: ChatTokenizer, vocab_size: int) -> bool:
    """Whether the tokenizer has any token beyond a vocabulary of this size."""
    return max(tokenizer.tokenizer.get_vocab().values()) >= vocab_size


def check_ids(
    tokenizer: ChatTokenizer, vocab_size: int, sequences: Mapping[str, Any], where: str
) -> None:
    """Checks ids of any sequences that a model is to read.

    Args:
      tokenizer: what made them.
      vocab_size: the rows of the model's embedding.
      sequences: ids (n,) by what they are of, as "prompt".
      where: names what holds them, as "pair 7".

    Raises:
      UserError: an id is `vocab_size` or more; it names the token.
    """
    for part, ids in sequences.items():
        ids = np.asarray(ids)
        beyond = ids[ids >= vocab_size]
        if len(beyond):
            first = int(beyond[0])
            token = tokenizer.tokenizer.convert_ids_to_tokens(first)
            raise UserError(
                f"{where}: the {part} holds the token {token!r}, whose id {first} is beyond "
                f"the model's vocab_size = {vocab_size}; accepted: the model's own tokenizer "
                f"(this one: {tokenizer.origin}), or a model whose embeddings were resized for it"
            )


def check_rows(
    tokenizer: ChatTokenizer, vocab_size: int, rows: Iterable[Mapping[str, Any]], where: str
) -> None:
    """Checks the ids of a prepared dataset's rows, where the tokenizer has any beyond the
    vocabulary.

    Raises:
      UserError: as `check_ids`.
    """
    if not may_exceed(tokenizer, vocab_size):
        return
    parts = ("prompt", "chosen", "rejected")
    for row in rows:
        sequences = {part: row[f"{part}_ids"] for part in parts}
        check_ids(tokenizer, vocab_size, sequences, f"{where}, pair {row['id']}")
