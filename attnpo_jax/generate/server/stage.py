"""`attnpo serve`: loads a model, listens, and answers until it is told to end."""

import asyncio
import contextlib
import logging
import os
import pathlib
import socket
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import numpy as np
import uvicorn

from attnpo_jax import config as config_lib
from attnpo_jax.generate import model as models
from attnpo_jax.generate.api import engine_for
from attnpo_jax.generate.server.app import make_app
from attnpo_jax.generate.server.protocol import Served
from attnpo_jax.generate.server.worker import Worker
from attnpo_jax.parallel import preemption, processes
from attnpo_jax.runtime import interrupts
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.model import SampledModel
from attnpo_jax.sampling.responses import Request

if TYPE_CHECKING:
    from attnpo_jax.run import Run

_LOG = logging.getLogger(__name__)

API_KEY = "ATTNPO_API_KEY"
"""The environment's variable that holds the key which callers must know."""
_LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def serve(run: "Run", *, model: str | None = None) -> None:
    """Answers the calls of OpenAI's API until SIGTERM or Ctrl-C.

    Then no more calls are taken; what is under way has `serve.grace_seconds` to finish.

    Args:
      run: the run; its config's sections `serve` and `generate` say how.
      model: see `generate.model.load`.

    Raises:
      OSError: the address can't be listened at.
      FileNotFoundError, UserError: there is no such model; there are several processes.
      KeyboardInterrupt: Ctrl-C ended it.
    """
    if processes.are_several():
        raise UserError("attnpo serve is for one process, which may have many devices")
    section = run.config.serve
    # Before the model is loaded, which may take minutes.
    with contextlib.closing(_bind(section.host, section.port)) as bound:
        server = Server(run, models.load(run, model), bound, model)
        # Answers under way have a grace time of their own.
        with preemption.watch() as noticed, interrupts.work_to_save():
            server.run(noticed)
    if interrupts.came():
        raise KeyboardInterrupt


def _bind(host: str, port: int) -> socket.socket:
    """A socket at an address, which does not listen yet."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"serve.host = {host!r}: {error}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except (OSError, OverflowError) as error:
        bound.close()
        raise OSError(
            f"serve.host = {host!r}, serve.port = {port}: {error}; accepted: an address of this "
            "machine and a port that is free (0 for any)"
        ) from error
    return bound


def _name_of(run: "Run", which: str | None, sampled: SampledModel) -> str:
    """What clients call a model where the config does not say."""
    if models.is_trained(which) or (which is None and run.workdir is not None):
        return pathlib.PurePath(sampled.name).name  # as step-10
    folder = pathlib.Path(sampled.name).expanduser()
    return folder.resolve().name if folder.is_dir() else sampled.name


class Server:
    """A model behind an address.

    Args:
      run: whose config says how.
      sampled: the model.
      bound: the socket.
      which: what the model was asked for as.
    """

    def __init__(
        self, run: "Run", sampled: SampledModel, bound: socket.socket, which: str | None = None
    ):
        config = run.config
        section = config.serve
        self._bound = bound
        length = min(section.max_length, sampled.model.config.positions)
        self._engine = engine_for(
            sampled, config, length=length, slots=section.slots, prefix_caching=True
        )
        name = section.name or _name_of(run, which, sampled)
        most = min(section.max_choices, section.slots + section.max_waiting)
        served = Served(name, sampled, config_lib.sampling(config.generate), length, most)
        self._worker = Worker(self._engine, section.max_waiting, self.stop)
        key = os.environ.get(API_KEY) or None
        local = section.host in ("127.0.0.1", "localhost", "::1")
        if not local and key is None:
            _LOG.warning(
                "whoever reaches %s may use the model; $%s may hold a key for callers to know",
                section.host,
                API_KEY,
            )
        app = make_app(
            served,
            self._engine,
            self._worker,
            max_body_bytes=section.max_body_bytes,
            api_key=key,
            hosts=_LOOPBACK if local and key is None else None,
        )
        self._http = _Uvicorn(app, section.grace_seconds)
        self._warm_up(served)
        cache = self._engine.cache_shape
        host, port = bound.getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
        self._told = (
            f"serving {name} at {self.url}: {cache.slots} responses at a time, {length} tokens "
            f"each; the KV cache takes {cache.nbytes / 1e9:.2f} GB"
        )

    def _warm_up(self, served: Served) -> None:
        """Compiles what a short call needs, so that the first one does not wait for it."""
        settings = served.model.settings(
            **served.settings | {"max_new_tokens": 1, "min_new_tokens": 0}
        )
        list(self._engine.run([Request("warm-up", np.zeros(1, np.int32), settings)]))

    def run(self, told_to_end: Callable[[], bool] = lambda: False) -> None:
        """Answers until it is told to end, or `stop` is called from another thread.

        Raises:
          Exception: what the engine has failed of.
        """
        self._worker.start()
        try:
            asyncio.run(self._run(told_to_end))
        finally:
            self._worker.stop()
        if self._worker.error is not None:
            raise self._worker.error

    async def _run(self, told_to_end: Callable[[], bool]) -> None:
        self._http.told_to_end = told_to_end
        self._http.announcement = self._told
        await self._http.serve(sockets=[self._bound])

    def stop(self) -> None:
        """Has `run` end as it does when it is told to."""
        self._http.should_exit = True

    @property
    def is_listening(self) -> bool:
        """Whether calls are taken."""
        return self._http.started


class _Uvicorn(uvicorn.Server):
    """A server that leaves signals to the program around it."""

    told_to_end: Callable[[], bool]
    announcement: str

    def __init__(self, app, grace_seconds: int):
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=grace_seconds,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        _LOG.info("%s", self.announcement)

    async def on_tick(self, counter: int) -> bool:
        if self.told_to_end():
            self.should_exit = True
        return await super().on_tick(counter)
