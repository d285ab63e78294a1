"""Encoding of rendered conversations in which some control tokens are text, since messages spell
them.
"""

import copy
import dataclasses
import uuid
from collections.abc import Sequence

import numpy as np
import tokenizers


@dataclasses.dataclass(frozen=True)
class Piece:
    """A stretch of a rendered conversation."""

    text: str
    spelled: bool = False  # whether it is text of a message that no control token is to come from


def pieces_of(text: str, spelled: Sequence[tuple[int, int]]) -> list[Piece]:
    """A text in pieces, those at the [start, end) characters `spelled` marked as such."""
    pieces, done = [], 0
    for start, end in sorted(set(spelled)):
        start = max(start, done)
        pieces += [Piece(text[done:start]), Piece(text[start:end], spelled=True)]
        done = max(end, done)
    pieces.append(Piece(text[done:]))
    return [piece for piece in pieces if piece.text]


def cut(pieces: Sequence[Piece], start: int, end: int) -> list[Piece]:
    """The pieces between two characters of their joined text."""
    kept, done = [], 0
    for piece in pieces:
        first, last = max(start - done, 0), min(end - done, len(piece.text))
        if first < last:
            kept.append(dataclasses.replace(piece, text=piece.text[first:last]))
        done += len(piece.text)
    return kept


class TextEncoder:
    """Encodes pieces so that no control token comes from those that are spelled.

    A copy of the tokenizer, in which every control token is switched off, and stands under an alias
    that no text contains. The other pieces are written with the aliases, so all is still encoded in
    one go: segments encoded one by one would each be given the word-start mark that some
    tokenizers put at the beginning.
    """

    def __init__(self, backend: tokenizers.Tokenizer, control: dict[int, tokenizers.AddedToken]):
        self._plain = backend
        self._control = control
        self._nonce = uuid.uuid4().hex
        self._backend = copy.deepcopy(backend)
        self._backend.add_special_tokens(list(control.values()))
        self._backend.encode_special_tokens = True
        self._break = self._add_alias("break", tokenizers.AddedToken("", normalized=False))
        self._aliases: dict[int, str] = {}
        self._token_of_alias: dict[int, int] = {}

    def _add_alias(self, name: str, like: tokenizers.AddedToken) -> str:
        alias = f"\ue002{self._nonce}.{name}\ue003"
        token = tokenizers.AddedToken(
            alias,
            single_word=like.single_word,
            lstrip=like.lstrip,
            rstrip=like.rstrip,
            normalized=like.normalized,
            special=False,
        )
        self._backend.add_tokens([token])
        return alias

    def _controls(self, text: str) -> list[tuple[int, int, int]]:
        """Start, end and id of every control token in a text where they are recognised."""
        encoding = self._plain.encode(text, add_special_tokens=False)
        found = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id in self._control:
                content = self._control[token_id].content
                at = text.find(content, start, end)
                if at >= 0:
                    found.append((at, at + len(content), token_id))
        return found

    def encode(self, pieces: Sequence[Piece], breaks: set[int]) -> tuple[np.ndarray, np.ndarray]:
        """Ids (n,) and offsets (n, 2) as of the joined text; no token crosses the character places
        in `breaks`.
        """
        # (start, end, replacement) in the joined text
        edits = [(at, at, self._break) for at in breaks]
        start = 0
        for piece in pieces:
            if not piece.spelled:
                for first, last, token_id in self._controls(piece.text):
                    if token_id not in self._aliases:
                        alias = self._add_alias(str(token_id), self._control[token_id])
                        self._aliases[token_id] = alias
                        self._token_of_alias[self._backend.token_to_id(alias)] = token_id
                    edits.append((start + first, start + last, self._aliases[token_id]))
            start += len(piece.text)
        edits.sort()
        text = "".join(piece.text for piece in pieces)
        # the text with aliases, and each character's place in the joined text
        written, source = [], []
        done = 0
        for first, last, replacement in edits:
            written += [text[done:first], replacement]
            source += [np.arange(done, first), np.full(len(replacement), first)]
            done = last
        written.append(text[done:])
        source.append(np.arange(done, len(text) + 1))
        place = np.concatenate(source)
        encoding = self._backend.encode("".join(written), add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        offsets = place[np.array(encoding.offsets, np.int64).reshape(-1, 2)].astype(np.int32)
        for alias_id, token_id in self._token_of_alias.items():
            ids[ids == alias_id] = token_id
        keep = ids != self._backend.token_to_id(self._break)
        return ids[keep], offsets[keep]
