"""A run tuned on a server is the run tuned here: same steps, same bytes, and nothing sent twice."""

import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import MINI, Command
from tests.remote.conftest import (
    DATA,
    Runs,
    Start,
    artifact,
    document,
    history,
    journal,
    url,
    url_of,
    wait_for,
    worked,
)
from tests.servers.mlserver import MlServer
from tests.servers.proxy import FaultProxy
from tests.servers.triton import TritonServer
from ztune.artifact import ContextArtifact, HeadArtifact, MixtureArtifact, read_artifact

pytestmark = pytest.mark.usefixtures("quick_figures")

ZIP = ("--method", "zip", "--queries", 400)
OGN = ("--method", "ogn", "--queries", 100)
# Long enough to be stopped on the way.
LONG = ("--method", "zip", "--queries", 1000)


@pytest.fixture(scope="module")
def mlserver(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlServer]:
    models = tmp_path_factory.mktemp("models")
    for graph in repository.glob("*/1/model.onnx"):
        (models / graph.parent.parent.name).mkdir()
        (models / graph.parent.parent.name / "model.onnx").symlink_to(graph)
    with MlServer(models) as server:
        yield server


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where the test images' features are kept: every run is tested on the same ones."""
    return tmp_path_factory.mktemp("features")


def accuracy(ztune: Command, run: Path, features: Path) -> float:
    """Return the result's test accuracy, as the bundle has it on this machine."""
    done = ztune(
        "eval", MINI, "--split-file", run / "split.json", "--prompt", run / "prompt.safetensors",
        "--cache", features, "--quiet", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["split"] == "test"
    return float(done.json["accuracy"])


def contexts(run: Path) -> np.ndarray:
    kept = read_artifact(run / "prompt.safetensors")
    assert isinstance(kept, ContextArtifact)
    return kept.context


def nothing_twice(run: Path) -> None:
    """See that every query went once, and that journal, history and run.json tell the same."""
    told = document(run)
    wire = told["server"]
    assert wire["sent"] == told["queries"] == told["run_config"]["queries"]
    assert wire["possibly_billed_twice"] == 0
    lines = journal(run)
    assert wire["report_queries"] == sum(n for step, _, n in lines if step is None)
    steps = [(step, part) for step, part, _ in lines if step is not None]
    assert len(set(steps)) == len(steps)
    assert sum(n for step, _, n in lines if step is not None) == told["queries"]


@pytest.mark.parametrize("protocol", ["grpc", "http"])
@pytest.mark.parametrize("more", [(), ("--compression", "gzip")], ids=["default", "packed"])
def test_zip_on_a_server(
    protocol: str,
    more: tuple[str, ...],
    triton: TritonServer,
    local: Runs,
    features: Path,
    ztune: Command,
    tmp_path: Path,
) -> None:
    here, out = local(*ZIP), tmp_path / "run"
    done = ztune("tune", url_of(triton, protocol), *DATA, *ZIP, *more, "--out", out, "--json")
    assert done.code == 0, done.err
    nothing_twice(out)
    told = document(out)
    assert told["calls"]["losses"] == "here"
    np.testing.assert_allclose(contexts(out), contexts(here), atol=1e-5, rtol=0)
    assert artifact(out) == artifact(here)
    assert accuracy(ztune, out, features) == accuracy(ztune, here, features)


def test_images_encoded_here_give_the_same_bytes(
    triton: TritonServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    there, here = tmp_path / "there", tmp_path / "here"
    encodings = []
    for out, words in (
        (there, ()),
        (here, ("--images", "local", "--client", MINI, "--threads", 1)),
    ):
        before = worked(triton, "image")
        done = ztune("tune", url_of(triton), *DATA, *ZIP, *words, "--out", out, "--json")
        assert done.code == 0, done.err
        nothing_twice(out)
        encodings.append(worked(triton, "image") - before)
        assert artifact(out) == artifact(local(*ZIP))
    # Forty images to tune with and forty for validation, eight at a time; the others are probes.
    assert encodings[0] - encodings[1] == 80 / 8


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_losses_computed_by_the_server(
    protocol: str, triton: TritonServer, local: Runs, features: Path, ztune: Command, tmp_path: Path
) -> None:
    here, out = local(*ZIP), tmp_path / "run"
    words = ("--losses", "server", "--out", out, "--json")
    done = ztune("tune", url_of(triton, protocol), *DATA, *ZIP, *words)
    assert done.code == 0, done.err
    nothing_twice(out)
    assert document(out)["calls"]["losses"] == "server"
    # Sums in another order differ in their last bits, and each step adds to that: by 2e-5 after
    # 100 steps, of values around 0.1.
    np.testing.assert_allclose(contexts(out), contexts(here), atol=2e-4, rtol=0)
    assert document(out)["train_loss"] == pytest.approx(document(here)["train_loss"], abs=1e-4)
    assert accuracy(ztune, out, features) == accuracy(ztune, here, features)


def test_a_mixture_is_the_same(
    triton: TritonServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = ztune("tune", url_of(triton), *DATA, *OGN, "--out", out, "--json")
    assert done.code == 0, done.err
    nothing_twice(out)
    assert isinstance(read_artifact(out / "prompt.safetensors"), MixtureArtifact)
    assert artifact(out) == artifact(local(*OGN))


def test_a_head_is_the_same_and_costs_no_query(
    triton: TritonServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    done = ztune("tune", url_of(triton), *DATA, "--method", "gda", "--out", out, "--json")
    assert done.code == 0, done.err
    wire = document(out)["server"]
    assert (wire["sent"], wire["possibly_billed_twice"]) == (0, 0)
    assert isinstance(read_artifact(out / "prompt.safetensors"), HeadArtifact)
    assert artifact(out) == artifact(local("--method", "gda"))


@pytest.mark.parametrize("protocol", ["grpc", "http"])
def test_another_server_gives_the_same(
    protocol: str, mlserver: MlServer, local: Runs, ztune: Command, tmp_path: Path
) -> None:
    out, words = tmp_path / "run", ("--method", "zip", "--queries", 200)
    address = mlserver.grpc if protocol == "grpc" else mlserver.http
    done = ztune("tune", url(address, protocol), *DATA, *words, "--out", out, "--json")
    assert done.code == 0, done.err
    nothing_twice(out)
    assert artifact(out) == artifact(local(*words))


@pytest.mark.parametrize(
    ("how", "protocol"),
    [(signal.SIGKILL, "grpc"), (signal.SIGINT, "grpc"), (signal.SIGINT, "http")],
)
def test_a_run_that_ends_with_a_request_on_its_way(
    how: signal.Signals,
    protocol: str,
    start: Start,
    triton: TritonServer,
    local: Runs,
    ztune: Command,
    tmp_path: Path,
) -> None:
    out = tmp_path / "run"
    address = triton.grpc if protocol == "grpc" else triton.http
    with FaultProxy(address, resets=0, delays=0) as proxy:
        words = (*DATA, *LONG, "--out", out)
        process = start("tune", url(proxy.address, protocol), *words)
        wait_for(lambda: history(out) >= 20, process)
        proxy.pause()
        # Whatever was answered is saved by then, and the next request waits for its answer.
        wait_for(lambda: stuck(out), process)
        began = time.monotonic()
        process.send_signal(how)
        err = process.communicate(timeout=120)[1]
        seconds = time.monotonic() - began
        proxy.drop()
        proxy.resume()
        before, lines = history(out), journal(out)
        assert 20 <= before < 100
        if how == signal.SIGINT:
            assert process.returncode == 130
            command = f"ztune tune {url(proxy.address, protocol)} --resume {out}"
            assert err.splitlines()[-1] == f"error: stopped (resume with: {command})"
            # The deadline of the request on its way is 30 seconds.
            assert seconds < 5
        else:
            assert process.returncode == -how
        done = ztune("tune", "--resume", out, "--json")
    assert done.code == 0, done.err
    assert artifact(out) == artifact(local(*LONG))
    told = document(out)
    assert told["queries"] == 1000
    # Of the step on its way nothing was saved: its request is sent again.
    assert told["server"]["sent"] == 1000 + 10
    assert told["server"]["possibly_billed_twice"] == 10
    lost = [line for line in lines if line[0] == 10 * before]
    again = [line for line in journal(out)[len(lines) :] if line[0] is not None]
    assert lost == again[:1] == [(10 * before, 0, 10)]


def stuck(out: Path) -> bool:
    """Return whether a request is on its way whose answer does not come."""
    seen = journal(out), history(out)
    time.sleep(0.3)
    return seen == (journal(out), history(out))
