"""Server: uvicorn around a `Service`, from the first connection to a clean end."""

import asyncio
import socket
import time
from collections.abc import Callable

import uvicorn
from uvicorn.config import LOGGING_CONFIG

from ..errors import EngineStopped
from .app import create_app
from .service import Service

_LOOK = 0.05  # seconds between looks at what may end the server
_GRACE = 5  # seconds for answers that have ended, to be read


def bind(host: str, port: int) -> socket.socket:
    """A socket at that address, which does not listen yet. port 0: any that is free. Raises OSError, which names the address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise OSError(f"there is no address {host!r}: {error.strerror}") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise OSError(f"cannot serve at {host} port {port}: {error.strerror}") from error
    return bound


class Server(uvicorn.Server):
    """Serves until SIGINT, SIGTERM or `end()`, or until the engine is ended by an error. `run(sockets=[bind(...)])` starts it.

    It then answers 503, while what runs has `drain_seconds` to end; a second signal, or `end()`, cancels that at once. The engine
    is closed behind it. error: what has ended the engine, if not this.

    ready: called when it listens.
    """

    def __init__(
        self,
        service: Service,
        drain_seconds: float = 30.0,
        log_requests: bool = False,
        ready: Callable[[], None] = lambda: None,
    ):
        logs = {"log_config": LOGGING_CONFIG if log_requests else None, "access_log": log_requests, "server_header": False}
        super().__init__(uvicorn.Config(create_app(service), lifespan="off", ws="none", timeout_graceful_shutdown=_GRACE, **logs))
        self.service, self.drain_seconds, self.ready = service, drain_seconds, ready
        self.error: EngineStopped | None = None
        self.hurries = False

    def end(self) -> None:
        """From any thread."""
        self.hurries = self.service.is_draining
        self.service.is_draining = True

    def handle_exit(self, sig, frame) -> None:
        """As uvicorn calls it for signals, which it raises once more when it has ended, if they are not its own to handle."""
        self.end()

    async def startup(self, sockets=None) -> None:
        await super().startup(sockets)
        self.ready()

    async def serve(self, sockets=None) -> None:
        ending = asyncio.create_task(self._end())
        try:
            await super().serve(sockets)
        finally:
            ending.cancel()

    async def _end(self) -> None:
        service, engine = self.service, self.service.engine
        try:
            while not service.is_draining and engine.stopped is None:
                await asyncio.sleep(_LOOK)
            service.is_draining, deadline = True, time.monotonic() + self.drain_seconds
            while service.active and engine.stopped is None and not self.hurries and time.monotonic() < deadline:
                await asyncio.sleep(_LOOK)
            self.error = engine.stopped
            await asyncio.to_thread(engine.close, drain=False)
        finally:
            self.should_exit, self.force_exit = True, self.hurries
