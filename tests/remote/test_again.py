"""Runs taken up again in other circumstances than they began in."""

import signal
from pathlib import Path

import pytest

from tests.conftest import Command
from tests.remote.conftest import (
    DATA,
    Runs,
    Start,
    artifact,
    document,
    export,
    history,
    one_error,
    url,
    url_of,
    wait_for,
    worked,
)
from tests.servers.proxy import FaultProxy
from tests.servers.triton import TritonServer

pytestmark = pytest.mark.usefixtures("quick_figures")

ZIP = ("--method", "zip", "--queries", 200)


def test_a_run_goes_on_by_another_server_and_other_options(
    triton: TritonServer, start: Start, ztune: Command, local: Runs, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with FaultProxy(triton.grpc, 0, 0, 1, delay_s=0.02) as proxy:  # slow, to be stopped in time
        process = start("tune", url(proxy.address), *DATA, *ZIP, "--give-up", 60, "--out", out)
        wait_for(lambda: history(out) >= 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
        assert document(out)["status"] == "running"
        address = proxy.address
    # The first server is gone for good; what the run knows of it stays.
    lost = ztune("tune", "--resume", out, "--quiet", "--give-up", 1)
    one_error(lost.code, lost.err, address)
    done = ztune("tune", url_of(triton, "http"), "--resume", out, "--max-inflight", 2)
    assert done.code == 0, done.err
    assert artifact(out) == artifact(local(*ZIP))


def test_snapshots_are_those_of_a_local_run(
    triton: TritonServer, ztune: Command, local: Runs, tmp_path: Path
) -> None:
    out, words = tmp_path / "run", (*ZIP, "--snapshots", 4)
    done = ztune("tune", url_of(triton), *DATA, *words, "--out", out)
    assert done.code == 0, done.err
    expected = {path.name: path.read_bytes() for path in (local(*words) / "snapshots").iterdir()}
    assert len(expected) == 3
    assert {path.name: path.read_bytes() for path in (out / "snapshots").iterdir()} == expected
    # Besides the hand-written prompt and the report's two, one for each snapshot.
    assert document(out)["server"]["report_queries"] == 3 + len(expected)


def test_a_snapshot_that_was_not_written_is_made_up_for(
    triton: TritonServer, start: Start, ztune: Command, local: Runs, tmp_path: Path
) -> None:
    out, words = tmp_path / "run", (*ZIP, "--snapshots", "50,200")
    with FaultProxy(triton.grpc, 0, 0, 1, delay_s=0.02) as proxy:
        process = start("tune", url(proxy.address), *DATA, *words, "--out", out)
        wait_for(lambda: history(out) >= 5, process)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=120)
        queries = history(out) * 10
        for left in (out / "snapshots").glob("*"):
            left.unlink()
        done = ztune("tune", "--resume", out)
    assert done.code == 0, done.err
    made = sorted(path.stem for path in (out / "snapshots").iterdir())
    assert made[0] in (f"{queries - 10:09d}", f"{queries:09d}")  # where the saved state was
    assert made[1:] == ["000000200"]
    assert artifact(out) == artifact(local(*words))


def test_losses_alone_measure_nothing_and_encode_nothing(
    ztune: Command, start: Start, tmp_path: Path
) -> None:
    repository = export(Path("models/mini"), tmp_path / "losses", access="losses")
    with TritonServer(repository) as server:
        out = tmp_path / "run"
        done = ztune(
            "tune", url_of(server), *DATA, "--method", "zip", "--queries", 20, "--out", out
        )
        assert done.code == 0, done.err
        assert f"ztune eval {out} --bundle DIR" in done.out
        before = worked(server, "image")
        refused = ztune("eval", out, "--quiet")
        one_error(refused.code, refused.err, "only losses", "--bundle DIR")
        data = ("--data", "examples/digits", "--split", "all", "--quiet")
        refused = ztune("eval", url_of(server), *data)
        one_error(refused.code, refused.err, "only losses", "ztune eval BUNDLE --prompt FILE")
        # The start's parity asks for two images each time, and no other request for more.
        assert worked(server, "image") - before == 4
    measured = ztune("eval", out, "--bundle", "models/mini", "--json", "--quiet")
    assert measured.code == 0, measured.err
    assert 0 <= measured.json["accuracy"] <= 1
