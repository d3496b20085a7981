"""Gate: what stands in front of every request under /v1."""

import asyncio

from fastapi import HTTPException
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .service import Service


class Gate:
    """Refuses requests before their body is read: a wrong key, a server that drains, a body that is too large. Counts the others.

    A middleware of plain ASGI: between an app and its streams nothing may wait for the whole.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith("/v1/"):
            return await self.app(scope, receive, send)
        service, headers, read = self.service, Headers(scope=scope), 0

        async def limited() -> Message:
            nonlocal read
            message = await receive()
            read += len(message.get("body", b""))
            if error := service.too_large(read):
                raise HTTPException(error.status, str(error))
            return message

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                service.metrics.responses.labels(message["status"]).inc()
            await send(message)

        service.active += 1
        try:
            refusal = service.refusal(headers.get("authorization", ""), headers.get("content-length", ""))
            await (self.app if refusal is None else refusal.response)(scope, limited, counted)
        except asyncio.CancelledError:
            if not service.is_draining:  # else the server ends, and this answer has had its time: no traceback
                raise
        finally:
            service.active -= 1
