"""The bytes that the tokens of a vocabulary stand for."""

import json

import tokenizers
from tokenizers import pre_tokenizers


class TokenBytes:
    """The bytes that tokens of a byte-level or SentencePiece tokenizer stand for.

    Attributes:
      is_readable: whether the tokenizer is one of these; otherwise no token's bytes are known.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._added = set(tokenizer.get_added_tokens_decoder())
        self._token_of = tokenizer.id_to_token
        self._known: dict[int, bytes | None] = {}
        described = json.loads(tokenizer.to_str())
        parts = [described["decoder"], described["pre_tokenizer"]]
        self._byte_of = bytes_of_characters() if '"ByteLevel"' in json.dumps(parts) else None
        parts.append(described["normalizer"])
        is_sentencepiece = "▁" in json.dumps(parts, ensure_ascii=False)
        self.is_readable = self._byte_of is not None or is_sentencepiece

    def __call__(self, token_id: int) -> bytes | None:
        """The bytes of a token; None where they are not known."""
        if token_id not in self._known:
            self._known[token_id] = self._read(token_id)
        return self._known[token_id]

    def _read(self, token_id: int) -> bytes | None:
        token = self._token_of(token_id)
        if token is None or not self.is_readable:
            return None
        if self._byte_of is not None:
            if token_id in self._added:
                return token.encode()
            return bytes(self._byte_of[character] for character in token)
        if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            return bytes([int(token[3:5], 16)])
        # Runs of spaces may be among the added tokens, as in Gemma's vocabulary.
        return token.replace("▁", " ").encode()


def bytes_of_characters() -> dict[str, int]:
    """The bytes that the characters of byte-level tokens stand for.

    Bytes that are printable in Latin-1 stand for themselves; the others, in order, have the
    characters from U+0100 on.
    """
    others = iter(range(256, 512))
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    table = {chr(b) if b in printable else chr(next(others)): b for b in range(256)}
    if set(table) != set(pre_tokenizers.ByteLevel.alphabet()):
        raise AssertionError("the alphabet of byte-level tokens is another than this one")
    return table
