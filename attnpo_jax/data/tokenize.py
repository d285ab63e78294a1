"""The tokenization of conversations, and of preference pairs for training.

Tokens are those of the text that the chat template gives for the very conversation, save that
control tokens which messages spell are text: all that stand in what users, systems and tools say,
and in what the assistant says those that it does not emit itself, as the end of a turn.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
import transformers

from attnpo_jax.data import long_text, tokenizer_files
from attnpo_jax.data.chat_template import ChatTemplate, Conversation, spelled_places
from attnpo_jax.data.control_tokens import Piece, TextEncoder, cut, pieces_of
from attnpo_jax.data.long_text import Near
from attnpo_jax.data.pair import SIDES, BadExample, Message, Pair
from attnpo_jax.data.responses import border_of, write_response, writes_plainly
from attnpo_jax.data.template_process import process
from attnpo_jax.data.trained import AS_USUAL, Cut, TrainedForm, WholeResponse, prompts
from attnpo_jax.runtime.errors import UserError

# Tokens more than are kept, of long texts: the border between prompt and responses may shift.
_SPARE = 64
# Control tokens of a text are looked for in stretches of so many characters, and beyond their ends.
_STRETCH, _BEYOND = 1 << 16, 1 << 10
_NO_IDS, _NO_SPANS = np.zeros(0, np.int32), np.zeros((0, 2), np.int32)


@dataclasses.dataclass(frozen=True)
class TokenizedPair:
    """A pair as it is trained on.

    Attributes:
      prompt_ids: int32 (P,).
      chosen_ids, rejected_ids: int32 (T,), closing template tokens included.
      chosen_text_length, rejected_text_length: how many leading tokens of the response are text.
      chosen_spans, rejected_spans: int32 (text length, 2), the text tokens' [start, end) characters
        in the stripped text (`text`); empty for a token before or after it, such as surrounding
        white space.
      prompt_truncated, chosen_truncated, rejected_truncated: whether tokens were cut off to keep
        the allowed lengths.
      rejected_prompt_ids: int32, the rejected response's prompt, if it has one of its own (each
        response keeps its own part of a prompt that is cut); else empty.
      chosen_cut_spans, rejected_cut_spans: int32 (n, 2), as the spans, of the response's first text
        tokens that were cut off.
      written: by side, the stripped text of a response that is more than its content, as the
        template writes it (see `responses.Response`).
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
    rejected_prompt_ids: np.ndarray = dataclasses.field(default_factory=lambda: _NO_IDS)
    chosen_cut_spans: np.ndarray = dataclasses.field(default_factory=lambda: _NO_SPANS)
    rejected_cut_spans: np.ndarray = dataclasses.field(default_factory=lambda: _NO_SPANS)
    written: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def text(self, pair: Pair, side: str) -> str:
        """The stripped text of a response of the pair, `chosen` or `rejected`."""
        return self.written.get(side, getattr(pair, side).strip())

    def prompt_of(self, side: str) -> np.ndarray:
        """The prompt that a response, `chosen` or `rejected`, is trained on after: int32 (P,)."""
        own = side == "rejected" and len(self.rejected_prompt_ids)
        return self.rejected_prompt_ids if own else self.prompt_ids


class ChatTokenizer:
    """A fast tokenizer with its chat template. Make one with `ChatTokenizer.load`."""

    def __init__(
        self,
        tokenizer: transformers.PreTrainedTokenizerBase,
        *,
        origin: str,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        """Wrap a transformers tokenizer; `origin` names it in errors.

        `chat_template_kwargs` are variables of the template. Raises UserError when the tokenizer is
        not a fast one, or has no chat template.
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
        self.template = ChatTemplate(tokenizer, origin, chat_template_kwargs or {})
        self._backend: tokenizers.Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._backend.encode_special_tokens = False
        # Not all control tokens are flagged special; those that the template writes count too.
        written = self.template.text + self.template.tool_text
        self._control = {
            token_id: token
            for token_id, token in self._backend.get_added_tokens_decoder().items()
            if token.special or (token.content.strip() and token.content in written)
        }
        self._is_control = np.zeros(max(self._backend.get_vocab().values()) + 1, bool)
        self._is_control[list(self._control)] = True
        # Taken now: an encoder that these are given to as special tokens flags them so.
        self._words = {token_id for token_id, token in self._control.items() if not token.special}
        self._text_encoder: TextEncoder | None = None
        self._tokenizer_json: bytes | None = None
        self.warned_of_opening = False  # see `responses.border_of`

    @classmethod
    def load(
        cls,
        folder: str | pathlib.Path,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> ChatTokenizer:
        """Load the tokenizer of a Hugging Face folder; `chat_template` (Jinja text) replaces its
        own, `chat_template_kwargs` are variables of the template. Raises UserError as `__init__`.
        """
        process.start()  # which takes as long as the files
        tokenizer, tokenizer_json = tokenizer_files.load(folder)
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        loaded = cls(tokenizer, origin=str(folder), chat_template_kwargs=chat_template_kwargs)
        loaded._tokenizer_json = tokenizer_json
        return loaded

    @property
    def chat_template(self) -> str:
        """The chat template, Jinja text."""
        return self.template.text

    @functools.cached_property
    def _digest(self) -> str:
        named = {k: str(v) for k, v in self.tokenizer.special_tokens_map.items()}
        parts = [
            self._tokenizer_json or self._backend.to_str().encode(),
            json.dumps(named, sort_keys=True).encode(),
            self.template.text.encode(),
        ]
        # Only where there are such things, so that what was prepared without them stays valid.
        if self.template.tool_text != self.template.text:
            parts.append(b"tools: " + self.template.tool_text.encode())
        if self.template.kwargs:
            parts.append(b"kwargs: " + json.dumps(self.template.kwargs, sort_keys=True).encode())
        if not writes_plainly(self):
            parts.append(b"rendered row by row")
        return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()

    def digest(self) -> str:
        """sha256 over tokenizer.json, the special-token names that the template may print, the
        template and its variables.
        """
        return self._digest

    def same_ids(self, other: ChatTokenizer) -> bool:
        """Whether an id stands for the same token in both vocabularies."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def render(
        self,
        messages: Sequence[Message],
        *,
        generation_prompt: bool,
        tools: Sequence[dict[str, Any]] = (),
    ) -> str:
        """The conversation as text, by the chat template.

        Thinking is switched off unless the template's variables say otherwise, and the date is a
        fixed one. Raises BadExample when the template refuses the conversation.
        """
        return self.template.render(Conversation(tuple(messages), tuple(tools), generation_prompt))

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids and [start, end) character offsets of rendered text.

        No special token is added. Control tokens in the text are recognised: for text from users
        see `encode_pieces`.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def encode_conversation(
        self, conversation: Conversation, text: str | None = None, near: Near | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int32 (n,) of a conversation as the template writes it, and their [start, end)
        characters int32 (n, 2) in there; control tokens that messages spell are text.

        Args:
          text: what the template writes, or a beginning of it, where that is known.
          near: which tokens are wanted: of a long text, not all are there then.

        Raises:
          BadExample: the template refuses the conversation, or a control token can't be told from
            the template's own, or the vocabulary has no other way to write it.
        """
        if text is None:
            text = self.template.render(conversation)
        pieces, suspects = [Piece(text)], set()
        while True:
            ids, offsets = self.encode_pieces(pieces, near)
            found = {text[start:end] for start, end, _ in self._places(ids, offsets, text)}
            if found <= suspects:
                return ids, offsets
            # Where some of them are text, tokens from further away may be among those wanted.
            suspects |= found
            spelled = spelled_places(conversation, suspects, self._spelled_in, self.template.render)
            if not spelled:
                return ids, offsets
            pieces = pieces_of(text, [p for p in spelled if p[1] <= len(text)])

    def _encode(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self._backend.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32), np.array(encoding.offsets, np.int32).reshape(-1, 2)

    def controls(self, text: str) -> list[tuple[int, int, int]]:
        """Start and end, in characters, and id of every control token in a text."""
        if len(text) <= _STRETCH:
            return self._places(*self._encode(text), text)
        found = []
        for start in range(0, len(text), _STRETCH):
            first = max(0, start - _BEYOND)
            part = text[first : start + _STRETCH + _BEYOND]
            for at, end, token_id in self._places(*self._encode(part), part):
                if start <= first + at < start + _STRETCH:
                    found.append((first + at, first + end, token_id))
        return found

    def _spelled_in(self, text: str, by_assistant: bool) -> list[tuple[int, int]]:
        return [
            (start, end)
            for start, end, token_id in self.controls(text)
            if not (by_assistant and token_id in self.emitted)
        ]

    def _places(
        self, ids: np.ndarray, offsets: np.ndarray, text: str
    ) -> list[tuple[int, int, int]]:
        places = []
        for i in np.flatnonzero(self._is_control[ids]).tolist():
            start, end = offsets[i].tolist()
            covered = text[start:end]
            # The unknown token stands for a character outside the vocabulary: nobody spelled it.
            if ids[i] == self.tokenizer.unk_token_id and self.tokenizer.unk_token not in covered:
                continue
            # Tokens that strip their surroundings cover white space beside them.
            start += len(covered) - len(covered.lstrip())
            end -= len(covered) - len(covered.rstrip())
            places.append((start, max(start, end), int(ids[i])))
        return places

    @functools.cached_property
    def emitted(self) -> frozenset[int]:
        """Control tokens that are the assistant's own words: those not flagged special, and
        what the template writes for reasoning and tool calls alone.
        """
        emitted = set(self._words)
        call = {"name": "f", "arguments": {"a": "b"}}
        calls = [{"id": "abcdefghi", "type": "function", "function": call}]
        question = {"role": "user", "content": "?"}
        plain = {"role": "assistant", "content": "a"}
        try:
            usual = self.controls(
                self.render([question, plain, question, plain], generation_prompt=False)
            )
        except UserError:
            return frozenset(emitted)
        for content in ("a", ""):
            for fields in ({"tool_calls": calls}, {"reasoning_content": "b"}):
                message = plain | {"content": content} | fields
                try:
                    found = self.controls(self.render([question, message], generation_prompt=False))
                except UserError:
                    continue
                # The last one ends the turn.
                emitted |= {id for *_, id in found[:-1]} - {id for *_, id in usual}
        return frozenset(emitted)

    @functools.cached_property
    def closing(self) -> str | None:
        """What the template writes after an answer, if it writes a plain one as it is."""
        question = {"role": "user", "content": "?"}
        try:
            return self.template.around_answer(Conversation((question,)))[1]
        except UserError:
            return None

    def cut_opening(self, before: str, after: str) -> str:
        """What stands after an answer, without the header of the assistant's next turn, which some
        templates write always; `before` stands before the answer and ends with that header.
        """
        first = next(iter(self.controls(after)), (0, 0, 0))[1]
        end = len(after) - len(after[first:].lstrip())
        opening = after[end:]
        return after[:end] if opening and before.endswith(opening) else after

    def encode_pieces(
        self, pieces: Sequence[Piece], near: Near | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Encode pieces jointly: ids int32 (n,) and [start, end) character offsets int32 (n, 2) in
        the joined text.

        The same as encoding the joined text, but one that is spelled never yields a control token.
        Of a long text, those `near` a place may be all that are there.
        Raises BadExample when that is impossible: a control token of a single character that the
        vocabulary has no other way to write.
        """
        length = sum(len(piece.text) for piece in pieces)
        if near is None or not long_text.is_long(length, near.before + near.after):
            return self._encode_pieces(pieces)

        def encode(start: int, end: int) -> long_text.Tokens:
            ids, offsets = self._encode_pieces(cut(pieces, start, end))
            return ids, offsets + np.int32(start)

        return long_text.around(encode, length, *near)

    def _encode_pieces(self, pieces: Sequence[Piece]) -> tuple[np.ndarray, np.ndarray]:
        text = "".join(piece.text for piece in pieces)
        ids, offsets = self._encode(text)
        plain = not any(piece.spelled for piece in pieces)
        if plain or not self._strays(ids, offsets, text, pieces):
            return ids, offsets
        if self._text_encoder is None:
            self._text_encoder = TextEncoder(self._backend, self._control)
        breaks: set[int] = set()
        while True:
            ids, offsets = self._text_encoder.encode(pieces, breaks)
            strays = self._strays(ids, offsets, text, pieces)
            if not strays:
                return ids, offsets
            for start, end, token_id in strays:
                inside = set(range(start + 1, end)) - breaks
                if not inside:
                    raise BadExample(
                        f"{self.origin}: {text[start:end]!r} in a message can only be encoded "
                        f"as the control token {self._control[token_id].content!r}"
                    )
                breaks.add(min(inside))

    def _strays(
        self, ids: np.ndarray, offsets: np.ndarray, text: str, pieces: Sequence[Piece]
    ) -> list[tuple[int, int, int]]:
        """Places and ids of the control tokens that stem from pieces that are spelled."""
        ends = np.cumsum([len(piece.text) for piece in pieces])
        strays = []
        for start, end, token_id in self._places(ids, offsets, text):
            first = np.searchsorted(ends, start, side="right")
            last = np.searchsorted(ends, max(end - 1, start), side="right")
            if any(piece.spelled for piece in pieces[first : last + 1]):
                strays.append((start, end, token_id))
        return strays


def tokenize_pair(
    tokenizer: ChatTokenizer,
    pair: Pair,
    *,
    max_length: int,
    max_prompt_length: int,
    form: TrainedForm = AS_USUAL,
) -> TokenizedPair:
    """Tokenize a pair for training.

    Prompt and response are the tokens of both together, as the chat template writes them, to the
    end of the response's turn. The prompt ends where the generation prompt does, a response is the
    rest: a token across the border goes with the response, and so does white space that the
    template puts between. Other text there, the same for both responses (an empty thinking block),
    goes with the prompt. Where the generation prompt is not what both responses follow (it opens a
    thinking block that they have not), the prompt ends where it parts from them.

    The prompt keeps its last `max_prompt_length` tokens, a response its first tokens up to
    `max_length` together with the prompt, or as `form` says. Raises BadExample when the template
    does not write what the pair holds, and when a response would be left with no token of its text.
    """
    pair = form.asked(pair, tokenizer.template.text)
    asked = Conversation(pair.prompt, pair.tools, generation_prompt=True)
    opening = tokenizer.template.render(asked)
    names = {i: f"message {i + 1} of the prompt" for i in range(len(pair.prompt))}
    tokenizer.template.check_tools(asked)
    tokenizer.template.check_fields(asked, names)
    responses = {side: write_response(tokenizer, pair, side, opening) for side in SIDES}
    border = border_of(tokenizer, pair, opening, responses)
    near = None
    if form.truncation == "keep_start":
        near = Near(border, max_prompt_length + _SPARE, max_length + _SPARE)
    encoded = {}
    for side, response in responses.items():
        conversation = asked.and_answer(pair.response(side))
        encoded[side] = tokenizer.encode_conversation(conversation, response.rendered, near)
    encoded = _aligned(encoded)
    length = min(int((offsets[:, 1] > border).argmax()) for _, offsets in encoded.values())
    (first, _), (second, _) = encoded.values()
    differs = np.flatnonzero(first[:length] != second[:length])
    length = int(differs[0]) if len(differs) else length

    prompt_ids = first[max(0, length - max_prompt_length) : length]
    tokenized: dict[str, Any] = {}
    cuts = {}
    for side, (ids, offsets) in encoded.items():
        whole = WholeResponse.of(tokenizer, responses[side], ids[length:], offsets[length:], form)
        cuts[side] = cut = Cut.of(prompt_ids, whole.ids, max_length, form.truncation)
        kept = whole.kept(pair.id, side, cut, max_length)
        tokenized |= {f"{side}_{name}": value for name, value in kept.items()}
    shorter = any(cut.start or len(cut.context) < len(prompt_ids) for cut in cuts.values())
    of_both, of_rejected = prompts(cuts)
    written = {s: responses[s].text for s in SIDES if getattr(pair, f"{s}_fields")}
    return TokenizedPair(
        id=pair.id,
        prompt_ids=of_both,
        rejected_prompt_ids=of_rejected,
        prompt_truncated=length > max_prompt_length or shorter,
        written=written,
        **tokenized,
    )


def _aligned(encoded: Mapping[str, long_text.Tokens]) -> dict[str, long_text.Tokens]:
    """Tokens of both sides from the same one of the prompt's on."""
    start = max(int(offsets[0, 0]) for _, offsets in encoded.values())
    begins = {side: offsets[:, 0] >= start for side, (_, offsets) in encoded.items()}
    return {side: (ids[begins[side]], o[begins[side]]) for side, (ids, o) in encoded.items()}
