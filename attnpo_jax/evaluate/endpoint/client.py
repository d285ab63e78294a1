"""Sends a request once, and tells what came of it: an answer's body, or a failure of some kind."""

import asyncio
import dataclasses
import email.utils
import math
import os
import time
from collections.abc import Mapping
from typing import Any, Self

from attnpo_jax.evaluate.endpoint.asks import Ask
from attnpo_jax.runtime.errors import UserError

# What the client wants where the endpoint asks for none.
_NO_KEY = "none"
# Shorter ones are placeholders, which may stand in any text.
_SHORTEST_SECRET = 8
_MOST_SHOWN = 300
_SHOULD_PASS = (408, 409, 425, 429)
_OF_ONE_REQUEST = ("context_length_exceeded", "content_filter")


@dataclasses.dataclass
class Failure(Exception):
    """A request that was not answered.

    Attributes:
      reason: what was found.
      remedy: what to do; "" where asking again may do.
      may_cost: whether the endpoint may have worked on it all the same.
      wait: seconds that the endpoint asks to wait, or None.
      busy: whether it would refuse other requests as well for now.
      at_once: whether to ask again without waiting.
      refusal: why this request alone is refused, as a finish reason; "" where it is not.
    """

    reason: str
    remedy: str = ""
    may_cost: bool = False
    wait: float | None = None
    busy: bool = False
    at_once: bool = False
    refusal: str = ""


def key_of(variable: str) -> str | None:
    """The key that a variable of the environment holds; None without one.

    Raises:
      UserError: it can be no key.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"${variable} (config.evaluate.judge.key_env) holds characters that no key has; "
            "accepted: printable ASCII"
        )
    return key or None


class Client:
    """An endpoint of OpenAI's API, to be made and used inside of an event loop.

    Args:
      section: `config.evaluate.judge`.
      key: the endpoint's key; None where it wants none.
    """

    def __init__(self, section: Any, key: str | None):
        import openai

        self._errors = openai
        self._section = section
        self._key = key
        self._openai = openai.AsyncOpenAI(
            base_url=section.base_url,
            api_key=key or _NO_KEY,
            timeout=section.timeout,
            max_retries=0,  # each attempt is counted, and paid for, outside
        )
        # Newer models of OpenAI take the newer name alone, and other servers the older one.
        self._length_name = "max_tokens"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._openai.close()

    async def send(self, ask: Ask) -> bytes:
        """The body of the response to a request.

        Raises:
          Failure: there was none.
        """
        name = self._length_name
        body = ask.body(self._section.model)
        body[name] = body.pop("max_tokens")
        seconds = self._section.timeout
        create = self._openai.chat.completions.with_raw_response.create
        try:
            # The client's own limit is for each part of a response.
            async with asyncio.timeout(seconds):
                response = await create(**body)
        except (TimeoutError, self._errors.APITimeoutError):
            raise Failure(f"no answer within {seconds:g} s", may_cost=True) from None
        except self._errors.APIConnectionError as error:
            raise self._unconnected(error) from None
        except self._errors.APIStatusError as error:
            raise self._refused(ask, name, error) from None
        except self._errors.APIError as error:
            raise Failure(f"no answer ({self.hidden(error)})", may_cost=True) from None
        content = response.http_response.content
        return content if self._secret is None else content.replace(self._secret.encode(), b"***")

    def hidden(self, text: object) -> str:
        """A text for messages and files, without the key."""
        text = str(text)
        return text if self._secret is None else text.replace(self._secret, "***")

    @property
    def _secret(self) -> str | None:
        return self._key if self._key and len(self._key) >= _SHORTEST_SECRET else None

    def _unconnected(self, error: Exception) -> Failure:
        cause = error.__cause__ or error
        never_sent = type(cause).__name__ == "ConnectError"
        what = "no connection" if never_sent else "the connection was cut"
        return Failure(
            f"{what} ({self.hidden(cause) or type(cause).__name__})", may_cost=not never_sent
        )

    def _refused(self, ask: Ask, length_name: str, error: Any) -> Failure:
        status, code = error.status_code, str(error.code)
        reason = f"HTTP {status}: {self._said(error)}"
        if code in _OF_ONE_REQUEST:
            return Failure(reason, refusal=code)
        if status == 400 and error.param == length_name == "max_tokens":
            self._length_name = "max_completion_tokens"
            return Failure(reason, at_once=True)
        passes = (status in _SHOULD_PASS or status >= 500) and code != "insufficient_quota"
        if passes:
            busy = status in (429, 503)
            return Failure(reason, wait=_seconds_to_wait(error.response.headers), busy=busy)
        return Failure(reason, self._remedy(ask, status))

    def _said(self, error: Any) -> str:
        body = error.body
        said = body.get("message") if isinstance(body, Mapping) else None
        text = " ".join(self.hidden(said or error.response.text or "no reason given").split())
        return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}…"

    def _remedy(self, ask: Ask, status: int) -> str:
        variable = self._section.key_env
        if status in (401, 403):
            held = "holds none" if self._key is None else "holds one that it does not take"
            return f"accepted: a key of this endpoint in ${variable}, which {held}"
        if status == 404:
            return (
                "accepted: a model that it has (config.evaluate.judge.model), and the address "
                "above its /chat/completions (config.evaluate.judge.base_url)"
            )
        if status in (402, 429):
            return "its account has nothing left; accepted: one that has"
        return f"this was request {ask.id}; accepted: one that this endpoint and model take"


def _seconds_to_wait(headers: Mapping[str, str]) -> float | None:
    """What `Retry-After` says, as seconds or as a date; None where it says nothing of use."""
    value = headers.get("retry-after", "")
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(value).timestamp() - time.time()
        except (TypeError, ValueError, OverflowError):
            return None
    return max(seconds, 0.0) if math.isfinite(seconds) else None
