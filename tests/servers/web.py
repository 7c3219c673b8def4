"""An HTTP server in this process that answers byte by byte what a test wants."""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

from typing_extensions import Self

from tests.servers.process import LOOPBACK


class Asked(NamedTuple):
    """A request that arrived, and the number of the connection that it came by."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes
    connection: int


class Reply(NamedTuple):
    """What is sent: a status, headers as they are, and pieces of a body with pauses before each."""

    status: int = 200
    body: bytes | Iterator[bytes] = b""
    headers: Mapping[str, str] = {}
    length: int | None = None
    """The Content-Length to announce; None: the body's, and for pieces none."""
    ends: bool = False
    """Whether the connection is closed afterwards, without saying so before."""
    raw: Iterator[bytes] | None = None
    """What is sent in place of all that."""


def says(value: Any, status: int = 200) -> Reply:
    """Return a reply of JSON."""
    return Reply(status, json.dumps(value).encode())


def slowly(content: bytes, pause_s: float) -> Iterator[bytes]:
    """Yield a byte at a time."""
    for byte in content:
        time.sleep(pause_s)
        yield bytes([byte])


def chunked(*parts: bytes, end: bool = True) -> bytes:
    """Return a body in HTTP's chunks, with or without their end."""
    chunks = [b"%x\r\n%s\r\n" % (len(part), part) for part in parts]
    return b"".join(chunks) + (b"0\r\n\r\n" if end else b"")


class WebServer:
    """Serves from construction until `close`; `answer` may be set again at any time."""

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        self.n_connections = 0
        self._lock = threading.Lock()
        self._open: set[_Handler] = set()
        web = self

        class Handler(_Handler):
            server_of = web

        self._server = _Listener((LOOPBACK, 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))
        self._thread.start()

    @property
    def address(self) -> str:
        """Where it listens, as HOST:PORT."""
        return f"{LOOPBACK}:{self._server.server_address[1]}"

    def opened(self, handler: "_Handler") -> int:
        """Count a connection and return its number."""
        with self._lock:
            self._open.add(handler)
            self.n_connections += 1
            return self.n_connections

    def closed(self, handler: "_Handler") -> None:
        """Forget a connection."""
        with self._lock:
            self._open.discard(handler)

    def hang_up(self) -> None:
        """Close every connection, as a server does with idle ones, and wait until that is done."""
        with self._lock:
            handlers = list(self._open)
        for handler in handlers:
            handler.hang_up()
        until = time.monotonic() + 5
        while self._open and time.monotonic() < until:
            time.sleep(0.002)

    def close(self) -> None:
        """Stop listening and close every connection."""
        self._server.shutdown()
        self._thread.join(10)
        self.hang_up()
        self._server.server_close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: clients of a test leave as they like."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server_of: WebServer

    def setup(self) -> None:
        super().setup()
        self.number = self.server_of.opened(self)

    def finish(self) -> None:
        with contextlib.suppress(OSError):
            super().finish()
        self.connection.close()
        self.server_of.closed(self)

    def hang_up(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def do_GET(self) -> None:
        self._reply()

    def do_POST(self) -> None:
        self._reply()

    def _reply(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {key.lower(): value for key, value in self.headers.items()}
        asked = Asked(self.command, self.path, headers, body, self.number)
        self.server_of.asked.append(asked)
        reply = self.server_of.answer(asked)
        self.close_connection = reply.ends
        if reply.raw is not None:
            for piece in reply.raw:
                self.wfile.write(piece)
            return
        self.send_response(reply.status)
        for key, value in reply.headers.items():
            self.send_header(key, value)
        length = reply.length
        if length is None and isinstance(reply.body, bytes):
            length = len(reply.body)
        if length is not None and "Transfer-Encoding" not in reply.headers:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        for piece in [reply.body] if isinstance(reply.body, bytes) else reply.body:
            self.wfile.write(piece)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""
