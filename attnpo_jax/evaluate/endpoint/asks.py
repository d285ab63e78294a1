"""What an endpoint is asked, and what it answers: values, and how answers are read."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

from attnpo_jax.runtime import json_files
from attnpo_jax.runtime.errors import UserError

# What a chat template may write around one message, and around all of them, in tokens.
_TOKENS_AROUND_MESSAGE = 16
_TOKENS_AROUND_ALL = 64
_CHARACTERS_A_TOKEN = 4


class Unreadable(ValueError):
    """What came is no answer; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Ask:
    """One request for a chat completion.

    Attributes:
      id: names it in messages; the answer does not depend on it.
      messages: chat messages, JSON values.
      max_tokens: of the answer, at most.
      top_logprobs: of how many of the likeliest tokens log-probs are wanted, at each token.
      stop: texts that end the answer.
      needs_logprobs: whether an answer without the log-probs that are wanted is an error.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    max_tokens: int
    temperature: float = 0.0
    top_logprobs: int = 0
    stop: tuple[str, ...] = ()
    needs_logprobs: bool = True

    def body(self, model: str) -> dict[str, Any]:
        """The request's JSON, in the words of OpenAI's API."""
        body: dict[str, Any] = {
            "model": model,
            "messages": list(self.messages),
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
        }
        if self.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.top_logprobs}
        if self.stop:
            body["stop"] = list(self.stop)
        return body

    def key(self, model: str) -> str:
        """sha256 of all that the answer depends on, hexadecimal; whoever answers is not in it.

        Raises:
          UserError: a message is no Unicode text.
        """
        text = json.dumps(self.body(model), sort_keys=True, ensure_ascii=False)
        try:
            return hashlib.sha256(text.encode()).hexdigest()
        except UnicodeEncodeError as error:
            raise UserError(
                f"request {self.id}: a message is not Unicode ({error.reason}); accepted: text "
                "without lone surrogates"
            ) from None

    @property
    def likely_prompt_tokens(self) -> int:
        """An estimate: a token for four characters."""
        return -(-len(self._text) // _CHARACTERS_A_TOKEN)

    @property
    def most_tokens(self) -> int:
        """What prompt and answer take at most: a token for each byte, and what a template adds."""
        around = _TOKENS_AROUND_ALL + _TOKENS_AROUND_MESSAGE * len(self.messages)
        return len(self._text.encode()) + around + self.max_tokens

    @property
    def _text(self) -> str:
        contents = (message.get("content") for message in self.messages)
        return "".join(c if isinstance(c, str) else json.dumps(c) for c in contents)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What was answered.

    Attributes:
      text: the message's content; "" where it has none.
      top_logprobs: for each token of the answer, the likeliest tokens in its place with their
        log-probs; () where none were asked for, or none were given.
      finish_reason: `stop`, `length`, or what else the endpoint says; `context_length_exceeded` or
        `content_filter` where it refused to answer this one request, whose text is "" then.
      prompt_tokens, completion_tokens: as the endpoint counts them; 0 where it does not say.
    """

    text: str
    top_logprobs: tuple[dict[str, float], ...]
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def tokens(self) -> int:
        """Of prompt and answer; 0 where the endpoint does not say."""
        return self.prompt_tokens + self.completion_tokens


def lacks_logprobs(ask: Ask, answer: Answer) -> bool:
    """Whether an answer has not the log-probs that it needs; one without any text has no need."""
    wanted = ask.top_logprobs > 0 and ask.needs_logprobs
    return wanted and not answer.top_logprobs and bool(answer.text.strip())


def read_answer(content: bytes) -> Answer:
    """The answer that the body of a response holds.

    Raises:
      Unreadable: it is no JSON, or has not the form of a chat completion.
    """
    try:
        body = json_files.loads(content)
    except ValueError as error:
        raise Unreadable(f"no JSON ({error})") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        found = f"an error: {body['error']!r}" if _has_error(body) else _shown(body)
        raise Unreadable(f"no `choices` in it: {found}")
    try:
        return _answer(choices[0], body.get("usage") or {})
    except (AttributeError, KeyError, TypeError, ValueError):
        raise Unreadable(f"no chat completion: {_shown(body)}") from None


def _answer(choice: Mapping[str, Any], usage: Mapping[str, Any]) -> Answer:
    text = choice["message"]["content"]
    if text is not None and not isinstance(text, str):
        raise TypeError
    counts = (usage.get(f"{part}_tokens") or 0 for part in ("prompt", "completion"))
    given = (choice.get("logprobs") or {}).get("content") or ()
    return Answer(
        text or "",
        tuple(_likeliest(token["top_logprobs"]) for token in given),
        str(choice.get("finish_reason") or ""),
        *map(int, counts),
    )


def _likeliest(entries: list[Mapping[str, Any]]) -> dict[str, float]:
    """Token to log-prob; of several of one text, such as halves of characters, the likeliest."""
    found: dict[str, float] = {}
    for entry in entries:
        token, logprob = entry["token"], float(entry["logprob"])
        if not isinstance(token, str):
            raise TypeError
        found[token] = max(logprob, found.get(token, logprob))
    return found


def _has_error(body: Any) -> bool:
    return isinstance(body, dict) and bool(body.get("error"))


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}…"
