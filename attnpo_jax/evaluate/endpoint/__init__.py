"""Endpoints of OpenAI's API as judges: asked many things at a time, and nothing twice."""

import asyncio
import concurrent.futures
import dataclasses
import importlib.util
import logging
import pathlib
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Self

from attnpo_jax.evaluate.endpoint.asking import Asking, Budget, EndpointError
from attnpo_jax.evaluate.endpoint.asks import Answer, Ask, Unreadable, lacks_logprobs, read_answer
from attnpo_jax.evaluate.endpoint.cache import Cache
from attnpo_jax.evaluate.endpoint.client import key_of
from attnpo_jax.parallel import preemption
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.runtime.progress import CountProgress

__all__ = ["Answer", "Ask", "DryRun", "Endpoint", "EndpointError"]

_LOG = logging.getLogger(__name__)


class DryRun(Exception):
    """Nothing was asked, as `evaluate.judge.dry_run` wants it; the message says what would be."""


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """A judge behind an address; see `open`.

    Attributes:
      section: `config.evaluate.judge`.
      cache: the file of its answers.
      progress: whether a terminal is given a bar.
      first_backoff: seconds before a request is sent a second time, if the endpoint names none.
    """

    section: Any
    cache: pathlib.Path
    progress: bool = True
    first_backoff: float = 0.5

    @classmethod
    def open(cls, section: Any, cache: pathlib.Path, *, progress: bool = True) -> Self:
        """An endpoint as `config.evaluate.judge` has it.

        Args:
          cache: a file that keeps every request and answer; made if need be.

        Raises:
          UserError: address or model are not given, the key can be none, or the client is not
            installed.
        """
        for name in ("base_url", "model"):
            if not section[name]:
                raise UserError(f"config.evaluate.judge.{name} = '': an endpoint needs one")
        if importlib.util.find_spec("openai") is None:
            raise UserError("endpoints need openai: pip install '.[evaluate]' in a clone")
        key_of(section.key_env)
        return cls(section, cache, progress)

    @property
    def model(self) -> str:
        """What the endpoint calls the model."""
        return self.section.model

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        """Answers in the order of the requests; equal requests share one.

        What the cache holds is not asked again, whichever address it came from. Everything that
        comes is kept at once, so that a program that is killed has lost what was under way alone.

        Raises:
          EndpointError: no answers could be had; the message says why and what to do.
          UserError: the budget can't hold what is left to ask; the cache can't be written.
          Preempted: SIGTERM or Ctrl-C came; answers are kept.
          DryRun: `evaluate.judge.dry_run` is set.
        """
        keys = [ask.key(self.model) for ask in asks]
        wanted: dict[str, Ask] = {}
        for key, ask in zip(keys, asks, strict=True):
            if key not in wanted or ask.needs_logprobs:
                wanted[key] = ask
        with Cache(self.cache) as cache:
            found = _readable(cache.answers(wanted), wanted)
            left = {key: ask for key, ask in wanted.items() if key not in found}
            budget = Budget(self.section.max_requests, self.section.max_tokens, *cache.spent())
            self._announce(len(wanted), left, budget)
            if left:
                found |= self._answers(cache, left, budget)
        return [found[key] for key in keys]

    def _announce(self, number: int, left: Mapping[str, Ask], budget: Budget) -> None:
        """Tells what is to be asked; raises where that is all that is wanted, or too much."""
        prompts = sum(ask.likely_prompt_tokens for ask in left.values())
        most = sum(ask.max_tokens for ask in left.values())
        told = (
            f"{self.section.base_url}, model {self.model}: {number:,} requests, "
            f"{number - len(left):,} of them answered before and {len(left):,} to ask, with about "
            f"{prompts:,} tokens in prompts (estimated from characters) and up to {most:,} in "
            f"answers; {budget.told()}"
        )
        if self.section.dry_run:
            raise DryRun(f"{told}. Nothing was asked (evaluate.judge.dry_run)")
        _LOG.info("%s", told)
        allowed = budget.max_requests - budget.requests
        if budget.max_requests and len(left) > allowed:
            raise UserError(
                f"{told}: more than config.evaluate.judge.max_requests leaves, so nothing was "
                f"asked; accepted: {budget.requests + len(left):,} or more, and some for those "
                "that have to be sent again, or 0 for no limit"
            )
        if budget.max_tokens and budget.tokens + prompts > budget.max_tokens:
            _LOG.warning(
                "the prompts alone may take more tokens than evaluate.judge.max_tokens leaves; it "
                "ends before"
            )

    def _answers(self, cache: Cache, left: Mapping[str, Ask], budget: Budget) -> dict[str, Answer]:
        """Asks in a thread of its own, since this one may have an event loop, as in a notebook."""
        given_up = threading.Event()
        with (
            preemption.watch() as noticed,
            interrupts.work_to_save(),
            CountProgress("judge", len(left), "answers", bar=self.progress) as progress,
            concurrent.futures.ThreadPoolExecutor(1) as pool,
        ):
            asking = Asking(
                self.section,
                key_of(self.section.key_env),
                cache,
                left,
                budget=budget,
                first_backoff=self.first_backoff,
                noticed=lambda: noticed() or given_up.is_set(),
                answered=lambda: progress.add(1),
            )
            try:
                return pool.submit(asyncio.run, asking.run()).result()
            except BaseException:
                given_up.set()
                raise


def _readable(bodies: Mapping[str, bytes], asks: Mapping[str, Ask]) -> dict[str, Answer]:
    """Those answers that do for what is asked now."""
    found = {}
    for key, body in bodies.items():
        try:
            answer = read_answer(body)
        except Unreadable:  # of a version to come
            continue
        if not lacks_logprobs(asks[key], answer):
            found[key] = answer
    return found
