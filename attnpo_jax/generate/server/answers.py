"""Answers to calls, whole and in parts, as OpenAI's clients read them."""

import dataclasses
import secrets
import time
from collections.abc import Sequence
from typing import Any

import tokenizers

from attnpo_jax.data.token_bytes import TokenBytes
from attnpo_jax.generate.server.protocol import Asked
from attnpo_jax.sampling.responses import Request, Response, Top, Update


class TokenTexts:
    """What single tokens are shown as."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        self._tokenizer = tokenizer
        self._bytes_of = TokenBytes(tokenizer)

    def __call__(self, token: int) -> tuple[str, list[int] | None]:
        """The text, U+FFFD for a part of a character; and the bytes where they are known."""
        known = self._bytes_of(token)
        if known is None:
            return self._tokenizer.decode([token], skip_special_tokens=False), None
        return known.decode(errors="replace"), list(known)

    def distinct(self, token: int) -> str:
        """As the older form of answers has it: parts of characters as `bytes:\\xe2`."""
        text, known = self(token)
        if "\ufffd" not in text or known is None:
            return text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in known)


@dataclasses.dataclass(frozen=True)
class _Tokens:
    """Tokens of a choice that are told of: all that were sampled, save the one that ended it."""

    ids: Sequence[int]
    logprobs: Sequence[float]
    top: Sequence[Top]

    @classmethod
    def of(cls, request: Request, came: Response | Update) -> "_Tokens":
        response = came if isinstance(came, Response) else came.response
        ended = response is not None and response.finish_reason == "stop"
        size = len(came.tokens)
        if ended and size and came.tokens[-1] in request.ends:
            size -= 1
        return cls(came.tokens[:size], came.logprobs[:size], came.top[:size])


class Answer:
    """What is sent for one call.

    Args:
      asked: the call.
      name: the model's.
      texts: what tokens are shown as.
    """

    def __init__(self, asked: Asked, name: str, texts: TokenTexts):
        self._asked, self._texts = asked, texts
        kind = "chat.completion" if asked.is_chat else "text_completion"
        prefix = "chatcmpl" if asked.is_chat else "cmpl"
        self._head = {
            "id": f"{prefix}-{secrets.token_hex(12)}",
            "object": kind,
            "created": int(time.time()),
            "model": name,
        }
        self._choices = {id(request): i for i, request in enumerate(asked.requests)}
        self._offsets = [0] * len(asked.requests)
        self._sampled = 0
        self._cached: dict[int, int] = {}  # of each prompt

    def whole(self, responses: Sequence[Response]) -> dict[str, Any]:
        """The answer of a call that wants it at once; responses in the order of the choices."""
        choices = []
        for i, (request, response) in enumerate(zip(self._asked.requests, responses, strict=True)):
            said: dict[str, Any] = {"text": response.text}
            if self._asked.is_chat:
                message = {"role": "assistant", "content": response.text, "refusal": None}
                said = {"message": message}
            logprobs = self._logprobs(i, _Tokens.of(request, response))
            choices.append(self._choice(i, said, logprobs, response.finish_reason))
            self._count_cached(request, response)
        self._sampled = sum(len(response.tokens) for response in responses)
        return self._head | {"choices": choices, "usage": self._usage()}

    def first_parts(self) -> list[dict[str, Any]]:
        """What a chat in parts begins with: the role of each choice."""
        if not self._asked.is_chat:
            return []
        delta = {"role": "assistant", "content": ""}
        return [
            self._part(self._choice(i, {"delta": delta}, None, None))
            for i in range(len(self._asked.requests))
        ]

    def part(self, update: Update) -> dict[str, Any] | None:
        """What an update adds to the answer; None where it adds nothing."""
        i = self._choices[id(update.request)]
        self._sampled += len(update.tokens)
        reason = None
        if update.response is not None:
            reason = update.response.finish_reason
            self._count_cached(update.request, update.response)
        tokens = _Tokens.of(update.request, update)
        if not update.text and reason is None and not (self._tells and tokens.ids):
            return None
        said = {"text": update.text}
        if self._asked.is_chat:
            said = {"delta": {"content": update.text} if update.text else {}}
        return self._part(self._choice(i, said, self._logprobs(i, tokens), reason))

    def last_part(self) -> dict[str, Any] | None:
        """What tells of the tokens, where that was asked for."""
        if not self._asked.with_usage:
            return None
        return self._part(None) | {"usage": self._usage()}

    @property
    def _tells(self) -> bool:
        return self._asked.logprobs is not None

    def _part(self, choice: dict[str, Any] | None) -> dict[str, Any]:
        part = self._head | {"choices": [] if choice is None else [choice]}
        if self._asked.is_chat:
            part["object"] = "chat.completion.chunk"
        return part | {"usage": None} if self._asked.with_usage else part

    def _choice(
        self, i: int, said: dict[str, Any], logprobs: dict[str, Any] | None, reason: str | None
    ) -> dict[str, Any]:
        return {"index": i, **said, "logprobs": logprobs, "finish_reason": reason}

    def _count_cached(self, request: Request, response: Response) -> None:
        """A prompt's samples may have been read at different times: the first has read most."""
        before = self._cached.get(id(request.tokens), response.cached_tokens)
        self._cached[id(request.tokens)] = min(before, response.cached_tokens)

    def _usage(self) -> dict[str, Any]:
        # A prompt counts once, however many responses it has.
        prompts = {id(request.tokens): len(request.tokens) for request in self._asked.requests}
        read = sum(prompts.values())
        return {
            "prompt_tokens": read,
            "prompt_tokens_details": {"cached_tokens": sum(self._cached.values())},
            "completion_tokens": self._sampled,
            "total_tokens": read + self._sampled,
        }

    def _logprobs(self, i: int, tokens: _Tokens) -> dict[str, Any] | None:
        if not self._tells:
            return None
        return self._of_chat(tokens) if self._asked.is_chat else self._of_completion(i, tokens)

    def _of_chat(self, tokens: _Tokens) -> dict[str, Any]:
        content = []
        tops = tokens.top or [()] * len(tokens.ids)
        for token, logprob, top in zip(tokens.ids, tokens.logprobs, tops, strict=True):
            likeliest = [self._entry(*one) for one in top]
            content.append(self._entry(token, logprob) | {"top_logprobs": likeliest})
        return {"content": content, "refusal": None}

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        text, known = self._texts(token)
        return {"token": text, "logprob": logprob, "bytes": known}

    def _of_completion(self, i: int, tokens: _Tokens) -> dict[str, Any]:
        offsets = []
        for token in tokens.ids:
            offsets.append(self._offsets[i])
            self._offsets[i] += len(self._texts(token)[0])
        top = None
        if self._asked.logprobs:
            # The sampled token is always there, so there may be one more than was asked for.
            sampled = zip(tokens.ids, tokens.logprobs, tokens.top, strict=True)
            top = [
                {self._texts.distinct(t): p for t, p in (*likeliest, (token, logprob))}
                for token, logprob, likeliest in sampled
            ]
        return {
            "tokens": [self._texts.distinct(token) for token in tokens.ids],
            "token_logprobs": list(tokens.logprobs),
            "top_logprobs": top,
            "text_offset": offsets,
        }
