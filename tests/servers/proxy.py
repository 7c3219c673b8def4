"""A network between a client and a server that breaks as networks do, as a seed says."""

import contextlib
import re
import select
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from types import TracebackType

from typing_extensions import Self

from tests.servers.process import LOOPBACK, free_ports

CHUNK = 1 << 16
# How much one side may be ahead of the other before it is read no further.
AHEAD = 1 << 20
TICK_S = 0.02
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, END_STREAM = 0, 1, 1


class BrokenError(Exception):
    """This connection ends here, with a reset."""


def reset(connection: socket.socket) -> None:
    """Close a connection with RST instead of FIN."""
    with contextlib.suppress(OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


class Relay:
    """One connection through a proxy, in one thread that owns both of its sockets.

    One thread, since close() neither closes nor resets a socket that another thread reads from.
    """

    def __init__(self, proxy: "Proxy", client: socket.socket, server: socket.socket) -> None:
        self.proxy = proxy
        self.client = client
        self.server = server
        self.upward = bytearray()
        """What is to be written to the server."""
        self.downward = bytearray()
        """What is to be written to the client."""
        self.held_until = 0.0
        self.closing = False
        """Close both sides once the client has what it is to have."""
        self.client_ended = 0.0
        """When the client said its last byte, if it has."""

    def from_client(self, data: bytes) -> None:
        """Take what the client sent."""
        self.upward += data

    def from_server(self, data: bytes) -> None:
        """Take what the server sent."""
        self.downward += data

    def server_ended(self) -> None:
        """Add what a client is to hear after the server's last byte."""

    def run(self, dropped: threading.Event) -> None:
        """Carry bytes until a side ends, a fault breaks the connection, or it is dropped."""
        try:
            for side in (self.client, self.server):
                side.setblocking(False)
                side.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while not dropped.is_set():
                if self.proxy.flowing.wait(TICK_S) and not self._step():
                    self.client.close()
                    self.server.close()
                    return
        except (BrokenError, OSError):
            pass
        finally:
            reset(self.client)
            reset(self.server)

    def _step(self) -> bool:
        """Move what can be moved now and tell whether there may be more."""
        now = time.monotonic()
        hold = self.held_until - now
        reading, writing = [], []
        if not self.client_ended and len(self.upward) < AHEAD:
            reading.append(self.client)
        if not self.closing and len(self.downward) < AHEAD:
            reading.append(self.server)
        if self.upward:
            writing.append(self.server)
        if self.downward and hold <= 0:
            writing.append(self.client)
        wait = min(TICK_S, hold) if hold > 0 else TICK_S
        readable, writable, _ = select.select(reading, writing, [], wait)
        if self.client in readable:
            if data := self.client.recv(CHUNK):
                self.from_client(data)
            else:
                self.client_ended = now
        if self.server in readable:
            if data := self.server.recv(CHUNK):
                self.from_server(data)
            else:
                self.server_ended()
                self.closing = True
        if self.server in writable:
            count = self.server.send(self.upward)
            del self.upward[:count]
            self.proxy.moved(sent=count)
        if self.client in writable and time.monotonic() >= self.held_until:  # held just now?
            count = self.client.send(self.downward)
            del self.downward[:count]
            self.proxy.moved(received=count)
        if self.closing:
            return bool(self.downward)
        # A client that is gone has no use for an answer, but the server is to get all it said.
        return bool(not self.client_ended or self.upward or now - self.client_ended < TICK_S)


class Proxy:
    """A TCP proxy on loopback before a target, HOST:PORT; base of what does more than carry."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self.target = (host, int(port))
        (self._port,) = free_ports(1)
        self.flowing = threading.Event()
        self.flowing.set()
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._sent = self._received = 0
        self._relays: dict[threading.Thread, threading.Event] = {}
        self._listener: socket.socket | None = None
        self._acceptor: threading.Thread | None = None
        self.refuse(False)

    @property
    def address(self) -> str:
        """Where clients connect, as HOST:PORT."""
        return f"{LOOPBACK}:{self._port}"

    @property
    def counts(self) -> dict[str, int]:
        """What happened so far, by kind; a fault counts when it is done, not when it is drawn."""
        with self._lock:
            return dict(self._counts)

    @property
    def sent(self) -> int:
        """Bytes from clients to the target."""
        return self._sent

    @property
    def received(self) -> int:
        """Bytes from the target to clients."""
        return self._received

    def count(self, kind: str) -> None:
        """Count one more of a kind."""
        with self._lock:
            self._counts[kind] += 1

    def moved(self, *, sent: int = 0, received: int = 0) -> None:
        """Count bytes that were passed on."""
        with self._lock:
            self._sent += sent
            self._received += received

    def pause(self) -> None:
        """Stop carrying bytes; connections stay open and new ones are accepted, but silent."""
        self.flowing.clear()

    def resume(self) -> None:
        """Carry bytes again, those that waited first."""
        self.flowing.set()

    def drop(self) -> None:
        """Reset every connection there is."""
        with self._lock:
            relays = dict(self._relays)
        for event in relays.values():
            event.set()
        for thread in relays:
            thread.join(10)

    def refuse(self, refused: bool = True) -> None:
        """Refuse connections and reset those there are, or listen again on the same port."""
        if refused and self._listener is not None and self._acceptor is not None:
            # close() alone would not wake the thread that waits in accept().
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)
            self._acceptor.join(10)
            self._listener.close()
            self._listener = self._acceptor = None
            self.drop()
        elif not refused and self._listener is None:
            self._listener = socket.create_server((LOOPBACK, self._port), backlog=64)
            self._acceptor = threading.Thread(
                target=self._accept, args=(self._listener,), daemon=True
            )
            self._acceptor.start()

    def close(self) -> None:
        """Stop listening and reset every connection."""
        self.refuse(True)

    def connect(self) -> socket.socket:
        """Return a connection to the target."""
        return socket.create_connection(self.target, timeout=5)

    def relay(self, client: socket.socket, server: socket.socket) -> Relay:
        """Return what carries one connection."""
        return Relay(self, client, server)

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            dropped = threading.Event()
            thread = threading.Thread(target=self._serve, args=(client, dropped), daemon=True)
            with self._lock:
                self._counts["connections"] += 1
                self._relays[thread] = dropped
                thread.start()

    def _serve(self, client: socket.socket, dropped: threading.Event) -> None:
        try:
            try:
                server = self.connect()
            except OSError:
                self.count("unreachable")
                reset(client)
                return
            self.relay(client, server).run(dropped)
        finally:
            with self._lock:
                self._relays.pop(threading.current_thread(), None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


@dataclass(frozen=True)
class Frame:
    """The head of an HTTP/2 frame."""

    length: int
    kind: int
    flags: int
    stream: int


class Frames:
    """Cuts one direction of an HTTP/2 connection, as it arrives, into heads and what follows."""

    def __init__(self, preface: int = 0) -> None:
        self._left = preface
        self._head = b""

    def cut(self, data: bytes) -> Iterator[tuple[bytes, Frame | None]]:
        """Yield pieces in order: a whole head with its meaning, or a part of what follows it."""
        while data:
            if self._left:
                piece, data = data[: self._left], data[self._left :]
                self._left -= len(piece)
                yield piece, None
                continue
            wanted = 9 - len(self._head)
            self._head, data = self._head + data[:wanted], data[wanted:]
            if len(self._head) == 9:
                head, self._head = self._head, b""
                self._left = int.from_bytes(head[:3], "big")
                stream = int.from_bytes(head[5:], "big") & 0x7FFFFFFF
                yield head, Frame(self._left, head[3], head[4], stream)


class FaultRelay(Relay):
    """A connection in which requests are seen and may meet a fault."""

    proxy: "FaultProxy"

    def __init__(self, proxy: "FaultProxy", client: socket.socket, server: socket.socket) -> None:
        super().__init__(proxy, client, server)
        self._opening: bytes | None = b""
        self._up: Frames | None = None
        self._down = Frames()
        self._stream = 0
        self._faults: dict[int, str] = {}
        self._asked = False
        self._cut: int | None = None
        """Bytes that the client is still to get before the connection closes."""

    def from_client(self, data: bytes) -> None:
        if self._opening is not None:  # which protocol is it?
            data, self._opening = self._opening + data, b""
            if len(data) < len(PREFACE) and PREFACE.startswith(data):
                self._opening = data
                return
            self._opening = None
            if data.startswith(PREFACE):
                self._up = Frames(len(PREFACE))
        if self._up is None:
            if not self._asked:
                self._request(0)
            self._asked = True
            self.upward += data
            return
        for piece, frame in self._up.cut(data):
            if frame and frame.kind == HEADERS and frame.stream > self._stream:
                self._stream = frame.stream
                self._request(frame.stream)
            self.upward += piece

    def from_server(self, data: bytes) -> None:
        if self._cut is not None:
            self._give(data)
        elif self._up is not None:
            for piece, frame in self._down.cut(data):
                if frame and frame.kind in (DATA, HEADERS) and frame.stream in self._faults:
                    last = frame.kind == HEADERS and bool(frame.flags & END_STREAM)
                    fault = self._faults[frame.stream]
                    if fault != "truncate" or last or (frame.kind == DATA and frame.length):
                        self._answer(frame.stream, len(piece) + frame.length // 2)
                self._give(piece)
        else:
            if self._asked:
                self._asked = False
                if 0 in self._faults:
                    self._answer(0, middle(data))
            self._give(data)

    def _request(self, stream: int) -> None:
        fault = self.proxy.draw()
        if fault == "reset_before":
            self.proxy.count(fault)
            raise BrokenError
        if fault == "pass":
            self.proxy.count(fault)
        else:
            self._faults[stream] = fault

    def _answer(self, stream: int, cut: int) -> None:
        """Meet the fault that was drawn for a request whose answer begins here."""
        fault = self._faults.pop(stream)
        self.proxy.count(fault)
        if fault == "reset_after":
            raise BrokenError
        if fault == "delay":
            self.held_until = time.monotonic() + self.proxy.delay_s
        elif fault == "truncate" and self._cut is None:
            self._cut = cut

    def _give(self, data: bytes) -> None:
        if self._cut is not None:
            data = data[: self._cut]
            self._cut -= len(data)
            self.closing = self._cut == 0
        self.downward += data


def middle(answer: bytes) -> int:
    """Return where to cut an HTTP/1.1 answer of which this is the beginning."""
    head, end, body = answer.partition(b"\r\n\r\n")
    if not end:
        return max(1, len(answer) // 2)
    told = re.search(rb"^content-length:\s*(\d+)", head, re.IGNORECASE | re.MULTILINE)
    size = int(told[1]) if told else len(body)
    return len(head) + len(end) + size // 2 if size else len(head) // 2


class FaultProxy(Proxy):
    """A proxy that sees requests, of HTTP/1.1 and of gRPC, and lets some of them go wrong.

    Rates are shares of requests. What meets request number n depends on the seed and n only. A
    reset comes alternately before the server has got the request (`reset_before`) and when its
    answer begins to arrive (`reset_after`); a `delay` holds the answer, and all behind it on its
    connection, for `delay_s`; `truncate` closes the connection in the middle of the answer.
    """

    def __init__(
        self,
        target: str,
        seed: int = 0,
        resets: float = 0.05,
        delays: float = 0.05,
        truncations: float = 0.0,
        delay_s: float = 0.2,
    ) -> None:
        if min(resets, delays, truncations) < 0 or resets + delays + truncations > 1:
            raise ValueError("rates are shares of one")
        self.resets, self.delays, self.truncations = resets, delays, truncations
        self.delay_s = delay_s
        self._random = Random(seed)
        self._resets_drawn = 0
        super().__init__(target)

    def draw(self) -> str:
        """Return what the next request meets."""
        with self._lock:
            self._counts["requests"] += 1
            place = self._random.random()
            if place < self.resets:
                self._resets_drawn += 1
                return "reset_before" if self._resets_drawn % 2 else "reset_after"
            if place < self.resets + self.delays:
                return "delay"
            return "truncate" if place < self.resets + self.delays + self.truncations else "pass"

    def relay(self, client: socket.socket, server: socket.socket) -> Relay:
        return FaultRelay(self, client, server)
