"""The thread that the engine runs in, and what connects it with the calls' event loop."""

import asyncio
import collections
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence

from attnpo_jax.generate.server.errors import ApiError
from attnpo_jax.sampling.engine import Engine
from attnpo_jax.sampling.responses import Request, Update


class Job:
    """Requests of one call, under way; belongs to the event loop that began it."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]):
        self.requests = requests
        self._worker = worker
        self._loop = asyncio.get_running_loop()
        self._came: asyncio.Queue[list[Update] | None] = asyncio.Queue()

    async def updates(self) -> AsyncIterator[Update]:
        """What comes of the requests, until all are finished.

        Raises:
          ApiError: the engine has failed.
        """
        left = len(self.requests)
        while left:
            updates = await self._came.get()
            if updates is None:
                raise ApiError("the server has failed, and ends", status=500)
            for update in updates:
                left -= update.response is not None
                yield update

    def end(self) -> None:
        """Takes what is not finished out of the engine, so that others have its slots."""
        self._worker.end(self)

    def deliver(self, updates: list[Update] | None) -> None:
        """Hands over what has come, from the worker's thread; None where no more will."""
        self._loop.call_soon_threadsafe(self._came.put_nowait, updates)


class Worker:
    """Runs an engine in a thread of its own; what others want of it is done between its calls.

    Args:
      engine: nobody else may use it, but for `check`.
      max_waiting: requests that may wait for a slot.
      on_failure: called, from the thread, where the engine has failed; see `error`.
    """

    def __init__(self, engine: Engine, max_waiting: int, on_failure: Callable[[], None]):
        self.error: BaseException | None = None
        self._engine = engine
        self._most = engine.cache_shape.slots + max_waiting
        self._on_failure = on_failure
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        # By request (its identity): whose it is. In both threads, under the lock.
        self._jobs: dict[Request, Job] = {}
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the call that it is in; what is under way is forgotten."""
        self._orders.put(None)
        self._thread.join()

    @property
    def open(self) -> int:
        """Requests that are not finished."""
        return len(self._jobs)

    def begin(self, requests: Sequence[Request]) -> Job:
        """Puts a call's requests into the queue.

        Raises:
          ApiError: too many wait already, or the engine has failed.
        """
        job = Job(self, requests)
        with self._lock:
            if self.error is not None:
                raise ApiError("the server has failed, and ends", status=500)
            if len(self._jobs) + len(requests) > self._most:
                raise ApiError(
                    f"{len(self._jobs)} responses are under way or waiting, and the call asks for "
                    f"{len(requests)}; accepted: {self._most} together, so try again later",
                    status=429,
                    code="rate_limit_exceeded",
                )
            self._jobs |= dict.fromkeys(requests, job)
        self._orders.put(lambda: self._add(requests))
        return job

    def end(self, job: Job) -> None:
        """See `Job.end`."""
        with self._lock:
            left = [request for request in job.requests if self._jobs.pop(request, None)]
        if left:
            self._orders.put(lambda: self._cancel(left))

    # --- In the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._take_orders():
                self._deliver(self._engine.step())
        except BaseException as error:  # noqa: B036  whatever it is, nobody may wait for answers
            with self._lock:
                self.error = error
                jobs = set(self._jobs.values())
                self._jobs.clear()
            for job in jobs:
                job.deliver(None)
            self._on_failure()

    def _take_orders(self) -> bool:
        """Does what has been ordered, and waits where there is nothing else to do.

        Returns:
          False where the thread is to end.
        """
        while True:
            busy = self._engine.running or self._engine.waiting
            try:
                order = self._orders.get(block=not busy)
            except queue.Empty:
                return True
            if order is None:
                return False
            order()

    def _add(self, requests: Sequence[Request]) -> None:
        for request in requests:
            # The call may have ended before it began.
            if request in self._jobs:
                self._engine.add(request)

    def _cancel(self, requests: Sequence[Request]) -> None:
        for request in requests:
            self._engine.cancel(request)

    def _deliver(self, updates: Sequence[Update]) -> None:
        by_job: dict[Job, list[Update]] = collections.defaultdict(list)
        with self._lock:
            for update in updates:
                job = self._jobs.get(update.request)
                if job is not None:
                    by_job[job].append(update)
                    if update.response is not None:
                        del self._jobs[update.request]
        for job, of_job in by_job.items():
            job.deliver(of_job)
