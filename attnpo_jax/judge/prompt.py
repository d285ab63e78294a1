"""The judge's prompt: its template, and a pair's tokens in it, in both orders."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from attnpo_jax.data import long_text
from attnpo_jax.data.align import close_gaps
from attnpo_jax.data.chat_template import MARK, Conversation, find_content
from attnpo_jax.data.control_tokens import Piece
from attnpo_jax.data.long_text import Near
from attnpo_jax.data.pair import SIDES, BadExample, Message, Pair, extra_fields
from attnpo_jax.data.responses import response_text
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.runtime.errors import UserError

SLOTS = ("question", "answer_a", "answer_b")
# Tokens by which a text in a prompt may differ from the text alone.
_SPARE = 64
_SLOT_RE = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclasses.dataclass(frozen=True)
class JudgeTemplate:
    """The judge's request, with the slots {question}, {answer_a} and {answer_b}, each once.

    Attributes:
      text: what is asked; a word in braces is a slot, any other brace plain text.
      origin: where the text is from, for messages.
    """

    text: str
    origin: str

    def __post_init__(self):
        found = _SLOT_RE.findall(self.text)
        needed = "each of {question}, {answer_a} and {answer_b} is needed exactly once"
        for name in found:
            if name not in SLOTS:
                raise UserError(
                    f"{self.origin}: unknown slot {{{name}}}; {needed}, and any word in braces is "
                    "taken for a slot: put a space inside the braces to have it as text"
                )
        for name in SLOTS:
            if found.count(name) != 1:
                state = "missing" if name not in found else f"there {found.count(name)} times"
                raise UserError(f"{self.origin}: slot {{{name}}} is {state}; {needed}")

    @classmethod
    def load(cls, source: str | pathlib.Path) -> JudgeTemplate:
        """The template "default", or that of a UTF-8 file, less its last line end."""
        if str(source) == "default":
            file = importlib.resources.files("attnpo_jax.judge") / "templates" / "judge_default.txt"
        else:
            file = pathlib.Path(source)
            if not file.is_file():
                raise FileNotFoundError(
                    f'judge.template: {source} is no file; give a template file or "default"'
                )
        text = file.read_text(encoding="utf-8").removesuffix("\n")
        return cls(text, origin=f"judge template {source}")

    def digest(self) -> str:
        """sha256 of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def fill(self, values: Mapping[str, str]) -> tuple[str, dict[str, tuple[int, int]]]:
        """The text with its slots filled, and each slot's [start, end) characters in it."""
        parts: list[str] = []
        places = {}
        length = done = 0
        for match in _SLOT_RE.finditer(self.text):
            name = match.group(1)
            before = self.text[done : match.start()]
            start = length + len(before)
            length = start + len(values[name])
            places[name] = (start, length)
            parts += [before, values[name]]
            done = match.end()
        parts.append(self.text[done:])
        return "".join(parts), places


@dataclasses.dataclass(frozen=True)
class JudgePrompt:
    """A pair's judge prompts; of two arrays, the first is order 0 (chosen at A)."""

    ids: tuple[np.ndarray, np.ndarray]  # int32 (L,), token ids
    # chosen_tokens, rejected_tokens: int32 (T,), places in `ids` of the tokens of the answer. One
    # that holds template text too is among them, and its attention counts whole.
    chosen_tokens: tuple[np.ndarray, np.ndarray]
    # chosen_spans, rejected_spans: int32 (T, 2), these tokens' [start, end) characters in the
    # stripped response, or in a single space if that is empty.
    chosen_spans: tuple[np.ndarray, np.ndarray]
    rejected_tokens: tuple[np.ndarray, np.ndarray]
    rejected_spans: tuple[np.ndarray, np.ndarray]
    letter_ids: tuple[int, int]  # ids of the letters A and B as the judge would answer them
    # How many first tokens both orders share; each keeps one of its own at least.
    prefix_length: int
    truncated: bool  # whether it was too long, see `JudgePrompter.build`


@dataclasses.dataclass(frozen=True)
class _Order:
    """One order's ids (L,) and character offsets (L, 2), and the slots' [start, end) characters."""

    ids: np.ndarray
    offsets: np.ndarray
    places: dict[str, tuple[int, int]]

    def answer(self, slot: str) -> tuple[np.ndarray, np.ndarray]:
        """Places (T,) and spans (T, 2) of the tokens that carry an answer."""
        start, end = self.places[slot]
        first, last = self.offsets[:, 0], self.offsets[:, 1]
        # The maximum lets a token without characters count at its place.
        inside = np.flatnonzero((first < end) & (np.maximum(last, first + 1) > start))
        spans = close_gaps(np.clip(self.offsets[inside], start, end) - start, end - start)
        return inside.astype(np.int32), spans.astype(np.int32)


class JudgePrompter:
    """Builds judge prompts of less than `max_length` tokens.

    Args:
      max_length: a prompt stays below this many tokens.
      max_answer_length: tokens that an answer keeps where the prompt would be longer.
      trained: the tokenizer of what is trained on, whose template writes responses; None for the
        same one.
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: JudgeTemplate,
        max_length: int,
        max_answer_length: int,
        trained: ChatTokenizer | None = None,
    ):
        self.tokenizer = tokenizer
        self._writer = trained or tokenizer
        self.template = template
        self.max_length = max_length
        self.max_answer_length = max_answer_length
        self._around = self._around_request()
        self.letter_ids = (self._letter("A"), self._letter("B"))
        if self.letter_ids[0] == self.letter_ids[1]:
            raise UserError(
                f"{tokenizer.origin}: the answers A and B start with the same token "
                f"{self.letter_ids[0]}, so there is no verdict to read"
            )

    def build(self, pair: Pair) -> JudgePrompt:
        """A pair's prompts.

        If either order has `max_length` tokens or more, each answer keeps its first
        `max_answer_length` tokens, and then the question its last ones, as many as fit. Both orders
        have the same texts.

        Raises:
          BadExample: not even an empty question fits, or the chat template does not write the
            responses or the judge's request as they are.
        """
        question = conversation_text(pair.prompt, pair.tools)
        chosen, rejected = (response_text(self._writer, pair, side) or " " for side in SIDES)
        truncated = any(map(self._is_too_long, (question, chosen, rejected)))
        if not truncated:
            orders = self._both(question, chosen, rejected)
            truncated = not self._fits(orders)
        if truncated:
            chosen, rejected = self._first_tokens(chosen), self._first_tokens(rejected)
            orders = self._shorten(pair, question, chosen, rejected)
        chosen_tokens, chosen_spans = zip(
            orders[0].answer("answer_a"), orders[1].answer("answer_b"), strict=True
        )
        rejected_tokens, rejected_spans = zip(
            orders[0].answer("answer_b"), orders[1].answer("answer_a"), strict=True
        )
        return JudgePrompt(
            ids=(orders[0].ids, orders[1].ids),
            chosen_tokens=chosen_tokens,
            chosen_spans=chosen_spans,
            rejected_tokens=rejected_tokens,
            rejected_spans=rejected_spans,
            letter_ids=self.letter_ids,
            prefix_length=len(common_beginning(*(order.ids[:-1] for order in orders))),
            truncated=truncated,
        )

    def requests(self, pair: Pair) -> list[Conversation]:
        """What `build` asks the chat template first, as far as the pair alone tells."""
        if pair.chosen_fields or pair.rejected_fields:
            return []
        question = conversation_text(pair.prompt, pair.tools)
        answers = [getattr(pair, side).strip() or " " for side in SIDES]
        if any(self._may_be_too_long(text) for text in (question, *answers)):
            return []
        return [self._ask(self._filled(question, a, b)[0]) for a, b in (answers, answers[::-1])]

    def _filled(
        self, question: str, answer_a: str, answer_b: str
    ) -> tuple[str, dict[str, tuple[int, int]]]:
        return self.template.fill(
            {"question": question, "answer_a": answer_a, "answer_b": answer_b}
        )

    def _may_be_too_long(self, text: str) -> bool:
        return long_text.is_long(len(text), self.max_length + _SPARE)

    def _is_too_long(self, text: str) -> bool:
        """Whether a text alone takes all of a prompt, as far as that is told without a prompt."""
        if not self._may_be_too_long(text):
            return False
        ids, _ = self._encode_near(text, Near(0, 0, self.max_length + _SPARE))
        return len(ids) > self.max_length + _SPARE

    def _encode_near(self, text: str, near: Near) -> tuple[np.ndarray, np.ndarray]:
        return self.tokenizer.encode_pieces([Piece(text, spelled=True)], near)

    def _fits(self, orders: Sequence[_Order]) -> bool:
        return max(len(order.ids) for order in orders) < self.max_length

    def _both(self, question: str, chosen: str, rejected: str) -> tuple[_Order, _Order]:
        return self._order(question, chosen, rejected), self._order(question, rejected, chosen)

    def _order(self, question: str, answer_a: str, answer_b: str) -> _Order:
        text, places = self._filled(question, answer_a, answer_b)
        asked = self._ask(text)
        rendered = self.tokenizer.template.render(asked)
        shift, first, last = self._place(text, rendered)
        places = {
            name: tuple(min(max(at + shift, first), last) for at in place)
            for name, place in places.items()
        }
        ids, offsets = self.tokenizer.encode_conversation(asked, rendered)
        return _Order(ids, offsets, places)

    def _around_request(self) -> tuple[str, str]:
        """What the chat template writes before and after a request."""
        parts = self.tokenizer.template.render(self._ask(MARK)).split(MARK)
        if len(parts) != 2:
            raise UserError(
                f"{self.tokenizer.origin}: the chat template writes a user's message "
                f"{len(parts) - 1} times as it is; once is needed to judge"
            )
        return parts[0], parts[1]

    @staticmethod
    def _ask(text: str) -> Conversation:
        return Conversation(({"role": "user", "content": text},), generation_prompt=True)

    def _place(self, text: str, rendered: str) -> tuple[int, int, int]:
        """How far a request's characters are moved in what is rendered of it, and its [first, last)
        characters there.
        """
        lead = len(text) - len(text.lstrip())
        before, after = self._around
        first, last = len(before), len(rendered) - len(after)
        if rendered.startswith(before) and rendered.endswith(after):
            written = rendered[first:last]
            if written.strip() == text.strip():
                return last - len(written.lstrip()) - lead, first, last
        start = find_content(text, rendered, lambda t: self.tokenizer.template.render(self._ask(t)))
        if start is None:
            raise BadExample(
                f"{self.tokenizer.origin}: the chat template does not write the judge's request "
                "as it is; accepted: texts that it leaves as they are, or another template "
                "(model.chat_template)"
            )
        return start - lead, start, start + len(text.strip())

    def _shorten(
        self, pair: Pair, question: str, chosen: str, rejected: str
    ) -> tuple[_Order, _Order]:
        """The orders with as many of the question's last tokens as fit."""
        if not self._is_too_long(question):
            orders = self._both(question, chosen, rejected)
            if self._fits(orders):
                return orders
        bare = self._both("", chosen, rejected)
        if not self._fits(bare):
            raise BadExample(
                f"the judge prompt takes {max(len(order.ids) for order in bare)} tokens without "
                f"any question, judge.max_length = {self.max_length} allows "
                f"{self.max_length - 1}; lower judge.max_answer_length = {self.max_answer_length} "
                "or raise judge.max_length",
                id=pair.id,
            )
        # Of a long question the last tokens, and more of them than there is room for.
        near = Near(len(question), self.max_length + _SPARE, 0)
        _, offsets = self._encode_near(question, near)
        keep = len(offsets)
        excess = keep - (self.max_length - 1 - max(len(order.ids) for order in bare))
        while True:
            # A cut may change how the edges are tokenized, so the count is checked, not assumed.
            keep -= max(excess, 1)
            if keep <= 0:
                return bare
            cut = len(offsets) - keep
            orders = self._both(question[_boundary(offsets, cut)[1] :], chosen, rejected)
            if self._fits(orders):
                return orders
            excess = max(len(order.ids) for order in orders) - (self.max_length - 1)

    def _first_tokens(self, answer: str) -> str:
        near = Near(0, 0, self.max_answer_length + _SPARE)
        _, offsets = self._encode_near(answer, near)
        if len(offsets) <= self.max_answer_length:
            return answer
        return answer[: _boundary(offsets, self.max_answer_length)[0]]

    def _letter(self, letter: str) -> int:
        """Id of the token that carries the letter where it is all of the assistant's answer."""
        asked = self._ask("?")
        before, after = self.tokenizer.template.around_answer(asked)
        place = len(before)
        answered = asked.and_answer({"role": "assistant", "content": letter})
        ids, offsets = self.tokenizer.encode_conversation(answered, before + letter + after)
        inside = np.flatnonzero((offsets[:, 0] <= place) & (offsets[:, 1] > place))
        if not len(inside):
            raise UserError(f"{self.tokenizer.origin}: the letter {letter} has no token")
        return int(ids[inside[0]])


def conversation_text(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = ()) -> str:
    """The question to judge: a lone user message is its content, as it is.

    A longer conversation is written out, one paragraph a message: "System: …", "User: …",
    "Assistant: …", "Tool: …". Tool calls, reasoning and what else a message holds are lines of JSON
    behind its content, and tools are a first paragraph "Tools: …", one of them a line.
    """
    if len(messages) == 1 and messages[0]["role"] == "user" and not tools:
        return messages[0]["content"]
    paragraphs = []
    if tools:
        paragraphs.append("\n".join(["Tools:", *map(_json, tools)]))
    for message in messages:
        fields = [_json({key: value}) for key, value in extra_fields(message).items()]
        lines = [text for text in (message["content"], *fields) if text or not fields]
        paragraphs.append(f"{message['role'].capitalize()}: " + "\n".join(lines))
    return "\n\n".join(paragraphs)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _boundary(offsets: np.ndarray, k: int) -> tuple[int, int]:
    """Where the text before token k ends and where the text from token k on starts.

    Where the tokens before and after share a character, neither side has it.
    """
    end, start = int(offsets[:k, 1].max()), int(offsets[k, 0])
    return min(end, start), max(end, start)


def common_beginning(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The ids that both begin with."""
    n = min(len(first), len(second))
    differs = np.flatnonzero(first[:n] != second[:n])
    return first[: int(differs[0]) if len(differs) else n]
