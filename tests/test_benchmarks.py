"""Check that the benchmarks count and compose correctly; measurements are not asserted."""

import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

import ztune
from benchmarks import (
    bundle_size,
    endtoend,
    gpu,
    harness,
    predict,
    remote,
    remote_ways,
    scaling,
    speed,
    towers,
)
from benchmarks.measure import ROOT, interleaved
from benchmarks.names import CALTECH101, CIFAR10, classes_named, phrases
from benchmarks.remote_ways import WAYS, ServerCounts, Task, Way
from benchmarks.towers import Size, lean
from runtimes.bundle import load_bundle
from runtimes.providers import Execution
from tests.conftest import DIGITS, MINI
from tests.servers.triton import triton_environment
from tests.shared_bundle import share_weights
from ztune.artifact import read_artifact
from ztune.errors import ProviderError
from ztune.types import Batch, Evaluation, Prompts

TINY = Size("tiny", layers=2)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache that holds the tiny model's graphs, exported in this process."""

    class Called:
        def __init__(self, command: list[str], **_: Any) -> None:
            assert command[:3] == [sys.executable, "-m", "benchmarks.towers"]
            with mock.patch.object(sys, "argv", command[2:]):
                towers.main()

        def wait(self) -> int:
            return 0

    folder = tmp_path_factory.mktemp("benchmarks")
    with mock.patch("benchmarks.towers.subprocess.Popen", Called):
        lean(TINY, folder)
    return folder


def test_names() -> None:
    for names, n in (
        (CIFAR10, 10),
        (CALTECH101, 100),
        (phrases(1000), 1000),
        (phrases(2000), 2000),
    ):
        assert len(names) == len(set(names)) == n
        assert all(name == " ".join(name.split()) and name for name in names)
    words = [len(phrase.split()) for phrase in phrases(1000)]
    assert 1.8 < sum(words) / len(words) < 2.2
    assert classes_named(10) == CIFAR10
    assert classes_named(11) == CALTECH101[:11]
    assert len(classes_named(101)) == 101


def test_flops_count_every_product_of_every_token() -> None:
    lengths, P, m, d, L, e = [2, 4, 3], 2, 3, 8, 4, 5
    multiply_adds = 0

    def linear(n_in: int, n_out: int) -> None:
        nonlocal multiply_adds
        multiply_adds += n_in * n_out

    def block(layer: int, n_seen: int, is_end: bool, projected: bool) -> None:
        """Count one token in one layer."""
        nonlocal multiply_adds
        if projected:
            linear(d, 2 * d)  # key and value
        if layer == L - 1 and not is_end:
            return
        if projected:
            linear(d, d)  # query
        multiply_adds += 2 * d * n_seen  # scores, and the values they weigh
        linear(d, d)
        linear(d, 4 * d)
        linear(4 * d, d)

    for layer, candidate in itertools.product(range(L), range(P)):
        for i in range(m):
            block(layer, 1 + i + 1, is_end=False, projected=True)
        for n in lengths:
            for j in range(n):
                # The first layer projects the names for the first candidate only.
                shared = layer == 0 and candidate > 0
                block(layer, 1 + m + j + 1, is_end=j == n - 1, projected=not shared)
    for _ in range(P * len(lengths)):
        linear(d, e)
    assert speed.matrix_flops(lengths, P, m, d, L, e) == 2 * multiply_adds


def test_speed_document(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "_EDGE", 256)  # of the products that measure the machine
    monkeypatch.setattr(speed, "_GEMM_FLOP", 2 * 256**3)
    extent = speed.Extent(
        TINY,
        classes={3: 1, 12: 1},
        contexts=(4,),
        published_images=1,
        published_classes=3,
        run_queries=20,
    )
    document = speed.measure(extent, cache)
    json.dumps(document, allow_nan=False)
    assert {"machine", "versions", "commit", "sgemm", "published", "runs"} <= document.keys()
    assert document["tower"]["layers"] == 2
    cells = [(row["classes"], row["context_tokens"], row["precision"]) for row in document["rows"]]
    assert cells == [(3, 4, "fp32"), (3, 4, "int8"), (12, 4, "fp32"), (12, 4, "int8")]
    for row in document["rows"]:
        for key in (
            "queries_per_s",
            "ratio_naive",
            "ratio_published",
            "sgemm_fraction",
            "seconds_per_query",
        ):
            assert row[key] > 0
        assert 0 < row["numpy_share"] < 1
        assert row["published_scaled"] is True
        if row["precision"] == "fp32":
            assert row["max_abs_error"] < 1e-5
    assert [run["queries"] for run in document["runs"]] == [20, 20]


def test_scaling_point(cache: Path) -> None:
    point = {"C": 5, "P": 4, "N": 6, "m": 2}
    found = scaling.steps(lean(TINY, cache) / "fp32", point)
    assert found["plan"]["candidates"] == 4
    assert found["step_seconds"] >= found["graph_seconds"] > 0


def test_a_gpu_run_composes(cache: Path) -> None:
    found = gpu.run(lean(TINY, cache) / "fp32", 5, 20, Execution("cpu"))
    assert found["calls"]["candidates"] == 10
    assert found["seconds"] > 0


def test_gpu_reports_why_it_did_not_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(_: str) -> None:
        raise ProviderError("no CUDA here")

    monkeypatch.setattr(gpu, "resolve", refuse)
    monkeypatch.setattr(sys, "argv", ["gpu"])
    with pytest.raises(SystemExit) as stop:
        gpu.main()
    assert stop.value.code == 1
    document: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert document["ran"] is False
    assert document["reason"] == "no CUDA here"


def test_peaks_are_of_the_process_and_its_children() -> None:
    # In a process without torch, since the reported memory is at least the parent's.
    code = """
import subprocess, sys
from benchmarks.measure import run_alone
large = "import time; x = bytearray(200_000_000); time.sleep(0.3); print(1)"
one = run_alone([sys.executable, "-c", large])
words = [sys.executable, "-c", large]
both = f"import subprocess; x = bytearray(150_000_000); subprocess.run({words})"
two = run_alone([sys.executable, "-c", both], watch=True)
print(one.out.strip(), one.peak_mb, two.peak_mb, two.tree_peak_mb)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    out, one, two, together = (float(word) for word in done.stdout.split())
    assert out == 1
    assert 200 < one < 300
    assert 200 < two < 300
    assert together > 350


def test_loops_are_interleaved_and_report_medians() -> None:
    turns: list[str] = []
    values = iter([3.0, 0.0, 1.0, 0.0, 2.0, 0.0])

    def loop(name: str) -> dict[str, float]:
        turns.append(name)
        return {"seconds": next(values)}

    found = interleaved({"a": lambda: loop("a"), "b": lambda: loop("b")}, 3)
    assert turns == ["a", "b"] * 3
    assert found == {"a": {"seconds": 2.0}, "b": {"seconds": 0.0}}


def test_every_way_evaluates_the_same_steps_in_turns() -> None:
    task = Task(load_bundle(MINI), 3, 7)
    contexts = task.step(0)[0].contexts
    assert contexts is not None
    assert contexts.shape == (10, 8, 64)
    assert not np.array_equal(contexts, np.asarray(task.step(1)[0].contexts))
    assert len(task.step(0)[1].images) == 128
    seen: dict[str, list[int]] = {"a": [], "b": []}
    order: list[str] = []

    def oracle(name: str) -> Any:
        def answer(prompts: Prompts, batch: Batch) -> Evaluation:
            order.append(name)
            seen[name].append(batch.number)
            nothing = np.zeros(len(prompts))
            return Evaluation(nothing, nothing, nothing.astype(np.int64), batch.number)

        return answer

    account = iter(ServerCounts(n, n * 2_000_000, n * 1_000_000) for n in range(100))
    oracles: dict[object, Any] = {name: oracle(name) for name in "ab"}
    taken, accounts = remote.alternate(task, oracles, 7, lambda: next(account))
    # Two rounds of each warm up, and are not timed.
    assert seen["a"] == seen["b"] == [1, 1, *range(1, 8)]
    assert "".join(order) == "aabb" + "baab" * 3 + "ba"
    assert [len(times) for times in taken.values()] == [7, 7]
    assert accounts["a"] == ServerCounts(7, 14_000_000, 7_000_000)
    assert accounts["a"].figures() == {"server_request_ms": 2.0, "server_model_ms": 1.0}


def test_differences_are_of_the_same_step() -> None:
    found = remote.difference("ms", [0.013, 0.102, 0.012], [0.011, 0.101, 0.009])
    assert found["ms"] == pytest.approx(2)
    assert found["ms_quartiles"] == pytest.approx([1.5, 2.5])
    assert [remote.burst_size(n) for n in (1, 7, 20, 1000)] == [1, 1, 4, 5]
    extent = remote.Extent((10,), queries=1000, threads=1)
    assert [extent.steps(C, 10) for C in (3, 10, 100, 1000)] == [100, 100, 10, 7]


def test_single_predictions_are_compared_with_the_same_work(tmp_path: Path) -> None:
    train, test = ztune.Dataset.from_folder(DIGITS).split(shots=4, seed=1)
    cpu, packed, saved = Execution("cpu", 1), tmp_path / "c.onnx", tmp_path / "artifact"
    with ztune.load(MINI, provider="cpu", threads=1) as model:
        fitted = ztune.FewShotClassifier(model, method="gda").fit(train)
        fitted.export_onnx(packed)
        fitted.save(saved)
        artifact = read_artifact(saved)
        tower = predict.bare_tower(model.bundle, artifact, cpu)
        classifier = predict.bare_classifier(model.bundle, packed, artifact, cpu)
        for path, _ in test.items[:10]:
            assert tower(path) == classifier(path) == fitted.predict([path])
    document = predict.measure(MINI, 100, 1)
    json.dumps(document, allow_nan=False)
    assert all(row["images_per_s"] > 0 for row in document["rows"].values())
    assert document["resident_mb"].keys() == {"after 50", "after 100"}


def test_a_bundle_is_compared_with_its_older_layout(tmp_path: Path) -> None:
    bundle = share_weights(load_bundle(MINI), tmp_path / "shared")
    document = bundle_size.measure([bundle.path], 1)
    json.dumps(document, allow_nan=False)
    old, new = document["rows"]
    assert (old["layout"], new["layout"]) == ("version 1", "shared")
    assert new["mb"] < 0.6 * old["mb"]
    assert 1 < new["over_weights"] < 1.1
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]
    for row in (old, new):
        assert all(row[f"{graph}_open_s"] > 0 for graph in bundle_size.GRAPHS)


def test_ways_to_ask() -> None:
    assert [str(way) for way in WAYS] == [
        "grpc, here",
        "grpc, server",
        "http, here",
        "http, server",
    ]


def test_remote_document(tmp_path: Path) -> None:
    triton_environment()  # skips without
    bundle = load_bundle(MINI)
    repository = remote_ways.export_repository(bundle, tmp_path / "repository", 1)
    task = Task(bundle, 5, 2)
    with remote_ways.start_server(repository) as server:
        for way in (Way("grpc", "here"), Way("http", "server")):
            place = remote_ways.address(way.transport, server)
            with remote_ways.open_connection(bundle, way.transport, place) as connected:
                served = way.served(connected)
                expected = task.local_oracle(1)(*task.step(1)).losses
                for oracle in (
                    task.server_oracle(served),
                    task.in_process_oracle(served, repository, 1),
                ):
                    assert oracle(*task.step(1)).losses == pytest.approx(expected, abs=1e-4)
    extent = remote.Extent(
        (3,),
        queries=30,
        threads=1,
        least_steps=2,
        bookkeeping_steps=3,
        n_images=8,
    )
    document = remote.measure(bundle, extent)
    json.dumps(document, allow_nan=False)
    assert document["server"]["name"] == "triton"
    rows = document["rows"]
    assert len(rows) == 5
    assert rows[0]["transport"] == "local"
    assert [row["transport"] for row in rows if row.get("auto")] == list(remote_ways.TRANSPORTS)
    for row in rows[1:]:
        assert row["seconds_per_step"] > 0
        assert row["requests_per_step"] == 1
        assert 0 < row["server_model_ms"] < row["server_request_ms"]
        # Of a candidate: 8 context tokens of 64 values go, 128 features of 3 classes come back.
        assert row["payload_sent_bytes_per_query"] >= 4 * 8 * 64
        assert (row["payload_received_bytes_per_query"] >= 4 * 3 * 128) == (row["losses"] == "here")
        for direction in ("sent", "received"):
            wire, payload = (
                row[f"{kind}_{direction}_bytes_per_query"] for kind in ("wire", "payload")
            )
            assert payload < wire < payload + 200
        # Features and labels of 128 images, for 10 candidates.
        images = 128 * (4 * 128 + 8) / 10
        assert (row["payload_sent_bytes_per_query"] > images) == (row["losses"] == "server")
    kept = document["bookkeeping"]
    for name in ("journal_ms", "history_ms", "state_ms", "remote_kept_step_ms"):
        assert kept[name] > 0
    assert len(document["images"]) == 3


def test_the_cost_of_an_additional_cell(monkeypatch: pytest.MonkeyPatch) -> None:
    """2 workers need 10 s for 2 cells and 30 s for 42: 1 s per cell, of which 0.6 s is the run."""
    workload = harness.Workload(MINI, "digits", None, shots=1, queries=1)
    found = {2: {"seconds": 10.0, "own": 0.9}, 42: {"seconds": 30.0, "own": 0.6}}
    monkeypatch.setattr(harness, "run_bench", lambda _workload, _way, _method, n: found[n])
    row = harness.measure_cell(workload, "joblib", "gda", 2, 42, repeats=1)
    assert row["worker_seconds_per_cell"] == 1.0
    assert row["overhead_seconds_per_cell"] == 0.4


def test_the_harness_runs_real_plans(few_digits: Path) -> None:
    workload = harness.Workload(MINI, str(few_digits), None, shots=1, queries=1)
    row = harness.measure_cell(workload, "serial", "lp++", 1, 2, repeats=1)
    assert row["cells"] == [1, 2]
    assert 0 < row["own_seconds_per_cell"] < row["seconds_many"]


def test_a_whole_run_is_compared_with_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("_CLASSES", 3), ("_IMAGES", 4), ("_MORE", 5)):
        monkeypatch.setattr(endtoend, name, value)
    found = endtoend.measure(MINI, 1)
    rows = found["rows"]
    assert list(rows) == ["loop", "nothing cached", "everything cached", "20 images more"]
    assert rows["loop"]["ratio"] == 1
    assert all(row["seconds"] > 0 for row in rows.values())
    assert found["images"] == 12
