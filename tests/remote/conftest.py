"""Runs tuned on real servers: one Triton for the session, and the local runs they must equal."""

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from export.triton import Serving, export_triton
from runtimes.bundle import load_bundle
from tests.conftest import FEW_DIGITS, MINI
from tests.servers.triton import TritonServer, triton_environment
from ztune.cli.main import main

OPTIONS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--disable-auto-complete-config",
)
# Four images a class to tune with, the others of digits' small split to test with.
DATA = ("--data", FEW_DIGITS, "--shots", 4)


def export(bundle: Path, folder: Path, access: str = "features") -> Path:
    """Write the repository of a bundle as "mini", whose graphs run on one thread as ours do."""
    serving = Serving(backend="python", threads=1, access=access)
    export_triton(load_bundle(bundle), folder, "mini", serving)
    return folder


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Fetch client halves into a folder of this session."""
    folder = tmp_path_factory.mktemp("cache-home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        for name in ("ZTUNE_TOKEN", "ZTUNE_BASIC_AUTH", "ZTUNE_TOKEN_HOST"):
            patch.delenv(name, raising=False)
        yield folder


@pytest.fixture(scope="session")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    triton_environment()  # skips before anything is written
    return export(MINI, tmp_path_factory.mktemp("served") / "repository")


@pytest.fixture(scope="session")
def triton(repository: Path) -> Iterator[TritonServer]:
    """The server that no test harms."""
    with TritonServer(repository, args=OPTIONS) as server:
        yield server


@pytest.fixture
def mortal(repository: Path) -> Iterator[TritonServer]:
    """A server of one test's own, to kill."""
    with TritonServer(repository, args=OPTIONS) as server:
        yield server


Runs = Callable[..., Path]


@pytest.fixture(scope="session")
def local(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Return the folder of a run with these words on this machine; each is made once."""
    folder, made = tmp_path_factory.mktemp("local"), dict[tuple[str, ...], Path]()

    def run(*words: object) -> Path:
        asked = tuple(str(word) for word in words)
        if asked not in made:
            made[asked] = folder / str(len(made))
            common = [str(word) for word in ("tune", MINI, *DATA, "--threads", 1, "--quiet")]
            assert main([*common, *asked, "--out", str(made[asked])]) == 0
        return made[asked]

    return run


def url(address: str, protocol: str = "grpc", name: str = "mini") -> str:
    """Return the URL of a server's models."""
    return f"{'triton' if protocol == 'grpc' else 'http'}://{address}/{name}"


def url_of(server: TritonServer, protocol: str = "grpc") -> str:
    """Return the URL of a real server's models."""
    return url(server.grpc if protocol == "grpc" else server.http, protocol)


def worked(server: TritonServer, part: str = "prompt") -> int:
    """Return how often a model has worked since its server's start, by the server's own count."""
    host, _, port = server.http.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=5)
    try:
        connection.request("GET", f"/v2/models/mini_{part}/stats")
        told = json.loads(connection.getresponse().read())
    finally:
        connection.close()
    (model,) = told["model_stats"]
    return int(model["inference_stats"]["success"]["count"]) - 1  # it warms up by itself


def document(run: Path) -> dict[str, Any]:
    """Return what run.json says."""
    value = json.loads((run / "run.json").read_text())
    assert isinstance(value, dict)
    return value


def artifact(run: Path) -> bytes:
    return (run / "prompt.safetensors").read_bytes()


def journal(run: Path) -> list[tuple[int | None, int, int]]:
    """Return the requests sent so far: queries before their step, number in it, queries in them."""
    path = run / "sent.jsonl"
    whole = path.read_bytes().rpartition(b"\n")[0] if path.exists() else b""
    return [tuple(json.loads(line)) for line in whole.splitlines()]


def history(run: Path) -> int:
    """Return how many steps are done."""
    path = run / "history.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Run `ztune` in a process of its own, which does not outlive the test."""
    made: list[subprocess.Popen[str]] = []

    def run(*words: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "ztune.cli.main", *(str(word) for word in words)]
        made.append(
            subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        )
        return made[-1]

    yield run
    for process in made:
        process.kill()
        process.wait()
        if process.stderr is not None:
            process.stderr.close()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str] | None = None) -> None:
    """Wait until something is so, at most half a minute, while the process lives."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never came to be"
        if process is not None and process.poll() is not None:
            pytest.fail(f"the run ended early: {process.communicate()[1]}")
        time.sleep(0.005)


def one_error(code: int, err: str, *parts: str) -> str:
    """Return the one line that a refused command says, which begins with `error:`."""
    lines = [line for line in err.splitlines() if not line.startswith("warning: ")]
    assert code == 1, err
    assert len(lines) == 1, err
    assert lines[0].startswith("error: "), err
    for part in parts:
        assert part in lines[0], lines[0]
    return lines[0]


def contents(folder: Path) -> Sequence[tuple[Path, bytes]]:
    """Return all files under a folder."""
    return [(path, path.read_bytes()) for path in sorted(folder.rglob("*")) if path.is_file()]
