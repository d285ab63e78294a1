"""Token weights that come with the data, and how they get to the tokens that are trained on.

The form in which the method's authors publish their datasets: beside a pair's texts an example
holds `chosen_tokens` and `rejected_tokens` (the response's tokens as the judge saw them: ids,
texts, or the vocabulary's entries, as `Ġworld`, `▁world` and `<0x0A>`) and, for each source of
weights, `chosen_weights_<name>` and `rejected_weights_<name>`, one number a token, of any sign. A
name is mostly a layer's number, counted from 0; `attention_rollout` is one too. Numbers that are no
weights, such as log-probs under another model, come the same way.

These tokens need not be those that are trained on: another tokenizer may have made them, and the
judge may have seen only the beginning of a response, or the template's text behind it. So they are
read as text, found in the response, and their weights carried over by characters.
"""

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers

from attnpo_jax.data.align import align
from attnpo_jax.data.long_text import shared_beginning
from attnpo_jax.data.pair import SIDES, BadExample, PrecomputedWeights
from attnpo_jax.data.token_bytes import TokenBytes
from attnpo_jax.data.tokenize import TokenizedPair
from attnpo_jax.runtime.errors import UserError

# After a difference, tokens and response are taken to agree again where this many characters do,
# and nothing is looked for further off than that many.
_AGREEMENT, _REACH = 8, 48
# Share of the tokens' characters that must be found in the response.
_LEAST_FOUND = 0.8


def names(fields: Iterable[str]) -> tuple[str, ...]:
    """The names of the weights that an example or table of these fields has for both responses.

    Numbers come last, in ascending order, so that the last name is the last layer's.
    """
    fields = set(fields)
    found = {
        field.removeprefix("chosen_weights_")
        for field in fields
        if field.startswith("chosen_weights_")
        and field.replace("chosen_", "rejected_", 1) in fields
    }
    return tuple(
        sorted(found, key=lambda name: (name.isdecimal(), int(name) if name.isdecimal() else name))
    )


def is_field(name: str) -> bool:
    """Whether a field of this name belongs to precomputed weights."""
    return name.startswith(
        tuple(f"{side}_{part}" for side in SIDES for part in ("weights_", "tokens"))
    )


def fields(columns: Iterable[str]) -> list[str]:
    """The fields of an example that hold these weights and their tokens."""
    return [f"{side}_tokens" for side in SIDES] + [
        f"{side}_weights_{column}" for column in columns for side in SIDES
    ]


def read(example: Mapping[str, Any], columns: Sequence[str]) -> PrecomputedWeights:
    """The weights in an example of a source; BadExample if a field is not what it should be."""
    if not columns:
        raise BadExample("no `chosen_weights_<name>` and `rejected_weights_<name>`")
    tokens, weights = {}, {}
    for side in SIDES:
        tokens[side] = _tokens(example.get(f"{side}_tokens"), f"{side}_tokens")
        length = len(tokens[side])
        weights[side] = np.stack(
            [
                _numbers(example.get(f"{side}_weights_{c}"), f"{side}_weights_{c}", length)
                for c in columns
            ]
        )
    return PrecomputedWeights(tokens, weights)


def _tokens(value: Any, field: str) -> np.ndarray | tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise BadExample(
            f"`{field}` is {_found(value)}; accepted: a list of token ids, of their texts, or of "
            "the vocabulary's entries"
        )
    if all(isinstance(token, str) for token in value):
        return tuple(value)
    if all(_is_number(token, int) and 0 <= token < 2**31 for token in value):
        return np.array(value, np.int32)
    raise BadExample(
        f"`{field}` holds something else than token ids, or than strings (the tokens' texts, or "
        "the vocabulary's entries)"
    )


def _numbers(value: Any, field: str, length: int) -> np.ndarray:
    if not isinstance(value, list):
        raise BadExample(f"`{field}` is {_found(value)}; accepted: a list of numbers, one a token")
    if len(value) != length:
        raise BadExample(f"`{field}` has {len(value)} numbers for {length} tokens")
    if not all(_is_number(x, (int, float)) and math.isfinite(x) for x in value):
        raise BadExample(f"`{field}` holds something else than finite numbers")
    return np.array(value, np.float32)


def _is_number(value: Any, kinds: Any) -> bool:
    # In JSON `true` is no number; in Python it is.
    return isinstance(value, kinds) and not isinstance(value, bool)


def _found(value: Any) -> str:
    return "missing" if value is None else "empty" if value == [] else type(value).__name__


class WeightReader:
    """Carries precomputed weights over to the tokens that are trained on.

    Args:
      tokenizer: what made the tokens, where they are ids or the vocabulary's entries.
      origin: its name, for errors.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str):
        self._tokenizer = tokenizer
        self._origin = origin

    @functools.cached_property
    def _bytes(self) -> "_TokenBytes":
        return _TokenBytes(self._tokenizer, self._origin)

    def carry(
        self, precomputed: PrecomputedWeights, chosen: str, rejected: str, pair: TokenizedPair
    ):
        """Weights of the text tokens of a pair as it is trained on.

        Returns:
          (chosen's, rejected's): float32 (K, text length). Their sums over the tokens are those of
          the precomputed ones, as far as the text was not cut off for training. Where the tokens
          are the same, so are the weights.

        Raises:
          BadExample: the tokens are not those of the responses.
        """
        return tuple(
            self._carry(side, precomputed, text.strip() or " ", pair)
            for side, text in zip(SIDES, (chosen, rejected), strict=True)
        )

    def _carry(
        self, side: str, precomputed: PrecomputedWeights, text: str, pair: TokenizedPair
    ) -> np.ndarray:
        tokens, weights_KT = precomputed.tokens[side], precomputed.weights[side]
        ids = getattr(pair, f"{side}_ids")[: getattr(pair, f"{side}_text_length")]
        located = None
        if not isinstance(tokens, np.ndarray):
            pieces = [token.encode(errors="surrogatepass") for token in tokens]
            located = _locate(pieces, text)
            # A string may be both a text and an entry of the vocabulary. The response tells which
            # is meant: read as texts, entries have marks of spaces and bytes that it has not.
            if (located is None or located[1] < 1) and self._bytes.knows_all(tokens):
                tokens = self._bytes.ids(tokens)
        if isinstance(tokens, np.ndarray):
            common = min(len(tokens), len(ids))
            if np.array_equal(tokens[:common], ids[:common]):
                carried = np.zeros((len(weights_KT), len(ids)), np.float32)
                carried[:, :common] = weights_KT[:, :common]
                return carried
            pieces = [self._bytes(int(token), pair.id) for token in tokens]
            by_id = _locate(pieces, text)
            if located is None or (by_id is not None and by_id[1] > located[1]):
                located = by_id
        if located is None:
            read = b"".join(pieces).decode(errors="replace")
            raise BadExample(
                f"`{side}_tokens` read {read[:40]!r}..., the response {text[:40]!r}...: they are "
                f"of another text, or of another tokenizer than {self._origin} "
                "(data.weights_tokenizer names the one that made them)",
                id=pair.id,
            )
        spans, _ = located
        return align(weights_KT, spans, getattr(pair, f"{side}_spans")).astype(np.float32)


class _TokenBytes:
    """The bytes of the tokens that weights came with."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, origin: str):
        self._origin = origin
        self._id_of = tokenizer.get_vocab()
        self._bytes_of = TokenBytes(tokenizer)

    def knows_all(self, tokens: Iterable[str]) -> bool:
        """Whether all strings are entries of the vocabulary whose bytes can be told."""
        return self._bytes_of.is_readable and all(token in self._id_of for token in tokens)

    def ids(self, tokens: Iterable[str]) -> np.ndarray:
        """The ids, int32 (T,), of entries of the vocabulary."""
        return np.array([self._id_of[token] for token in tokens], np.int32)

    def __call__(self, token_id: int, pair_id: str) -> bytes:
        """The bytes of a token."""
        if not self._bytes_of.is_readable:
            raise UserError(
                f"{self._origin}: neither a byte-level nor a SentencePiece tokenizer; accepted "
                "beside weights: tokens of these, or the tokens' texts instead of their ids"
            )
        known = self._bytes_of(token_id)
        if known is None:
            raise BadExample(
                f"token {token_id} is not in the vocabulary of {self._origin} "
                "(data.weights_tokenizer names the tokenizer that made the tokens)",
                id=pair_id,
            )
        return known


def _locate(pieces: Sequence[bytes], text: str) -> tuple[np.ndarray, float] | None:
    """[start, end) characters (T, 2) in the text of tokens that spell it, or a beginning of it, and
    the share of the characters that was found.

    White space before it, text after it and small differences are passed over: a token without any
    character of the text is empty, at its place. None where too little of them is in the text.
    """
    joined = b"".join(pieces)
    # Bytes that are no character (of one cut in two) count as one each.
    read = joined.decode(errors="surrogateescape")
    spans, share = _match(read, text)
    if share < _LEAST_FOUND:
        return None
    widths = [len(c.encode(errors="surrogateescape")) for c in read]
    char_of_byte = np.repeat(np.arange(len(read)), widths)
    ends = np.cumsum([len(piece) for piece in pieces])
    starts = ends - [len(piece) for piece in pieces]
    # A token without bytes stands where the next one does.
    first = spans[char_of_byte[np.minimum(starts, len(joined) - 1)], 0]
    last = spans[char_of_byte[np.maximum(ends - 1, 0)], 1]
    return np.stack([first, np.where(ends > starts, last, first)], axis=-1), share


def _match(read: str, text: str) -> tuple[np.ndarray, float]:
    """The [start, end) characters of the text (n, 2) that those of `read` are, and the share found:
    of the text, or of what was read where that ends before it.
    """
    spans = np.zeros((len(read), 2), np.int64)
    i = lead = len(read) - len(read.lstrip())
    j = found = 0
    while True:
        run = shared_beginning(read, text, i, j)
        spans[i : i + run] = np.stack([np.arange(j, j + run), np.arange(j + 1, j + run + 1)], -1)
        i, j, found = i + run, j + run, found + run
        near = 2 * _REACH + _AGREEMENT
        ahead = _next_agreement(read[i : i + near], text[j : j + near])
        skipped = len(read) - i if ahead is None else ahead[0]
        spans[i : i + skipped] = j
        if ahead is None:
            break
        i, j = i + ahead[0], j + ahead[1]
    wanted = len(text) if j == len(text) else len(read) - lead
    return spans, found / max(wanted, 1)


def _next_agreement(a: str, b: str) -> tuple[int, int] | None:
    """The least numbers of characters to pass over in each, after which both agree again."""
    for total in range(1, 2 * _REACH + 1):
        fewest, most = max(0, total - _REACH, total + 1 - len(b)), min(total, _REACH, len(a) - 1)
        for skip_a in range(fewest, most + 1):
            skip_b = total - skip_a
            # Most places differ in the first character already.
            if a[skip_a] == b[skip_b]:
                rest_a, rest_b = a[skip_a:][:_AGREEMENT], b[skip_b:][:_AGREEMENT]
                size = min(len(rest_a), len(rest_b))
                if rest_a[:size] == rest_b[:size]:
                    return skip_a, skip_b
    return None
