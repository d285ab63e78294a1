"""The ASGI application: who may ask, what is asked, and the answers as they come."""

import asyncio
import concurrent.futures
import contextlib
import hmac
import json
import logging
import re
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from attnpo_jax.data.limits import parse_json
from attnpo_jax.data.pair import BadExample
from attnpo_jax.generate.server.answers import Answer, TokenTexts
from attnpo_jax.generate.server.errors import ApiError
from attnpo_jax.generate.server.protocol import Asked, Served, parse
from attnpo_jax.generate.server.worker import Job, Worker
from attnpo_jax.runtime.errors import UserError
from attnpo_jax.sampling.engine import Engine

_LOG = logging.getLogger(__name__)

# Who sends a body more slowly is not waited for.
_BODY_SECONDS = 60
_NOT_NUMBERS = "the model's logits are no numbers (NaN or infinite)"


def make_app(
    served: Served,
    engine: Engine,
    worker: Worker,
    *,
    max_body_bytes: int,
    api_key: str | None,
    hosts: tuple[str, ...] | None,
) -> ASGIApp:
    """The application.

    Args:
      engine: the worker's; checks requests.
      max_body_bytes: of a call's body.
      api_key: what callers must know, or None.
      hosts: the names that callers may have for this machine, or None for all. For a server that
        has no key and listens to this machine alone: a web page whose own name leads here can't
        have a browser ask in its place.
    """
    api = _Api(served, engine, worker, max_body_bytes)
    return Starlette(
        routes=[
            Route("/health", api.health),
            Route("/v1/models", api.models),
            Route("/v1/models/{name:path}", api.model),
            Route("/v1/chat/completions", api.chat, methods=["POST"]),
            Route("/v1/completions", api.completions, methods=["POST"]),
        ],
        middleware=[Middleware(_Guarded, hosts, api_key)],
        exception_handlers={
            ApiError: lambda _, error: _answer_error(error),
            HTTPException: lambda request, error: _answer_error(
                ApiError(
                    f"{request.method} {request.url.path}: {error.detail}", status=error.status_code
                )
            ),
            Exception: lambda *_: _answer_error(ApiError("an error of the server", status=500)),
        },
    )


def _answer_error(error: ApiError) -> Response:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body(), error.status, headers)


class _Guarded:
    """Lets only those pass who ask for one of some hosts, and, save to `/health`, know the key."""

    def __init__(self, app: ASGIApp, hosts: tuple[str, ...] | None, key: str | None):
        self._app, self._hosts = app, hosts
        self._expected = None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" else None
        app = self._app if refusal is None else _answer_error(refusal)
        try:
            await app(scope, receive, send)
        except asyncio.CancelledError:
            # Of which uvicorn, which cancels what is left at its end, would show a traceback.
            _LOG.warning("an answer was given up, since the server ends")

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = dict(reversed(scope["headers"]))
        if self._hosts is not None:
            named = headers.get(b"host", b"").decode("latin-1").lower()
            host = re.sub(r":\d*$", "", named)
            if host not in self._hosts:
                accepted = ", ".join(self._hosts)
                return ApiError(f"the host asked for is {named[:60]!r}; accepted: {accepted}")
        if self._expected is not None and scope["path"] != "/health":
            if not hmac.compare_digest(headers.get(b"authorization", b""), self._expected):
                return ApiError(
                    "the API key is missing or not the server's; accepted: the header "
                    "`Authorization: Bearer KEY`",
                    status=401,
                    code="invalid_api_key",
                )
        return None


class _Stream(StreamingResponse):
    """An answer in parts; its job ends with it, however it ends."""

    def __init__(self, parts: AsyncIterator[str], job: Job):
        super().__init__(
            parts, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._job = job

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._job.end()


class _Api:
    """What answers the calls."""

    def __init__(self, served: Served, engine: Engine, worker: Worker, max_body_bytes: int):
        self._served, self._engine, self._worker = served, engine, worker
        self._max_body_bytes = max_body_bytes
        self._texts = TokenTexts(served.model.model.tokenizer.tokenizer.backend_tokenizer)
        # Long prompts take a while, and the tokenizer serves one thread at a time.
        self._reader = concurrent.futures.ThreadPoolExecutor(1, "read-calls")

    async def health(self, request: Request) -> Response:
        """Whether calls are answered, and how many responses are under way."""
        failed = self._worker.error is not None
        state = {"status": "failed" if failed else "ok", "responses": self._worker.open}
        return JSONResponse(state, 500 if failed else 200)

    async def models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._card()]})

    async def model(self, request: Request) -> Response:
        if request.path_params["name"] != self._served.name:
            raise ApiError(
                f"there is no model {request.path_params['name']!r}; accepted: "
                f"{self._served.name!r}",
                status=404,
                code="model_not_found",
            )
        return JSONResponse(self._card())

    def _card(self) -> dict[str, Any]:
        return {
            "id": self._served.name,
            "object": "model",
            "created": 0,
            "owned_by": "attnpo",
            "max_model_len": self._served.length,
        }

    async def chat(self, request: Request) -> Response:
        return await self._answer(request, is_chat=True)

    async def completions(self, request: Request) -> Response:
        return await self._answer(request, is_chat=False)

    async def _answer(self, request: Request, *, is_chat: bool) -> Response:
        try:
            body = await self._body(request)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it
        loop = asyncio.get_running_loop()
        asked = await loop.run_in_executor(self._reader, self._read, body, is_chat)
        answer = Answer(asked, self._served.name, self._texts)
        job = self._worker.begin(asked.requests)
        if asked.stream:
            return _Stream(_parts(job, answer), job)
        try:
            whole = await _while_there(request, _whole(job, answer))
        finally:
            job.end()
        return Response(status_code=499) if whole is None else JSONResponse(whole)

    def _read(self, body: bytes, is_chat: bool) -> Asked:
        try:
            value = parse_json(body)
        except BadExample as error:
            raise ApiError(f"the body is {error.reason}") from None
        asked = parse(value, self._served, is_chat=is_chat)
        try:
            self._engine.check(asked.requests[0])
        except UserError as error:
            raise ApiError(str(error)) from error
        return asked

    async def _body(self, request: Request) -> bytes:
        """The body, of JSON; other types are refused, which web pages may send without asking."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                f"the body's type is {kind or 'not said'}; accepted: the header `Content-Type: "
                "application/json`",
                status=415,
            )
        most, body = self._max_body_bytes, bytearray()
        try:
            async with asyncio.timeout(_BODY_SECONDS):
                async for chunk in request.stream():
                    body += chunk
                    if len(body) > most:
                        raise ApiError(
                            f"the body has more than {most} bytes (serve.max_body_bytes)",
                            status=413,
                        )
        except TimeoutError:
            raise ApiError(f"no whole body within {_BODY_SECONDS} seconds", status=408) from None
        return bytes(body)


async def _whole(job: Job, answer: Answer) -> dict[str, Any]:
    found = {}
    async for update in job.updates():
        if update.response is not None:
            found[update.request] = update.response
            if update.response.finish_reason == "error":
                raise ApiError(_NOT_NUMBERS, status=500)
    return answer.whole([found[request] for request in job.requests])


async def _parts(job: Job, answer: Answer) -> AsyncIterator[str]:
    """Server-sent events."""
    try:
        for part in answer.first_parts():
            yield _event(part)
        async for update in job.updates():
            if update.response is not None and update.response.finish_reason == "error":
                raise ApiError(_NOT_NUMBERS, status=500)
            part = answer.part(update)
            if part is not None:
                yield _event(part)
        last = answer.last_part()
        if last is not None:
            yield _event(last)
    except ApiError as error:
        yield _event(error.body())
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


async def _while_there(
    request: Request, work: Coroutine[Any, Any, dict[str, Any]]
) -> dict[str, Any] | None:
    """What the work gives; None, and the work is given up, where the caller goes away before."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(gone())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, ApiError):
                await task
