"""Carries per-token mass from one tokenization of a text to another, by characters."""

import numpy as np


def align(
    mass: np.ndarray,
    source_spans: np.ndarray,
    target_spans: np.ndarray,
    source_ids: np.ndarray | None = None,
    target_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Mass (..., n_target) of the target tokens, float64, from the mass (..., n_source) of the
    source tokens.

    source_spans (n_source, 2) and target_spans (n_target, 2) are [start, end) character places in
    the same text. The text is cut at every place that no token of either side straddles. Between
    two cuts where both sides have the same spans, and the same ids if both are given, mass is
    copied token by token. Elsewhere a source token's mass is spread evenly over its characters, and
    a target token collects the mass of its characters; several targets over one character share it
    evenly.

    Characters between two tokens, or before the first, belong to the token that follows. A source
    token without characters passes its mass to its namesake among the targets without characters,
    or else to the character it stands before (the last one, at the end of the text); a target token
    without characters gets nothing else.

    The sum of the mass is kept, to rounding, as far as the target covers the text. Mass beyond the
    target's last character (the response was cut for training) is lost, and characters beyond the
    source's last one (it was cut for the judge) have no mass. Raises ValueError when the shapes do
    not fit together.
    """
    mass = np.asarray(mass, np.float64)
    source = np.asarray(source_spans, np.int64).reshape(-1, 2)
    target = np.asarray(target_spans, np.int64).reshape(-1, 2)
    if mass.ndim == 0 or mass.shape[-1] != len(source):
        raise ValueError(
            f"mass has shape {mass.shape}, its last axis must match the {len(source)} source spans"
        )
    if (source_ids is None) != (target_ids is None):
        raise ValueError("source_ids and target_ids are needed both or neither")
    source_ids = _token_ids("source_ids", source_ids, source)
    target_ids = _token_ids("target_ids", target_ids, target)
    if np.array_equal(source, target) and np.array_equal(source_ids, target_ids):
        return mass.copy()

    source, target = close_gaps(source), close_gaps(target)
    source_end = int(source[:, 1].max(initial=0))
    target_end = int(target[:, 1].max(initial=0))
    out = np.zeros((*mass.shape[:-1], len(target)))
    if target_end == 0:
        return out
    num_chars = max(source_end, target_end)
    segment_of_char = _segments(source, target, num_chars)
    wide_source, empty_source = _wide_and_empty(source)
    wide_target, empty_target = _wide_and_empty(target)

    copied_source, copied_target = _same_groups(
        segment_of_char[source[wide_source, 0]],
        segment_of_char[target[wide_target, 0]],
        np.column_stack([source, source_ids])[wide_source],
        np.column_stack([target, target_ids])[wide_target],
    )
    copied_source, copied_target = wide_source[copied_source], wide_target[copied_target]
    empty_pairs = _same_groups(
        source[empty_source, 0],
        target[empty_target, 0],
        source_ids[empty_source, None],
        target_ids[empty_target, None],
    )
    copied_source = np.concatenate([copied_source, empty_source[empty_pairs[0]]])
    copied_target = np.concatenate([copied_target, empty_target[empty_pairs[1]]])
    out[..., copied_target] = mass[..., copied_source]

    spread = np.setdiff1d(np.arange(len(source)), copied_source)
    if len(spread):
        # An empty source token stands on the character that inherits its mass.
        spans = source[spread]
        empty = spans[:, 0] == spans[:, 1]
        start = np.minimum(spans[empty, 0], max(source_end, 1) - 1)
        spans[empty] = np.stack([start, start + 1], axis=-1)
        # All wide targets take part: an empty source token may stand in a segment that was copied.
        collected = _by_characters(mass[..., spread], spans, target[wide_target], num_chars)
        out[..., wide_target] += collected
    return out


def _token_ids(name: str, ids: np.ndarray | None, spans: np.ndarray) -> np.ndarray:
    """The ids (n,) of tokens with these spans (n, 2), all 0 where none are given."""
    ids = np.zeros(len(spans)) if ids is None else np.asarray(ids)
    if ids.shape != (len(spans),):
        raise ValueError(f"{name} has shape {ids.shape}, {(len(spans),)} is needed")
    return ids


def _wide_and_empty(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices of the spans (n, 2) with characters, and of those without."""
    wide = spans[:, 1] > spans[:, 0]
    return np.flatnonzero(wide), np.flatnonzero(~wide)


def _by_characters(
    mass: np.ndarray, source: np.ndarray, target: np.ndarray, num_chars: int
) -> np.ndarray:
    """Mass (..., m) of target spans (m, 2) from the mass (..., n) of source spans (n, 2), spread
    evenly over their characters; no span is empty.
    """
    rows = mass.reshape(-1, len(source))
    token, char, width = _characters(source)
    char_mass = _sum_by(rows[:, token] / width[token], char, num_chars)
    token, char, _ = _characters(target)
    owners = np.bincount(char, minlength=num_chars)
    collected = _sum_by(char_mass[:, char] / owners[char], token, len(target))
    return collected.reshape(*mass.shape[:-1], len(target))


def close_gaps(spans: np.ndarray, length: int | None = None) -> np.ndarray:
    """Spans (n, 2) that cover the text: characters no token has are given to the next that has any.

    With a `length` of the text, characters after the last token are given to that one.
    """
    spans = spans.copy()
    spans[:, 1] = np.maximum(spans[:, 0], spans[:, 1])
    wide = spans[:, 1] > spans[:, 0]
    reached = np.maximum.accumulate(np.concatenate([[0], spans[wide, 1]]))[:-1]
    spans[wide, 0] = np.minimum(spans[wide, 0], reached)
    if length is not None and wide.any():
        last = np.flatnonzero(wide)[-1]
        spans[last, 1] = max(spans[last, 1], length)
    return spans


def _segments(source: np.ndarray, target: np.ndarray, num_chars: int) -> np.ndarray:
    """Segment number (num_chars,) of every character; segments meet where no token of either side
    straddles.
    """
    spans = np.concatenate([source, target])
    spans = spans[spans[:, 1] > spans[:, 0] + 1]
    opened = np.bincount(spans[:, 0] + 1, minlength=num_chars + 1)
    closed = np.bincount(spans[:, 1], minlength=num_chars + 1)
    straddled = np.cumsum(opened - closed)[:num_chars] > 0
    return np.cumsum(~straddled) - 1


def _same_groups(
    source_group: np.ndarray,
    target_group: np.ndarray,
    source_key: np.ndarray,
    target_key: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices of source and target tokens, paired in order, of the groups that hold equal keys on
    both sides.

    source_group (n,), target_group (m,): the tokens' groups (not negative). source_key (n, k),
    target_key (m, k).
    """
    num_groups = int(max(source_group.max(initial=-1), target_group.max(initial=-1))) + 1
    counts_match = np.bincount(source_group, minlength=num_groups) == np.bincount(
        target_group, minlength=num_groups
    )
    source_order = np.argsort(source_group, kind="stable")
    target_order = np.argsort(target_group, kind="stable")
    source_order = source_order[counts_match[source_group[source_order]]]
    target_order = target_order[counts_match[target_group[target_order]]]
    differs = (source_key[source_order] != target_key[target_order]).any(axis=-1)
    equal = np.ones(num_groups, bool)
    equal[source_group[source_order[differs]]] = False
    keep = equal[source_group[source_order]]
    return source_order[keep], target_order[keep]


def _characters(spans: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every (token, character) of the spans (n, 2), as two flat arrays, and the tokens' widths
    (n,).
    """
    width = spans[:, 1] - spans[:, 0]
    token = np.repeat(np.arange(len(spans)), width)
    first = np.cumsum(width) - width
    char = np.arange(len(token)) - first[token] + spans[token, 0]
    return token, char, width


def _sum_by(values: np.ndarray, index: np.ndarray, size: int) -> np.ndarray:
    """Sums (rows, size) of the values (rows, k) that share an index (k,)."""
    rows = len(values)
    flat = (np.arange(rows)[:, None] * size + index).ravel()
    return np.bincount(flat, weights=values.ravel(), minlength=rows * size).reshape(rows, size)
