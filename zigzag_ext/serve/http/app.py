"""The endpoints: an ASGI app, for `Server` or any other server."""

import asyncio
import time
from collections.abc import AsyncIterator

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request as Http
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from ... import __version__
from ..request import Completion, Request
from .answers import PING, Answer, event
from .errors import ApiError, api_error, install
from .fields import ChatFields, CompletionFields, Fields
from .gate import Gate
from .service import Service


def create_app(service: Service) -> FastAPI:
    """/v1/completions, /v1/chat/completions, /v1/models, /health and /metrics of a service."""
    app = FastAPI(title="zigzag_ext", version=__version__, docs_url=None, redoc_url=None)
    app.add_middleware(Gate, service=service)
    install(app)
    model = {"id": service.name, "object": "model", "created": int(time.time()), "owned_by": "zigzag_ext"}

    @app.post("/v1/completions")
    async def completions(fields: CompletionFields, http: Http) -> Response:
        return await _answer(service, fields, http)

    @app.post("/v1/chat/completions")
    async def chat_completions(fields: ChatFields, http: Http) -> Response:
        return await _answer(service, fields, http)

    @app.get("/v1/models")
    async def models() -> dict:
        return {"object": "list", "data": [model | {"max_model_len": service.engine.most_tokens}]}

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> dict:
        service.check_model(name)
        return (await models())["data"][0]

    @app.get("/health")
    async def health() -> Response:
        return JSONResponse({"status": service.health}, 200 if service.health == "ok" else 503)

    @app.get("/metrics")
    async def metrics(http: Http) -> Response:
        content, content_type = service.metrics.text(http.headers.get("accept", ""))
        return Response(content, headers={"Content-Type": content_type})

    return app


async def _answer(service: Service, fields: Fields, http: Http) -> Response:
    service.check_model(fields.model)
    request = await run_in_threadpool(service.submit, fields)
    answer = Answer(service.name, isinstance(fields, ChatFields), fields.usage_wanted)
    if fields.stream:
        return EventStream(service, request, answer)
    return JSONResponse(answer.whole(await _awaited(service, request, http)))


async def _awaited(service: Service, request: Request, http: Http) -> Completion:
    """What became of a request, which is cancelled as soon as its client has gone."""
    watch = asyncio.create_task(_gone(http))
    watch.add_done_callback(lambda task: request.cancel())
    try:
        async for _ in request:
            pass
        return _ended(request, gone=watch.done())
    except Exception as error:
        raise api_error(error) from error
    finally:
        watch.cancel()


async def _gone(http: Http) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass


def _ended(request: Request, gone: bool = False) -> Completion:
    """Raises ApiError if something else than its tokens has ended the request, 499 where that is that its client has `gone`."""
    completion = request.result(0)
    if completion.finish_reason == "cancelled":
        raise ApiError(
            499 if gone else 503, "the request was cancelled: the server ends, or nobody read its answer", code="cancelled"
        )
    return completion


class EventStream(StreamingResponse):
    """The tokens of a request as server-sent events.

    The engine never waits for a reader: tokens wait, at most max_tokens of them, until the connection takes them. The request is
    cancelled when the client goes, or takes nothing for `stall_seconds`.
    """

    def __init__(self, service: Service, request: Request, answer: Answer):
        self.service, self.request, self.answer = service, request, answer
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # proxies pass each event on at once
        super().__init__(self._events(), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()

        async def watched(message: Message) -> None:
            timer = loop.call_later(self.service.stall_seconds, self.request.cancel)
            try:
                await send(message)
            finally:
                timer.cancel()

        try:
            await super().__call__(scope, receive, watched)
        finally:
            self.request.cancel()  # nothing where it has ended

    async def _events(self) -> AsyncIterator[bytes]:
        try:
            for piece in self.answer.opening():
                yield piece
            async for text in self._texts():
                if text != "":
                    yield PING if text is None else self.answer.piece(text)
            for piece in self.answer.closing(_ended(self.request)):
                yield piece
        except Exception as error:  # the status has been sent: an event is what is left
            yield event(api_error(error).body)

    async def _texts(self) -> AsyncIterator[str | None]:
        """Of each token. None every `ping_seconds` until the first one: proxies take a silent connection for a broken one."""
        tokens = aiter(self.request)
        first = asyncio.ensure_future(anext(tokens, None))
        try:
            while not (await asyncio.wait([first], timeout=self.service.ping_seconds))[0]:
                yield None
        finally:
            first.cancel()  # nothing where it has come
        if (token := first.result()) is not None:
            yield token.text
            async for token in tokens:
                yield token.text
