"""The text of a response, as its tokens come: what can be shown, and where a stop text ends it."""

from collections.abc import Sequence

import tokenizers
from tokenizers.decoders import DecodeStream


class ResponseText:
    """Takes a response's tokens one by one.

    Attributes:
      text: what the tokens say, up to a stop text.
      is_stopped: whether a stop text has come.
    """

    def __init__(self, tokenizer: tokenizers.Tokenizer, stop: Sequence[str] = ()):
        self.text = ""
        self.is_stopped = False
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._ids: list[int] = []
        self._stream = DecodeStream(skip_special_tokens=True)
        self._shown = 0

    def add(self, token: int) -> bool:
        """Adds a token; returns whether a stop text has ended the response with it."""
        self._ids.append(token)
        # None where a character is not whole yet.
        more = self._stream.step(self._tokenizer, token)
        if more:
            searched = len(self.text) - max(map(len, self._stop), default=0)
            self.text += more
            self._cut(max(searched, 0))
        return self.is_stopped

    def finish(self) -> str:
        """The text when no token follows; a character that never became whole is shown as such."""
        if not self.is_stopped:
            whole = self._tokenizer.decode(self._ids, skip_special_tokens=True)
            self.text = whole
            self._cut(0)
        return self.text

    def _cut(self, start: int) -> None:
        found = [at for at in (self.text.find(stop, start) for stop in self._stop) if at >= 0]
        if found:
            self.text = self.text[: min(found)]
            self.is_stopped = True

    def news(self, *, last: bool = False) -> str:
        """What has come since the last call and is sure to stay.

        What may be the beginning of a stop text is held back until the `last` call.
        """
        sure = len(self.text)
        if not (last or self.is_stopped):
            sure -= max((_overlap(self.text, stop) for stop in self._stop), default=0)
        news = self.text[self._shown : sure]
        self._shown = max(self._shown, sure)
        return news


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of a stop text."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
