"""Many requests at a time: retries, a budget, and an end at which nothing is lost."""

import asyncio
import collections
import dataclasses
import json
import logging
import random
import time
from collections.abc import Callable, Mapping
from typing import Any

from attnpo_jax.evaluate.endpoint.asks import (
    Answer,
    Ask,
    Unreadable,
    lacks_logprobs,
    read_answer,
)
from attnpo_jax.evaluate.endpoint.cache import Cache
from attnpo_jax.evaluate.endpoint.client import Client, Failure
from attnpo_jax.runtime.errors import Preempted, UserError

_LOG = logging.getLogger(__name__)

_LONGEST_BACKOFF = 60.0
# Who is to wait for longer does better to come back.
LONGEST_WAIT = 600.0
# What requests under way have to finish, once the program is told to stop.
GRACE_SECONDS = 10.0
_LOOK_SECONDS = 0.1


class EndpointError(UserError):
    """An endpoint can't be gone on with; what it has answered is kept."""


class _End(Exception):
    """Why there is no going on, and what to do."""

    def __init__(self, reason: str, remedy: str):
        super().__init__(f"{reason}; {remedy}")


@dataclasses.dataclass
class Budget:
    """What may be spent, 0 for no limit, and what is: that of requests under way at its most."""

    max_requests: int
    max_tokens: int
    requests: int
    tokens: int

    def fits(self, tokens: int) -> bool:
        """Whether one more request may be sent."""
        return (not self.max_requests or self.requests < self.max_requests) and (
            not self.max_tokens or self.tokens + tokens <= self.max_tokens
        )

    def told(self) -> str:
        """What is spent of what, in words."""
        limits = ((self.requests, self.max_requests), (self.tokens, self.max_tokens))
        (requests, tokens) = (
            f"{spent:,} of {most:,}" if most else f"{spent:,} (no limit)" for spent, most in limits
        )
        return f"{requests} requests and {tokens} tokens are spent"


class Asking:
    """Asks an endpoint until all is answered, or nothing more can be.

    Args:
      section: `config.evaluate.judge`.
      key: the endpoint's.
      cache: keeps each answer as it comes.
      left: what is to be asked, by cache key.
      budget: what may be spent.
      first_backoff: seconds before a request is sent a second time, if the endpoint names none;
        they double each time.
      noticed: whether the program is told to stop.
      answered: called at each answer.
    """

    def __init__(
        self,
        section: Any,
        key: str | None,
        cache: Cache,
        left: Mapping[str, Ask],
        *,
        budget: Budget,
        first_backoff: float,
        noticed: Callable[[], bool],
        answered: Callable[[], None],
    ):
        self._section, self._key, self._cache, self._budget = section, key, cache, budget
        self._left = collections.deque(left.items())
        self._first_backoff = first_backoff
        self._noticed, self._told_answered = noticed, answered
        self._answers: dict[str, Answer] = {}
        self._error: Exception | None = None
        self._under_way = 0
        self._not_before = 0.0  # no request is sent sooner, by `time.monotonic`

    async def run(self) -> dict[str, Answer]:
        """The answers by cache key.

        Raises:
          EndpointError: there is no going on.
          Preempted: the program was told to stop.
        """
        self._ending = asyncio.Event()
        self._settled = asyncio.Condition()
        count = min(self._section.concurrency, len(self._left))
        async with Client(self._section, self._key) as self._client:
            workers = [asyncio.create_task(self._work()) for _ in range(count)]
            stopped = await self._watch(workers)
        if stopped:
            raise Preempted(
                "asking the endpoint was told to stop; its answers are kept, and the same command "
                "goes on"
            )
        if isinstance(self._error, _End):
            raise EndpointError(
                f"{self._section.base_url}, model {self._section.model}: {self._error}. The "
                f"{len(self._answers):,} answers that came are kept in {self._cache.file}, and the "
                "same command goes on"
            )
        if self._error is not None:
            raise self._error
        return self._answers

    async def _watch(self, workers: list[asyncio.Task]) -> bool:
        """Waits for the workers; whether the program was told to stop before they were done."""
        deadline = None
        while True:
            _, working = await asyncio.wait(workers, timeout=_LOOK_SECONDS)
            if not working:
                return deadline is not None
            if deadline is None and self._noticed():
                deadline = time.monotonic() + GRACE_SECONDS
                self._ending.set()
            if deadline is not None and time.monotonic() > deadline:
                for worker in working:
                    worker.cancel()

    async def _work(self) -> None:
        try:
            while self._left and not self._ending.is_set():
                key, ask = self._left.popleft()
                await self._answer(key, ask)
        except Exception as error:
            # Others finish what is under way, which is paid, and begin nothing.
            self._error = self._error or error
            self._ending.set()

    async def _answer(self, key: str, ask: Ask) -> None:
        """Asks until there is an answer, or the end has come."""
        backoff, failures = self._first_backoff, 0
        while await self._wait_until(lambda: self._not_before):
            if not await self._reserve(ask.most_tokens):
                return
            try:
                answer = await self._attempt(key, ask)
            except Failure as failure:
                failures += not failure.at_once
                self._check(failure, failures)
                if failure.at_once:
                    continue
                wait = max(backoff, failure.wait or 0.0) * random.uniform(1.0, 1.25)
                due = time.monotonic() + wait
                if failure.busy:
                    self._not_before = max(self._not_before, due)
                backoff = min(2 * backoff, _LONGEST_BACKOFF)
                _LOG.debug("request %s: %s; again in %.1f s", ask.id, failure.reason, wait)
                await self._wait_until(lambda due=due: due)
            else:
                self._take(key, answer, ask)
                return

    async def _attempt(self, key: str, ask: Ask) -> Answer:
        """Sends a request that is reserved, and keeps its answer."""
        most = ask.most_tokens
        spent = most  # also of what is cut off: it may have been worked on
        try:
            attempt = self._cache.begin(key, most)
            try:
                content, answer = await self._send(ask)
            except Failure as failure:
                spent = most if failure.may_cost else 0
                self._cache.fail(attempt, spent, failure.reason)
                if not failure.refusal:
                    raise
                _LOG.warning("request %s is refused: %s", ask.id, failure.reason)
                return Answer("", (), failure.refusal, 0, 0)
            spent = answer.tokens or most
            request = json.dumps(ask.body(self._section.model), ensure_ascii=False)
            self._cache.keep(attempt, spent, key, request, content)
            return answer
        finally:
            await self._settle(spent - most)

    async def _send(self, ask: Ask) -> tuple[bytes, Answer]:
        content = await self._client.send(ask)
        try:
            return content, read_answer(content)
        except Unreadable as error:
            reason = f"HTTP 200, but {self._client.hidden(error)}"
            raise Failure(reason, may_cost=True) from None

    async def _reserve(self, tokens: int) -> bool:
        """Takes a request out of the budget; waits for others where what they leave may do.

        Returns:
          Whether to send it: False where the end has come.
        """
        async with self._settled:
            while not self._budget.fits(tokens) and not self._ending.is_set():
                if not self._under_way:
                    raise _End(
                        f"the budget does not allow another request: {self._budget.told()}, and "
                        f"the next one may take {tokens:,} tokens",
                        "accepted: a larger evaluate.judge.max_requests or max_tokens, which count "
                        "all that was ever sent for this file of answers",
                    )
                await self._settled.wait()
            if self._ending.is_set():
                return False
            self._budget.requests += 1
            self._budget.tokens += tokens
            self._under_way += 1
            return True

    async def _settle(self, tokens: int) -> None:
        self._under_way -= 1
        self._budget.tokens += tokens
        async with self._settled:
            self._settled.notify_all()

    def _take(self, key: str, answer: Answer, ask: Ask) -> None:
        self._answers[key] = answer
        self._told_answered()
        if lacks_logprobs(ask, answer):
            raise _End(
                f"request {ask.id} was answered without the log-probs that it asks for",
                "accepted: an endpoint and model that give `top_logprobs`",
            )

    def _check(self, failure: Failure, failures: int) -> None:
        """Raises _End where asking again is of no use."""
        if failure.remedy:
            raise _End(failure.reason, failure.remedy)
        if failures > self._section.retries:
            raise _End(
                f"no answer in {failures} attempts; the last: {failure.reason}",
                "accepted: an endpoint that answers (config.evaluate.judge.base_url, retries, "
                "timeout, concurrency)",
            )
        if failure.wait is not None and failure.wait > LONGEST_WAIT:
            raise _End(
                f"{failure.reason} (it asks to wait {failure.wait:.0f} s)",
                "come back when it answers again",
            )

    async def _wait_until(self, due: Callable[[], float]) -> bool:
        """Waits until a time, which may move; whether to go on then."""
        while not self._ending.is_set():
            wait = due() - time.monotonic()
            if wait <= 0:
                return True
            try:
                await asyncio.wait_for(self._ending.wait(), wait)
            except TimeoutError:
                pass
        return False
