"""The judge's prompt: its template, and a pair's tokens in it, in both orders."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.resources
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from attnpo_jax.data.align import close_gaps
from attnpo_jax.data.pair import BadExample, Pair
from attnpo_jax.data.tokenize import ChatTokenizer, Piece
from attnpo_jax.runtime.errors import UserError

SLOTS = ("question", "answer_a", "answer_b")
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
    """

    def __init__(
        self,
        tokenizer: ChatTokenizer,
        template: JudgeTemplate,
        max_length: int,
        max_answer_length: int,
    ):
        self.tokenizer = tokenizer
        self.template = template
        self.max_length = max_length
        self.max_answer_length = max_answer_length
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
          BadExample: not even an empty question fits.
        """
        question = conversation_text(pair.prompt)
        chosen = pair.chosen.strip() or " "
        rejected = pair.rejected.strip() or " "
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

    def _fits(self, orders: Sequence[_Order]) -> bool:
        return max(len(order.ids) for order in orders) < self.max_length

    def _both(self, question: str, chosen: str, rejected: str) -> tuple[_Order, _Order]:
        return self._order(question, chosen, rejected), self._order(question, rejected, chosen)

    def _order(self, question: str, answer_a: str, answer_b: str) -> _Order:
        text, places = self.template.fill(
            {"question": question, "answer_a": answer_a, "answer_b": answer_b}
        )
        pieces = self.tokenizer.pieces([{"role": "user", "content": text}], generation_prompt=True)
        start, message = _message(self.tokenizer, pieces, 0)
        end = start + len(message.text)
        places = {
            name: tuple(min(max(start + at - message.trimmed, start), end) for at in place)
            for name, place in places.items()
        }
        ids, offsets = self.tokenizer.encode_pieces(pieces)
        return _Order(ids, offsets, places)

    def _shorten(
        self, pair: Pair, question: str, chosen: str, rejected: str
    ) -> tuple[_Order, _Order]:
        """The orders with as many of the question's last tokens as fit."""
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
        _, offsets = self.tokenizer.encode_pieces([Piece(question, message=0)])
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
        _, offsets = self.tokenizer.encode_pieces([Piece(answer, message=0)])
        if len(offsets) <= self.max_answer_length:
            return answer
        return answer[: _boundary(offsets, self.max_answer_length)[0]]

    def _letter(self, letter: str) -> int:
        """Id of the token that carries the letter where it is all of the assistant's answer."""
        pieces = self.tokenizer.pieces(
            [{"role": "user", "content": "?"}, {"role": "assistant", "content": letter}],
            generation_prompt=False,
        )
        place, _ = _message(self.tokenizer, pieces, 1)
        ids, offsets = self.tokenizer.encode_pieces(pieces)
        inside = np.flatnonzero((offsets[:, 0] <= place) & (offsets[:, 1] > place))
        if not len(inside):
            raise UserError(f"{self.tokenizer.origin}: the letter {letter} has no token")
        return int(ids[inside[0]])


def conversation_text(messages: Sequence[Mapping[str, str]]) -> str:
    """The question to judge: a lone user message is its content, as it is.

    A longer conversation is written out, one paragraph a message: "System: …", "User: …",
    "Assistant: …".
    """
    if len(messages) == 1 and messages[0]["role"] == "user":
        return messages[0]["content"]
    return "\n\n".join(
        f"{message['role'].capitalize()}: {message['content']}" for message in messages
    )


def _message(tokenizer: ChatTokenizer, pieces: Sequence[Piece], index: int) -> tuple[int, Piece]:
    """Where a message starts in the rendered text, and its piece."""
    start = 0
    for piece in pieces:
        if piece.message == index:
            return start, piece
        start += len(piece.text)
    raise UserError(f"{tokenizer.origin}: the chat template leaves out a message's text")


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
