"""The drill: requests reset, held back and cut short, servers killed; the same bytes come out."""

import contextlib
import itertools
import shutil
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from runtimes.bundle import load_bundle
from tests.conftest import MINI, Command
from tests.remote.conftest import (
    DATA,
    Runs,
    Start,
    artifact,
    document,
    export,
    history,
    journal,
    one_error,
    url,
    url_of,
    wait_for,
    worked,
)
from tests.servers.proxy import FaultProxy, Proxy
from tests.servers.triton import TritonServer
from ztune.cli.main import main

pytestmark = pytest.mark.usefixtures("quick_figures")

# A request of two queries at a time, so that few queries are many requests.
ZIP = ("--method", "zip", "--set", "n_pairs=1")
QUERIES = 240
RUN = (*ZIP, "--queries", QUERIES)
# With its faults each request takes the longer.
DRILL = 160
DEADLINE = 0.4
# What a client may wait between two attempts, whatever has failed before.
LONGEST_WAIT = 5.0
SEED = 1
FAULTS = ("reset_before", "reset_after", "delay", "truncate")


class Network(FaultProxy):
    """Faults from when a run has written a file: at the start a server is to be well."""

    def __init__(self, target: str, started: Path, **rates: float) -> None:
        self.started = started
        self.seen: list[float] = []
        """When a request came, was answered, or could not be passed on."""
        super().__init__(target, SEED, **rates)

    def draw(self) -> str:
        self.seen.append(time.monotonic())
        return super().draw() if self.started.exists() else "pass"

    def count(self, kind: str) -> None:
        self.seen.append(time.monotonic())
        super().count(kind)

    @property
    def longest_silence(self) -> float:
        times = sorted(self.seen)
        return max(b - a for a, b in itertools.pairwise(times))


def n_reports(out: Path) -> int:
    return sum(step is None for step, _, _ in journal(out))


@dataclass(frozen=True)
class Undisturbed:
    """A run without any fault."""

    artifact: bytes
    worked: int
    """How often that had the server encode prompts."""
    n_reports: int


@pytest.fixture(scope="module")
def undisturbed(triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    out, before = tmp_path_factory.mktemp("undisturbed") / "run", worked(triton)
    words = ("tune", url_of(triton), *DATA, *ZIP, "--queries", DRILL, "--quiet", "--out", out)
    assert main([str(word) for word in words]) == 0
    assert billed(out, DRILL) == 0
    return Undisturbed(artifact(out), worked(triton) - before, n_reports(out))


def billed(out: Path, queries: int) -> int:
    """Return the queries possibly billed twice, on which every count of the run agrees."""
    told = document(out)
    wire = told["server"]
    assert told["queries"] == queries
    assert wire["sent"] == queries + wire["possibly_billed_twice"]
    lines = [line for line in journal(out) if line[0] is not None]
    assert sum(n for _, _, n in lines) == wire["sent"]
    once = {(step, part): n for step, part, n in lines}
    assert sum(once.values()) == queries
    return int(wire["possibly_billed_twice"])


def address_of(server: TritonServer, protocol: str) -> str:
    return server.grpc if protocol == "grpc" else server.http


def test_the_drill(
    start: Start, mortal: TritonServer, undisturbed: Undisturbed, tmp_path: Path
) -> None:
    # Two clients at once, which is no easier and takes half the time.
    runs = {protocol: tmp_path / protocol for protocol in ("grpc", "http")}
    rates = {"resets": 0.05, "delays": 0.05, "truncations": 0.04, "delay_s": 1.5 * DEADLINE}
    times = 0
    with contextlib.ExitStack() as stack:
        networks, processes = [], []
        for protocol, out in runs.items():
            started, target = out / "sent.jsonl", address_of(mortal, protocol)
            networks.append(stack.enter_context(Network(target, started, **rates)))
            words = (*DATA, *ZIP, "--queries", DRILL, "--out", out)
            address = url(networks[-1].address, protocol)
            processes.append(start("tune", address, *words, "--deadline", DEADLINE))
        for steps in (10, 30, 50):
            for out, process in zip(runs.values(), processes, strict=True):
                wait_for(lambda out=out, n=steps: history(out) >= n, process)  # type: ignore[misc]
            times += worked(mortal)
            mortal.restart()
        for process in processes:
            err = process.communicate(timeout=120)[1]
            assert process.returncode == 0, err
        times += worked(mortal)
    for network in networks:
        for kind in FAULTS:
            assert network.counts[kind] > 0, network.counts
        assert network.longest_silence < DEADLINE + LONGEST_WAIT
    assert any("unreachable" in network.counts for network in networks)
    twice, again = 0, times
    for out in runs.values():
        assert artifact(out) == undisturbed.artifact
        assert billed(out, DRILL) > 0
        twice += billed(out, DRILL)
        again -= undisturbed.worked + n_reports(out) - undisturbed.n_reports
    # Where the server worked at a request again, the client says so; it may say more: not every
    # request that got no answer was worked at.
    assert twice >= 2 * again > 0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_faults_while_images_are_encoded(
    protocol: str, start: Start, triton: TritonServer, local: Runs, tmp_path: Path
) -> None:
    # Of gRPC all requests on their way share one connection: what resets it fails all of them.
    out = tmp_path / "run"
    rates = {"resets": 0.08, "delays": 0.03, "truncations": 0.03, "delay_s": 1.5 * DEADLINE}
    with Network(address_of(triton, protocol), out, **rates) as network:
        words = ("--method", "gda", "--max-inflight", 2, "--out", out)
        address = url(network.address, protocol)
        process = start("tune", address, *DATA, *words, "--deadline", DEADLINE)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert sum(network.counts.get(kind, 0) for kind in FAULTS) > 1
    assert artifact(out) == artifact(local("--method", "gda"))
    told = document(out)
    assert told["image_forwards"] == 80
    assert told["server"]["sent"] == 0


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_connection_that_has_gone_silent(
    protocol: str, start: Start, triton: TritonServer, local: Runs, tmp_path: Path
) -> None:
    # As behind a gateway that forgot the connection: what was open stays open and carries nothing
    # more, while a new connection would be served.
    out = tmp_path / "run"
    with Silenced(address_of(triton, protocol), out) as network:
        waits = ("--deadline", DEADLINE, "--give-up", 15)
        words = (*DATA, *RUN, *waits, "--out", out)
        process = start("tune", url(network.address, protocol), *words)
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert network.counts["delay"] == 1
    assert artifact(out) == artifact(local(*RUN))
    assert billed(out, QUERIES) == 2


class Silenced(Network):
    """One connection goes silent, in the middle of a run."""

    def __init__(self, target: str, run: Path) -> None:
        super().__init__(target, run, resets=0, delays=0, delay_s=60)
        self.run = run

    def draw(self) -> str:
        super().draw()
        first = "delay" not in self.counts and history(self.run) == QUERIES // 4
        return "delay" if first else "pass"


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_a_server_that_stays_away(
    protocol: str, start: Start, mortal: TritonServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    out, give_up = tmp_path / "run", 2
    waits = ("--deadline", 1.5, "--give-up", give_up)
    process = start("tune", url_of(mortal, protocol), *DATA, *RUN, *waits, "--quiet", "--out", out)
    wait_for(lambda: history(out) >= 20, process)
    mortal.kill()
    began = time.monotonic()
    err = process.communicate(timeout=120)[1]
    assert give_up - 0.2 < time.monotonic() - began < give_up + 30
    one_error(
        process.returncode, err, f"no answer for {give_up:g} s",
        "all completed steps are saved",
        f"resume with: ztune tune {url_of(mortal, protocol)} --resume {out}",
    )  # fmt: skip
    assert document(out)["status"] == "running"

    lost = ztune("tune", "--resume", out, "--quiet")
    one_error(lost.code, lost.err, str(mortal.grpc if protocol == "grpc" else mortal.http))
    mortal.start()
    done = ztune("tune", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert artifact(out) == artifact(local(*RUN))
    assert billed(out, QUERIES) > 0


def another(folder: Path) -> Path:
    """Write a bundle that only its manifest tells from the embedded one."""
    shutil.copytree(MINI, folder)
    manifest = folder / "bundle.json"
    changed = manifest.read_text().replace("local-dir:checkpoint", "local-dir:checkpoins", 1)
    manifest.write_text(changed)
    assert load_bundle(folder).digest != load_bundle(MINI).digest
    return folder


def test_a_server_that_comes_back_with_another_model(
    start: Start, mortal: TritonServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    out, former = tmp_path / "run", mortal.repository
    process = start("tune", url_of(mortal), *DATA, *RUN, "--quiet", "--out", out)
    wait_for(lambda: history(out) >= 20, process)
    mortal.kill()
    mortal.repository = export(another(tmp_path / "another"), tmp_path / "repository")
    mortal.start()
    err = process.communicate(timeout=120)[1]
    one_error(
        process.returncode, err, "now serves bundle",
        "restore that bundle",
    )  # fmt: skip
    done = history(out)
    refused = ztune("tune", "--resume", out, "--quiet")
    one_error(refused.code, refused.err, "is not the one that the run was started with")
    assert history(out) == done >= 20

    mortal.kill()
    mortal.repository = former
    mortal.start()
    resumed = ztune("tune", "--resume", out, "--json")
    assert resumed.code == 0, resumed.err
    assert artifact(out) == artifact(local(*RUN))
    assert billed(out, QUERIES) >= 2


class Replicas(Proxy):
    """One address of two servers, as a Kubernetes Service has it: connections go to each in turn.

    A server that is away gets none.
    """

    def __init__(self, *targets: str) -> None:
        super().__init__(targets[0])
        hosts = [target.rpartition(":") for target in targets]
        self._turns = itertools.cycle([(host, int(port)) for host, _, port in hosts])

    def connect(self) -> socket.socket:
        try:
            return socket.create_connection(next(self._turns), timeout=5)
        except OSError:
            return socket.create_connection(next(self._turns), timeout=5)


@pytest.mark.parametrize(("protocol", "losses"), [("grpc", "here"), ("http", "server")])
def test_one_of_two_replicas_behind_one_address_dies(
    protocol: str,
    losses: str,
    start: Start,
    triton: TritonServer,
    mortal: TritonServer,
    ztune: Command,
    tmp_path: Path,
) -> None:
    runs = [tmp_path / name for name in ("alone", "both")]
    words = (*DATA, *RUN, "--losses", losses, "--quiet")
    alone = ztune("tune", url_of(triton, protocol), *words, "--out", runs[0])
    assert alone.code == 0, alone.err
    with Replicas(address_of(mortal, protocol), address_of(triton, protocol)) as service:
        process = start("tune", url(service.address, protocol), *words, "--out", runs[1])
        wait_for(lambda: history(runs[1]) >= 20, process)
        before = worked(mortal, "prompt") + worked(mortal, "score")
        mortal.kill()
        err = process.communicate(timeout=120)[1]
    assert process.returncode == 0, err
    assert before >= 5  # connections of HTTP are in turns to one and the other
    assert artifact(runs[0]) == artifact(runs[1])
    assert billed(runs[0], QUERIES) == 0
