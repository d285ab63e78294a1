"""Tells texts that a chat template has rendered already: it would be applied to them once more."""

import dataclasses
import os
import re

from attnpo_jax.data.pair import SIDES, BadExample, Pair
from attnpo_jax.data.tokenize import ChatTokenizer
from attnpo_jax.runtime.errors import UserError

_TEXTS = ("rz7qa", "rz7qb", "rz7qc")  # stand for messages; no template holds them
# Nobody begins a message with such a word by chance; with "User:" one might.
_MARK = re.compile(r"<[^<>\s]+>|\[/?[A-Z_]+\]")
# How turns of well-known templates open and end, which may be another one than the model's.
_OPENINGS = re.compile(
    r"<\|im_start\|>(system|user|assistant)\n"
    r"|<\|start_header_id\|>(system|user|assistant)<\|end_header_id\|>"
    r"|<start_of_turn>(user|model)\n"
    r"|<\|(system|user|assistant)\|>\n"
)
_ENDS = ("<|im_end|>", "<|eot_id|>", "<end_of_turn>")


@dataclasses.dataclass(frozen=True)
class RenderedTexts:
    """How a chat template's own text looks, by which a text that it has rendered is told.

    A message that begins as a turn does, or ends where an answer is due, is rendered, and so is a
    response that ends with the end of a turn. One that speaks of such tokens elsewhere is not, nor
    one that begins with a lone token, unless the turn ends too.

    Attributes:
      openings: first lines of what comes before a message of each role, without `bos`.
      to_answer: the one of them that comes before an answer.
      ends: what comes after a response.
      bos: what may come before all.
    """

    openings: tuple[str, ...] = ()
    to_answer: str = ""
    ends: tuple[str, ...] = ()
    bos: str = ""

    @classmethod
    def of(cls, tokenizer: ChatTokenizer) -> "RenderedTexts":
        """The looks of a tokenizer's template; none, where it refuses a plain conversation."""
        a, b, c = _TEXTS
        bos = tokenizer.tokenizer.bos_token or ""

        def rendered(*turns: tuple[str, str]) -> list[str]:
            messages = [{"role": role, "content": text} for role, text in turns]
            try:
                whole = tokenizer.render(messages, generation_prompt=False)
            except UserError:  # the rows of such conversations tell why
                return []
            return re.split("|".join(_TEXTS), whole)

        parts = rendered(("user", a), ("assistant", b), ("user", c))
        if len(parts) != 4:
            return cls(bos=bos)
        head, answer, again, _ = parts
        end = _MARK.match(again.lstrip())
        ends = {end[0] if end else "", tokenizer.tokenizer.eos_token or ""}

        def opening(text: str) -> str:
            """The first line of a turn's opening: from its first mark that ends no turn."""
            marks = [m for m in _MARK.finditer(text) if m[0] not in (*ends, bos)]
            return text[marks[0].start() :].strip().partition("\n")[0] if marks else ""

        # A user's turn opens alike at the beginning, perhaps behind a system message, and later.
        shared = os.path.commonprefix([head[::-1], again[::-1]])[::-1]
        openings = {opening(shared), opening(answer)}
        if system := rendered(("system", c), ("user", a)):
            openings.add(opening(system[0]))
        return cls(
            openings=tuple(sorted(openings - {""})),
            to_answer=opening(answer),
            ends=tuple(sorted(x for x in ends if _MARK.fullmatch(x))),
            bos=bos,
        )

    def check(self, pair: Pair) -> None:
        """Raises BadExample where a text of a pair is rendered already; it names what tells."""
        for number, message in enumerate(pair.prompt, 1):
            if isinstance(message.get("content"), str):
                of = f"message {number} of the prompt ({message['role']})"
                self._check_beginning(message["content"], of)
                lone = not self.to_answer or _MARK.fullmatch(self.to_answer)
                if not lone and message["content"].rstrip().endswith(self.to_answer):
                    raise _rendered(of, "ends", self.to_answer)
        for side in SIDES:
            text = getattr(pair, side)
            if isinstance(text, str):
                self._check_beginning(text, f"`{side}`")
                for end in (*self.ends, *_ENDS):
                    if text.rstrip().endswith(end):
                        raise _rendered(f"`{side}`", "ends", end)

    def _check_beginning(self, text: str, of: str) -> None:
        text = text.lstrip().removeprefix(self.bos).lstrip()
        for opening in self.openings:
            closes = any(x and x in text for x in (self.to_answer, *self.ends))
            if text.startswith(opening) and (closes or not _MARK.fullmatch(opening)):
                raise _rendered(of, "begins", opening)
        if found := _OPENINGS.match(text):
            raise _rendered(of, "begins", found[0].strip())


def _rendered(of: str, where: str, what: str) -> BadExample:
    return BadExample(
        f"{of} {where} with {what!r}: a chat template has rendered it already, and would do so "
        "once more; accepted: messages' own texts"
    )
