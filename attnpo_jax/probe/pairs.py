"""Pairs whose responses differ in places that are known: each marked, in characters.

A row is a pair in any form that `data.sources` reads, and beside it, all optional:

- `chosen_spans`, `rejected_spans`: lists of [start, end), characters of the response's text as it
  stands in the row (of the last turn's content, where the column holds a conversation);
- `subset`, or another column: figures are also given for each; `builtin:planted` has the subsets
  plain, filler and late, and `kind`;
- `group`: rows of one group are variants of one another, and count as one in intervals.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data.columns import AS_THEY_ARE, Columns
from attnpo_jax.data.other_columns import other_columns
from attnpo_jax.data.pair import SIDES, BadExample, Pair
from attnpo_jax.data.sources import load_pairs
from attnpo_jax.data.tokenize import TokenizedPair

BUILTIN = "builtin:planted"
SUBSET = "subset"


@dataclasses.dataclass(frozen=True)
class MarkedPair:
    """A pair and its marks.

    Attributes:
      pair: the pair.
      spans: by side, [start, end) in characters of the response; empty where nothing is marked.
      subset: which figures are given apart; "" for none.
      stratum: which pairs' places are like this one's; the column `subset`, "" for none.
      group: rows of one group are no independent pairs.
    """

    pair: Pair
    spans: Mapping[str, tuple[tuple[int, int], ...]]
    subset: str
    stratum: str
    group: str

    @property
    def marked(self) -> bool:
        return any(self.spans.values())


@dataclasses.dataclass(frozen=True)
class Marked:
    """What was loaded: the pairs, their digest, and the examples that were left out."""

    pairs: tuple[MarkedPair, ...]
    digest: str
    bad_rows: tuple[dict[str, Any], ...]


def load(source: Any, columns: Columns, *, by: str = SUBSET, on_bad_row: str, limit: int) -> Marked:
    """Reads pairs with their marks.

    Args:
      source: see `data.sources`.
      columns: how the columns of pairs are read; not those of `BUILTIN`.
      by: the column that tells subsets.
      on_bad_row, limit: see `load_pairs`.

    Raises:
      BadExample: an example is no pair, or its marks are not as described above, and it is not to
        be skipped.
      UserError: there is no pair.
    """
    columns = AS_THEY_ARE if source == BUILTIN else columns
    loaded = load_pairs(source, on_bad_row=on_bad_row, columns=columns, max_example_bytes=limit)
    found, bad, places = [], list(loaded.bad_rows), set()
    beside_them = [*(f"{side}_spans" for side in SIDES), by, SUBSET, "group"]
    for pair, beside in other_columns(loaded.pairs, beside_them, limit):
        try:
            marked = _marked(pair, beside, by)
            if marked.marked and pair.origin in places:
                raise BadExample("an example of several pairs has spans; accepted: one pair a row")
        except BadExample as error:
            error = BadExample.of(pair, error.reason)
            if on_bad_row == "error":
                raise error from None
            bad.append(error.as_record())
            continue
        places.add(pair.origin)
        found.append(marked)
    if not found:
        raise BadExample(f"all {len(bad)} examples are bad, the first one: {bad[0]['reason']}")
    return Marked(tuple(found), loaded.pairs.digest, tuple(bad))


def _marked(pair: Pair, beside: Mapping[str, Any], by: str) -> MarkedPair:
    spans = {side: _spans(beside, side, len(getattr(pair, side))) for side in SIDES}
    named = []
    for name, default in ((by, ""), (SUBSET, ""), ("group", pair.id)):
        value = beside.get(name)
        if not isinstance(value, str | int | None) or isinstance(value, bool):
            raise BadExample(f"`{name}` is {value!r:.60}; accepted: a text or a whole number")
        named.append(default if value is None else str(value))
    return MarkedPair(pair, spans, *named)


def _spans(beside: Mapping[str, Any], side: str, length: int) -> tuple[tuple[int, int], ...]:
    value = beside.get(f"{side}_spans")
    if value is None:
        return ()
    accepted = f"a list of [start, end), characters of `{side}`, 0 <= start < end <= {length}"
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise BadExample(f"`{side}_spans` is {value!r:.60}; accepted: {accepted}")
    for span in value:
        whole = isinstance(span, Sequence) and all(type(at) is int for at in span)
        if not whole or len(span) != 2 or not 0 <= span[0] < span[1] <= length:
            raise BadExample(f"`{side}_spans` holds {span!r:.60}; accepted: {accepted}")
    return tuple((start, end) for start, end in value)


def token_mask(marked: MarkedPair, tokenized: TokenizedPair, side: str) -> np.ndarray:
    """Which of a response's text tokens have a marked character: bool (T,).

    Tokens that were cut off are not there, so all may be False.

    Raises:
      BadExample: the chat template writes another text than the response, which marks don't fit.
    """
    content, text = getattr(marked.pair, side), tokenized.text(marked.pair, side)
    spans_T2 = getattr(tokenized, f"{side}_spans")
    mask_T = np.zeros(len(spans_T2), bool)
    if not marked.spans[side]:
        return mask_T
    shift = content.find(text)
    if shift < 0:
        raise BadExample.of(
            marked.pair,
            f"the chat template writes another text for `{side}`, which `{side}_spans` does not "
            "fit; accepted: a response that it writes as it is",
        )
    for start, end in marked.spans[side]:
        mask_T |= (spans_T2[:, 0] < end - shift) & (spans_T2[:, 1] > start - shift)
    return mask_T
