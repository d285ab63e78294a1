"""Mixtures: several sources of pairs, each with its share of the whole."""

import math
import re
from collections.abc import Sequence
from typing import Any

from attnpo_jax.runtime.errors import UserError

ACCEPTED = (
    "a source, or a tuple of sources, all of them or none with a share: 'a.jsonl*0.7' or "
    "('a.jsonl', 0.7)"
)

_SHARE = re.compile(r"(?P<source>.+?)\s*\*\s*(?P<share>[0-9.]+(?:[eE][+-]?[0-9]+)?)")


def parse(sources: Any) -> list[tuple[str, float | None]]:
    """The sources that `data.train` or `data.eval` names, each with its share or None.

    >>> parse(("a.jsonl*0.7", ("b.jsonl", 0.3)))
    [('a.jsonl', 0.7), ('b.jsonl', 0.3)]
    >>> parse("a.jsonl")
    [('a.jsonl', None)]
    """
    if isinstance(sources, str):
        sources = (sources,) if sources else ()
    if not isinstance(sources, (tuple, list)):
        raise UserError(f"{sources!r}; accepted: {ACCEPTED}")
    parsed = [_parse_one(source) for source in sources]
    if len({share is None for _, share in parsed}) > 1:
        raise UserError(f"{sources!r}: a share for some sources only; accepted: {ACCEPTED}")
    return parsed


def _parse_one(source: Any) -> tuple[str, float | None]:
    share: Any = None
    if isinstance(source, (tuple, list)) and len(source) == 2:
        source, share = source
        if isinstance(share, bool) or not isinstance(share, (int, float)):
            raise UserError(f"share {share!r} of {source!r}; accepted: a number above 0")
    elif isinstance(source, str) and (match := _SHARE.fullmatch(source)):
        source, share = match["source"], float(match["share"])
    if not isinstance(source, str) or not source:
        raise UserError(f"{source!r} is no source; accepted: {ACCEPTED}")
    if share is not None and not (share > 0 and math.isfinite(share)):
        raise UserError(f"share {share!r} of {source!r}; accepted: a number above 0")
    return source, None if share is None else float(share)


def names(sources: Any) -> list[str]:
    """The sources as text, in one form, shares included."""
    return [source if share is None else f"{source}*{share:g}" for source, share in parse(sources)]


def take(available: Sequence[int], shares: Sequence[float]) -> list[int]:
    """How many pairs of each source make the largest mixture with these shares, none used twice.

    The source that is scarcest for its share gives all it has, and the others as many as go with
    that.

    Args:
      available: pairs by source.
      shares: any positive numbers; only their ratios count.

    >>> take([100, 100], [0.75, 0.25])
    [100, 33]
    """
    # The small number makes up for divisions that come out just below a whole one.
    scale = min(count / share for count, share in zip(available, shares, strict=True))
    return [min(n, int(share * scale + 1e-6)) for n, share in zip(available, shares, strict=True)]


def spread(available: int, count: int) -> list[int]:
    """Places of `count` pairs of a source, evenly spread over all of it.

    >>> spread(10, 4)
    [0, 2, 5, 7]
    """
    return [i * available // count for i in range(count)]
