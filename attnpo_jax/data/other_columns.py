"""What stands beside pairs in their sources, in columns that are no part of a pair."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from attnpo_jax.data.pair import Pair
from attnpo_jax.data.readers import open_source
from attnpo_jax.runtime.team import ALONE


def other_columns(
    pairs: Iterable[Pair], names: Sequence[str], limit: int
) -> Iterator[tuple[Pair, dict[str, Any]]]:
    """Each pair, with what its example has in some columns.

    Args:
      pairs: as `sources.load_pairs` has them.
      names: of the columns. An example may lack some, or all.
      limit: bytes that an example may take, see `load_pairs`.
    """

    def select(found: list[str], _: str) -> list[str]:
        return [name for name in names if name in found] or found[:1]

    by_source: dict[str, dict[int, dict[str, Any]]] = {}
    for pair in pairs:
        source, number = pair.origin
        if source not in by_source:
            _, examples = open_source(source, select, ALONE, limit)
            by_source[source] = {
                at: {name: example[name] for name in names if name in example}
                for at, example in examples.read(range(len(examples)))
                if isinstance(example, dict)
            }
        yield pair, by_source[source].get(number, {})
