"""Chat-template rendering and the tokenization of preference pairs for training.

A chat template is rendered once per conversation shape (its roles), with a marker in place of every
message. So the template's own text and the places of the messages are known exactly, nothing is
searched for in user text, and text that happens to read like a control token is encoded as text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jinja2
import numpy as np
import tokenizers
import transformers

from attnpo_jax.data.align import close_gaps
from attnpo_jax.data.control_tokens import Piece, TextEncoder
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.runtime.errors import UserError

# Private-use characters: templates neither trim them nor branch on them. The letters betray a
# template that changes case.
_MARK = "\ue000aB{}\ue001"
_MARK_RE = re.compile("\ue000aB([0-9]+)\ue001")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_PROBES = " \n\t\r"
# Templates that print today's date would otherwise tokenize the same pair differently every day.
# This hides the function that they ask; the empty expression at its end keeps the line break that
# Jinja would take from behind a block.
_DATE = {"%d": "26", "%m": "07", "%b": "Jul", "%B": "July", "%y": "24", "%Y": "2024"}
_FIXED_DATE = (
    "{%- macro strftime_now(format) -%}{{- format"
    + "".join(f" | replace('{code}', '{value}')" for code, value in _DATE.items())
    + " -}}{%- endmacro -%}{{ '' }}"
)


@dataclasses.dataclass(frozen=True)
class _Slot:
    """The place of a message in a rendered template, and the white space the template trims there.

    left, right: the characters trimmed; None for all white space.
    """

    message: int
    left: str | None
    right: str | None

    def fill(self, content: str) -> Piece:
        kept = content.lstrip(self.left)
        return Piece(kept.rstrip(self.right), self.message, len(content) - len(kept))


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """A pair as it is trained on.

    Attributes:
      prompt_ids: int32 (P,).
      chosen_ids, rejected_ids: int32 (T,), closing template tokens included.
      chosen_text_length, rejected_text_length: how many leading tokens of the response are text.
      chosen_spans, rejected_spans: int32 (text length, 2), the text tokens' [start, end) characters
        in the stripped response; empty for a token that is all surrounding white space.
      prompt_truncated, chosen_truncated, rejected_truncated: whether tokens were cut off to keep
        the allowed lengths.
    """

    id: str
    prompt_ids: np.ndarray
    chosen_ids: np.ndarray
    rejected_ids: np.ndarray
    chosen_text_length: int
    rejected_text_length: int
    chosen_spans: np.ndarray
    rejected_spans: np.ndarray
    prompt_truncated: bool = False
    chosen_truncated: bool = False
    rejected_truncated: bool = False


class ChatTokenizer:
    """A fast tokenizer with its chat template. Make one with `ChatTokenizer.load`."""

    def __init__(self, tokenizer: transformers.PreTrainedTokenizerBase, *, origin: str):
        """Wrap a transformers tokenizer; `origin` names it in errors.

        Raises UserError when the tokenizer is not a fast one, or has no chat template.
        """
        if not tokenizer.is_fast:
            raise UserError(
                f"{origin}: {type(tokenizer).__name__} is a slow tokenizer without character "
                "offsets; a fast one (tokenizer.json) is needed"
            )
        if not tokenizer.chat_template:
            raise UserError(
                f"{origin}: the tokenizer has no chat template; give one in model.chat_template"
            )
        self.tokenizer = tokenizer
        self.origin = origin
        self.chat_template: str = tokenizer.get_chat_template()
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        # Not all control tokens are flagged special; those that the template writes count too.
        self._control = {
            token_id: token
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special or (token.content.strip() and token.content in self.chat_template)
        }
        self._is_control = np.zeros(max(self._backend.get_vocab().values()) + 1, bool)
        self._is_control[list(self._control)] = True
        self._skeletons: dict[tuple, tuple[str | _Slot, ...]] = {}
        self._text_encoder: TextEncoder | None = None
        self._digest: str | None = None

    @classmethod
    def load(cls, folder: str | pathlib.Path, chat_template: str | None = None) -> ChatTokenizer:
        """Load the tokenizer of a Hugging Face folder; `chat_template` (Jinja text) replaces its
        own.

        Raises UserError when the tokenizer is not a fast one, or has no chat template.
        """
        if not any((pathlib.Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
            raise FileNotFoundError(
                f"{folder} holds no tokenizer; model.source must have one of "
                f"{', '.join(_TOKENIZER_FILES)}"
            )
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            str(folder), use_fast=True, trust_remote_code=False
        )
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        loaded = cls(tokenizer, origin=str(folder))
        file = pathlib.Path(folder) / "tokenizer.json"
        if file.is_file():
            loaded._digest = loaded._hash(file.read_bytes())
        return loaded

    def digest(self) -> str:
        """sha256 over tokenizer.json, the special-token names that the template may print, and the
        template.
        """
        if self._digest is None:
            self._digest = self._hash(self._backend.to_str().encode())
        return self._digest

    def _hash(self, tokenizer_json: bytes) -> str:
        named = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        parts = (
            tokenizer_json,
            json.dumps(named, sort_keys=True).encode(),
            self.chat_template.encode(),
        )
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def pieces(self, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> list[Piece]:
        """Render a conversation, and tell the template's text from the messages'.

        The pieces' texts, joined, are what the chat template renders, save that no template
        branches on the contents. Thinking is switched off, and the date is a fixed one. Raises
        BadExample when the template refuses the conversation, and UserError when it alters a
        message by more than trimming it.
        """
        roles = tuple(message["role"] for message in messages)
        key = (roles, generation_prompt)
        if key not in self._skeletons:
            self._skeletons[key] = self._skeleton(roles, generation_prompt)
        return [
            part.fill(messages[part.message]["content"]) if isinstance(part, _Slot) else Piece(part)
            for part in self._skeletons[key]
        ]

    def render(self, messages: Sequence[dict[str, str]], *, generation_prompt: bool) -> str:
        """The conversation as text, by the chat template; see `pieces`."""
        return "".join(
            piece.text for piece in self.pieces(messages, generation_prompt=generation_prompt)
        )

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and [start, end) character offsets of rendered text.

        No special token is added. Control tokens in the text are recognised: for text from users
        see `encode_pieces`.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        """Encode pieces jointly: ids int32 (n,) and [start, end) character offsets int32 (n, 2) in
        the joined text.

        The same as encoding the joined text, but a message's text never yields a control token.
        Raises BadExample when that is impossible: a control token of a single character that the
        vocabulary has no other way to write.
        """
        text = "".join(piece.text for piece in pieces)
        encoding = self._backend.encode(text, add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        offsets = np.array(encoding.offsets, np.int32).reshape(-1, 2)
        if not self._strays(ids, offsets, text, pieces):
            return ids, offsets
        if self._text_encoder is None:
            self._text_encoder = TextEncoder(self._backend, self._control)
        breaks: set[int] = set()
        while True:
            ids, offsets = self._text_encoder.encode(pieces, breaks)
            strays = self._strays(ids, offsets, text, pieces)
            if not strays:
                return ids, offsets
            for i in strays:
                start, end = map(int, offsets[i])
                inside = set(range(start + 1, end)) - breaks
                if not inside:
                    raise BadExample(
                        f"{self.origin}: {text[start:end]!r} in a message can only be encoded "
                        f"as the control token {self._control[int(ids[i])].content!r}"
                    )
                breaks.add(min(inside))

    def _strays(
        self, ids: np.ndarray, offsets: np.ndarray, text: str, pieces: Sequence[Piece]
    ) -> list[int]:
        """Indices of the control tokens that stem from messages' text."""
        found = np.flatnonzero(self._is_control[ids])
        if not len(found):
            return []
        ends = np.cumsum([len(piece.text) for piece in pieces])
        strays = []
        for i in found.tolist():
            start, end = offsets[i].tolist()
            covered = text[start:end]
            # The unknown token stands for a character outside the vocabulary: nobody spelled it.
            if ids[i] == self.tokenizer.unk_token_id and self.tokenizer.unk_token not in covered:
                continue
            # Tokens that strip their surroundings cover white space of the neighbouring piece.
            start += len(covered) - len(covered.lstrip())
            end -= len(covered) - len(covered.rstrip())
            first = np.searchsorted(ends, start, side="right")
            last = np.searchsorted(ends, max(end - 1, start), side="right")
            if any(piece.message is not None for piece in pieces[first : last + 1]):
                strays.append(i)
        return strays

    def _skeleton(self, roles: tuple[str, ...], generation_prompt: bool) -> tuple[str | _Slot, ...]:
        """Texts and slots in turn, a text (maybe empty) first and last."""

        template = self.chat_template
        if "strftime_now" in template:
            template = _FIXED_DATE + template

        def parts(before: str = "", after: str = "") -> list[str]:
            messages = [
                {"role": role, "content": before + _MARK.format(i) + after}
                for i, role in enumerate(roles)
            ]
            try:
                rendered = self.tokenizer.apply_chat_template(
                    messages,
                    chat_template=template,
                    tokenize=False,
                    add_generation_prompt=generation_prompt,
                    enable_thinking=False,
                )
            except jinja2.TemplateError as error:
                raise BadExample(
                    f"{self.origin}: the chat template refuses a conversation of the roles "
                    f"{', '.join(roles)}: {error}"
                ) from error
            return _MARK_RE.split(rendered)

        plain = parts()
        if any(_MARK[0] in text for text in plain):
            raise self._altered("conversation's")
        slots = range(1, len(plain), 2)
        trimmed_left = {k: "" for k in slots}
        trimmed_right = {k: "" for k in slots}
        for probe in _PROBES:
            left, right = parts(before=probe), parts(after=probe)
            for k in slots:
                if left[k - 1 : k + 1] == plain[k - 1 : k + 1]:
                    trimmed_left[k] += probe
                elif left[k - 1 : k + 1] != [plain[k - 1] + probe, plain[k]]:
                    raise self._altered(f"{roles[int(plain[k])]} message's")
                if right[k : k + 2] == plain[k : k + 2]:
                    trimmed_right[k] += probe
                elif right[k : k + 2] != [plain[k], probe + plain[k + 1]]:
                    raise self._altered(f"{roles[int(plain[k])]} message's")
        skeleton: list[str | _Slot] = list(plain)
        for k in slots:
            skeleton[k] = _Slot(
                message=int(plain[k]),
                left=None if trimmed_left[k] == _PROBES else trimmed_left[k],
                right=None if trimmed_right[k] == _PROBES else trimmed_right[k],
            )
        return tuple(skeleton)

    def _altered(self, whose: str) -> UserError:
        return UserError(
            f"{self.origin}: the chat template alters a {whose} text by more than trimming its ends"
        )


def load_backend(source: str) -> tokenizers.Tokenizer:
    """The fast tokenizer of a Hugging Face folder or hub id, without its chat template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    if not tokenizer.is_fast:
        raise UserError(f"{source}: not a fast tokenizer (tokenizer.json)")
    return tokenizer.backend_tokenizer


def tokenize_pair(
    tokenizer: ChatTokenizer, pair: Pair, *, max_length: int, max_prompt_length: int
) -> TokenizedPair:
    """Tokenize a pair for training.

    The prompt is rendered with its generation prompt; a response is its text and the closing
    template text, tokenized on its own. White space that the template puts between the two goes
    with the response; other text there (an empty thinking block) goes with the prompt. The prompt
    keeps its last `max_prompt_length` tokens, a response its first tokens up to `max_length`
    together with the prompt. Raises BadExample naming the pair when a response would be left with
    no token of its text.
    """
    prompt = tokenizer.pieces(pair.prompt, generation_prompt=True)
    responses = {}
    for field, content in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        before, *responses[field] = _split_response(tokenizer, pair, content, prompt)
    prompt_ids, _ = tokenizer.encode_pieces(before)
    excess = max(0, len(prompt_ids) - max_prompt_length)
    prompt_ids = prompt_ids[excess:]
    room = max_length - len(prompt_ids)
    tokenized: dict[str, Any] = {"prompt_truncated": excess > 0}
    for field, (lead, text, closing) in responses.items():
        content = getattr(pair, field)
        ids, offsets = tokenizer.encode_pieces([lead, text, *closing])
        end = len(lead.text) + len(text.text)
        text_length = min(int(np.searchsorted(offsets[:, 0], end)), room)
        if text_length <= 0:
            raise BadExample(
                f"the {field} response is left with no token: the prompt takes "
                f"{len(prompt_ids)} of data.max_length = {max_length} tokens, the response has "
                f"{len(ids)}",
                id=pair.id,
            )
        stripped = content.strip()
        shift = text.trimmed - len(lead.text) - (len(content) - len(content.lstrip()))
        tokenized[f"{field}_ids"] = ids[:room]
        tokenized[f"{field}_text_length"] = text_length
        tokenized[f"{field}_truncated"] = len(ids) > room
        spans = np.clip(offsets[:text_length] + shift, 0, len(stripped))
        whole = len(ids) == text_length or offsets[text_length, 0] >= end
        tokenized[f"{field}_spans"] = close_gaps(spans, len(stripped) if whole else None)
    return TokenizedPair(id=pair.id, prompt_ids=prompt_ids, **tokenized)


def _split_response(
    tokenizer: ChatTokenizer, pair: Pair, content: str, prompt: list[Piece]
) -> tuple[list[Piece], Piece, Piece, list[Piece]]:
    """The prompt, the white space between it and the response, the response, and its closing."""
    messages = [*pair.prompt, {"role": "assistant", "content": content}]
    full = tokenizer.pieces(messages, generation_prompt=False)
    places = [i for i, piece in enumerate(full) if piece.message == len(pair.prompt)]
    if len(places) != 1:
        raise UserError(
            f"{tokenizer.origin}: the chat template writes the last assistant message "
            f"{len(places)} times; once is needed to train on it"
        )
    at = places[0]
    before, text, closing = full[:at], full[at], full[at + 1 :]
    prompt_text = "".join(piece.text for piece in prompt)
    before_text = "".join(piece.text for piece in before)
    between = before_text.removeprefix(prompt_text)
    if not before_text.startswith(prompt_text) or not between:
        return prompt, Piece(""), text, closing
    if between.strip():
        return before, Piece(""), text, closing
    return prompt, Piece(between), text, closing
