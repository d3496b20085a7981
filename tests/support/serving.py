"""Servers for tests: in this process, on a free port, with a client that reads as slowly as it is told."""

import json
import socket
import threading
import time
from contextlib import contextmanager

from zigzag_ext.serve.http import Server, Service, bind

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'assistant' and loop.first %}{{ raise_exception('users speak first') }}{% endif %}"
    "{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def until(condition, seconds: float = 20.0) -> float:
    """Waits for it; the seconds that it took."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, "it did not come to that"
        time.sleep(0.005)
    return time.monotonic() - start


@contextmanager
def live(service: Service, **options):
    """A server that runs: yields it, with its `port`. It has ended when the block has, and what still ran was cancelled."""
    ready, bound = threading.Event(), bind("127.0.0.1", 0)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # little is on its way to a client that does not read
    server = Server(service, ready=ready.set, **options)
    server.port = bound.getsockname()[1]
    server.thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    server.thread.start()
    assert ready.wait(20)
    try:
        yield server
    finally:
        server.end()
        server.end()
        server.thread.join(20)
        assert not server.thread.is_alive() and service.active == 0


class Raw:
    """A connection with one request to /v1/completions on it. What comes back is read when it is asked for."""

    def __init__(self, port: int, **fields):
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self.socket.settimeout(20)
        self.socket.connect(("127.0.0.1", port))
        body = json.dumps(fields).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self.socket.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
        self.received = b""

    def until(self, text: str) -> None:
        while text.encode() not in self.received:
            more = self.socket.recv(4096)
            assert more, f"the connection ended before {text!r}: {self.received[-500:]}"
            self.received += more

    def rest(self) -> str:
        """All that has come when the server has closed the connection."""
        while more := self.socket.recv(1 << 16):
            self.received += more
        return self.received.decode()

    def close(self) -> None:
        self.socket.close()


def text_of(stream: str) -> str:
    """The text of the events of a stream of completions."""
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    return "".join(choice["text"] for each in events if "error" not in each for choice in each["choices"])
