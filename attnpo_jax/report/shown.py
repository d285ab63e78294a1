"""Which pairs a page shows token by token, and what their tokens say.

Shapes: as in `data.batching`.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from attnpo_jax.data.prepared import Prepared
from attnpo_jax.data.token_bytes import TokenBytes
from attnpo_jax.runtime.printable import printable


@dataclasses.dataclass(frozen=True)
class Shown:
    """Some rows of prepared datasets, which batches are made of as of a whole one.

    Attributes:
      datasets: by split, all with the same judged layers and columns; at least one.
      places: of each shown pair, its split and its row there.
    """

    datasets: Mapping[str, Prepared]
    places: Sequence[tuple[str, int]]

    @classmethod
    def alike(cls, datasets: Mapping[str, Prepared]) -> dict[str, Prepared]:
        """Those that have pairs, and the same layers and columns as the first of these."""
        some = {split: dataset for split, dataset in datasets.items() if len(dataset)}
        first = next(iter(some.values()), None)

        def has(dataset: Prepared) -> tuple[object, ...]:
            more = dataset.whole_responses
            return dataset.source_layers, dataset.columns, dataset.groups, more

        return {split: one for split, one in some.items() if has(one) == has(first)}

    @classmethod
    def of(cls, datasets: Mapping[str, Prepared], rows: Mapping[str, np.ndarray]) -> "Shown":
        """Rows of each split, in order."""
        places = [(split, row) for split, some in rows.items() for row in some.tolist()]
        return cls(datasets, places)

    @property
    def source_layers(self) -> tuple[int | str, ...]:
        return self._first.source_layers

    @property
    def columns(self) -> tuple[str, ...]:
        return self._first.columns

    @property
    def groups(self) -> tuple[str, ...]:
        return self._first.groups

    @property
    def whole_responses(self) -> bool:
        return self._first.whole_responses

    @property
    def num_layers(self) -> int:
        return self._first.num_layers

    @property
    def _first(self) -> Prepared:
        return next(iter(self.datasets.values()))

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        split, row = self.places[index]
        return self.datasets[split][row]

    def lengths(self) -> dict[str, np.ndarray]:
        """As `Prepared.lengths` has them."""
        of = {split: dataset.lengths() for split, dataset in self.datasets.items()}
        return {
            part: np.array([of[split][part][row] for split, row in self.places], np.int32)
            for part in ("prompt", "chosen", "rejected")
        }

    def some(self, which: np.ndarray) -> "Shown":
        """Those of some numbers."""
        return Shown(self.datasets, [self.places[k] for k in which.tolist()])


def choose(counts: Mapping[str, int], most: int) -> dict[str, np.ndarray]:
    """Rows of each split, spread evenly; held-out ones have half the room, and what is left.

    Args:
      counts: rows there are, by split.
      most: of all splits together.

    >>> {split: rows.tolist() for split, rows in choose({"train": 9, "eval": 2}, 5).items()}
    {'eval': [0, 1], 'train': [0, 4, 8]}
    """
    held_out, train = counts.get("eval", 0), counts.get("train", 0)
    first = min(held_out, max(-(-most // 2), most - train))
    wanted = {"eval": first, "train": min(train, most - first)}
    return {split: spread(counts[split], wanted[split]) for split in wanted if split in counts}


def spread(count: int, most: int) -> np.ndarray:
    """At most so many of the numbers below `count`, evenly apart, ascending."""
    return np.unique(np.linspace(0, count - 1, max(0, min(count, most))).round().astype(np.int64))


class TokenTexts:
    """What single tokens say, in a form that is safe to show.

    Args:
      tokenizer: the model's; None where it can't be had: tokens are then their ids.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer | None):
        self._tokenizer = tokenizer
        self._bytes = None if tokenizer is None else TokenBytes(tokenizer)
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """A token's text; bytes that are no character on their own are written out."""
        if token not in self._known:
            self._known[token] = printable(self._read(token))
        return self._known[token]

    def _read(self, token: int) -> str:
        if self._tokenizer is None:
            return f" {token}"
        content = self._bytes(token)
        if content is not None:
            return content.decode("utf-8", errors="backslashreplace")
        return self._tokenizer.decode([token], skip_special_tokens=False)

    def joined(self, tokens: Sequence[int]) -> str:
        """The text of several tokens, of which characters may be made together."""
        if self._tokenizer is None:
            return "".join(map(self, tokens))
        return printable(self._tokenizer.decode(list(tokens), skip_special_tokens=False))


def common_ends(prompts: Sequence[np.ndarray], share: float = 0.9) -> tuple[list[int], list[int]]:
    """The tokens that most prompts begin with, and those that most end with: a template's.

    Args:
      prompts: int32 ids.
      share: of the prompts, that have them; others are shown whole.

    >>> a, b, c = np.array([1, 2, 3, 9]), np.array([1, 2, 4, 9]), np.array([1, 2, 5, 6, 9])
    >>> common_ends([a, b, c])
    ([1, 2], [9])
    """
    opening = _common(prompts, share)
    closing = _common([prompt[len(opening) :][::-1] for prompt in prompts], share)
    return opening, closing[::-1]


def without(ids: list[int], opening: list[int], closing: list[int]) -> list[int]:
    """A prompt's tokens, if it has both ends, without them."""
    last = len(ids) - len(closing)
    has_both = len(opening) < last and ids[: len(opening)] == opening and ids[last:] == closing
    return ids[len(opening) : last] if has_both else ids


def _common(sequences: Sequence[np.ndarray], share: float) -> list[int]:
    """The longest beginning that so many of the sequences have, and go on after; at least two."""
    found: list[int] = []
    alike = list(sequences)
    while True:
        nexts = [int(one[len(found)]) for one in alike if len(one) > len(found) + 1]
        if len(nexts) < 2:
            return found
        token = max(set(nexts), key=nexts.count)
        if nexts.count(token) < max(2, share * len(sequences)):
            return found
        place = len(found)
        alike = [one for one in alike if len(one) > place + 1 and one[place] == token]
        found.append(token)
