"""What the real servers share: an environment of their own, ports, and a process group to kill."""

import atexit
import contextlib
import http.client
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import weakref
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import psutil
import pytest
from typing_extensions import Self

ROOT = Path(__file__).parent.parent.parent
LOOPBACK = "127.0.0.1"


def unavailable(reason: str) -> NoReturn:
    """Skip the test, or fail it where servers are required (ZTUNE_REQUIRE_SERVERS)."""
    if os.environ.get("ZTUNE_REQUIRE_SERVERS"):
        pytest.fail(f"ZTUNE_REQUIRE_SERVERS is set, but {reason}")
    pytest.skip(reason)


def find_environment(folder: str, variable: str, target: str) -> Path:
    """Return a server's environment, or skip or fail the test where there is none."""
    environment = Path(os.environ.get(variable) or ROOT / folder)
    if not (environment / ".ready").is_file():
        unavailable(f"{environment} is not there or not complete: run `make {target}`")
    return environment.absolute()


def entered(environment: Path) -> dict[str, str]:
    """Return the variables of a process in that environment, with nothing of our own Python."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    return kept | {
        "PATH": f"{environment / 'bin'}:{os.environ.get('PATH', os.defpath)}",
        "VIRTUAL_ENV": str(environment),
        "OMP_NUM_THREADS": "1",
        "ORT_DISABLE_TELEMETRY": "1",
    }


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on, outside the range of the clients' own ports."""
    # A client that knocks on a dead server's port may be given that very port as its own and then
    # talk to itself, or keep the server from coming back; below the range neither can happen.
    with Path("/proc/sys/net/ipv4/ip_local_port_range").open() as file:
        lowest = int(file.read().split()[0])
    ports: list[int] = []
    choose = random.SystemRandom()
    while len(ports) < count:
        port = choose.randrange(10_000, max(lowest, 12_000))
        with socket.socket() as probe:
            try:
                probe.bind((LOOPBACK, port))
            except OSError:
                continue
        if port not in ports:
            ports.append(port)
    return ports


def _kill(process: psutil.Process) -> None:
    """Kill a process that may be gone and wait for its end, not for its parent to collect it."""
    deadline = time.monotonic() + 5
    try:
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < deadline:
            time.sleep(0.005)
    except psutil.NoSuchProcess:
        pass


class ServerProcess(ABC):
    """A server on loopback, in a process group of its own, on ports that it keeps for life."""

    def __init__(self, *, wait_s: float) -> None:
        self.wait_s = wait_s
        self.start_s = 0.0
        """Seconds from the last start until the server was ready."""
        self._process: subprocess.Popen[bytes] | None = None
        self.folder = Path(tempfile.mkdtemp(prefix="server-"))
        """The server's working folder, which goes with this object."""
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)
        self._log = self.folder / "log.txt"
        self._log.touch()
        self._grpc_port, self._http_port = free_ports(2)

    @property
    def grpc(self) -> str:
        """The address for gRPC, as HOST:PORT."""
        return f"{LOOPBACK}:{self._grpc_port}"

    @property
    def http(self) -> str:
        """The address for HTTP, as HOST:PORT."""
        return f"{LOOPBACK}:{self._http_port}"

    @property
    def log(self) -> str:
        """All that the server wrote, over all its starts."""
        return self._log.read_text(errors="replace")

    @property
    def pid(self) -> int | None:
        """The server's process, while it runs."""
        running = self._process is not None and self._process.poll() is None
        return self._process.pid if running and self._process else None

    @abstractmethod
    def _command(self) -> list[str]: ...

    @abstractmethod
    def _environment(self) -> dict[str, str]: ...

    @abstractmethod
    def _clean(self) -> None:
        """Remove what a killed server leaves behind."""

    def start(self) -> None:
        """Start the server and wait until it is ready."""
        if self.pid is not None:
            return
        started = time.monotonic()
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(),
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        atexit.register(self.kill)
        try:
            while not self.ready():
                if self.pid is None:
                    raise RuntimeError(f"the server ended while starting:\n{self._tail()}")
                if time.monotonic() - started > self.wait_s:
                    raise RuntimeError(f"not ready after {self.wait_s} s:\n{self._tail()}")
                time.sleep(0.05)
        except BaseException:
            self.kill()
            raise
        self.start_s = time.monotonic() - started

    def ready(self) -> bool:
        """Ask whether the server and all its models are ready."""
        connection = http.client.HTTPConnection(LOOPBACK, self._http_port, timeout=2)
        try:
            connection.request("GET", "/v2/health/ready")
            if connection.getresponse().status != 200:
                return False
            socket.create_connection((LOOPBACK, self._grpc_port), timeout=2).close()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return True

    def kill(self) -> None:
        """Kill the server and all its helpers at once, as a crash or a lost machine would."""
        self._end(signal.SIGKILL, 0)

    def stop(self, timeout_s: float = 10.0) -> None:
        """Ask the server to end, and kill what is left of it after that time."""
        self._end(signal.SIGTERM, timeout_s)

    def restart(self) -> None:
        """Start the server again on the same ports, killing it first if it runs."""
        self.kill()
        self.start()

    def _end(self, how: signal.Signals, timeout_s: float) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.kill)
        try:
            family = psutil.Process(process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            family = []
        if how is not signal.SIGKILL and process.poll() is None:
            process.send_signal(how)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):  # no process may be left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        for member in family:
            _kill(member)
        self._clean()

    def _tail(self, lines: int = 40) -> str:
        return "\n".join(self.log.splitlines()[-lines:])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.kill()  # Triton takes two seconds to stop
