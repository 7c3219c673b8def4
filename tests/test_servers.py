"""The servers that other tests talk to, and the faults they talk through, do what they say."""

import contextlib
import http.client
import ssl
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt
import onnx
import psutil
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper
from tritonclient.utils import InferenceServerException

from tests.servers.fake import FailedError, FakeModel, FakeServer, Tensor, put
from tests.servers.mlserver import MlServer
from tests.servers.process import find_environment, free_ports
from tests.servers.proxy import FaultProxy, middle
from tests.servers.tls import Certificates, TlsProxy, make_certificates
from tests.servers.triton import SHARED_MEMORY, TritonServer

X: npt.NDArray[np.float32] = np.array([0.1, np.pi, -3.0], np.float32)
CONFIG = """
backend: "python"
input [{name: "x", data_type: TYPE_FP32, dims: [-1]}]
output [{name: "y", data_type: TYPE_FP32, dims: [-1]}]
instance_group [{kind: KIND_CPU, count: 1}]
"""
MODEL = """
import triton_python_backend_utils as backend

class TritonPythonModel:
    def execute(self, requests):
        xs = [backend.get_input_tensor_by_name(request, "x").as_numpy() for request in requests]
        return [backend.InferenceResponse([backend.Tensor("y", 2 * x)]) for x in xs]
"""
DOUBLE = FakeModel(
    inputs=[Tensor("x", "FP32", [-1])],
    outputs=[Tensor("y", "FP32", [-1])],
    function=lambda given: {"y": 2 * given["x"]},
)
# The four datatypes, in a graph that has several inputs and outputs.
MANY: dict[str, tuple[npt.NDArray[Any], str]] = {
    "a": (np.array([[0.1, np.pi], [-0.0, 5.0]], np.float32), "FP32"),
    "d": (np.array([0.1, 1e-300]), "FP64"),
    "n": (np.array([2**40 + 1, -3]), "INT64"),
    "u": (np.array([0, 255], np.uint8), "UINT8"),
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("repository")
    (folder / "double" / "1").mkdir(parents=True)
    (folder / "double" / "config.pbtxt").write_text(CONFIG)
    (folder / "double" / "1" / "model.py").write_text(MODEL)
    return folder


@pytest.fixture(scope="module")
def triton(repository: Path) -> Iterator[TritonServer]:
    with TritonServer(repository) as server:
        yield server


@pytest.fixture(scope="module")
def mlserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlServer]:
    folder = tmp_path_factory.mktemp("models") / "many"
    folder.mkdir()
    kinds = {"a": TensorProto.FLOAT, "d": TensorProto.DOUBLE}
    kinds |= {"n": TensorProto.INT64, "u": TensorProto.UINT8}
    shapes = {name: ["k", 2] if name == "a" else ["k"] for name in kinds}
    graph = helper.make_graph(
        [helper.make_node("Identity", [name], [name.upper()]) for name in kinds],
        "many",
        [helper.make_tensor_value_info(n, kind, shapes[n]) for n, kind in kinds.items()],
        [helper.make_tensor_value_info(n.upper(), k, shapes[n]) for n, k in kinds.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, folder / "model.onnx")
    with MlServer(folder.parent) as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def client(module: Any, address: str, **options: Any) -> Iterator[Any]:
    if module is tritonclient.grpc and "ssl" not in options:
        # By default all channels of a process to one address share a connection and its fate.
        # Given any such argument, tritonclient leaves out its own: no limit on sizes.
        sizes = "grpc.max_send_message_length", "grpc.max_receive_message_length"
        local = ("grpc.use_local_subchannel_pool", 1)
        options["channel_args"] = [local, *((size, -1) for size in sizes)]
    made = module.InferenceServerClient(address, **options)
    try:
        yield made
    finally:
        made.close()


def infer(module: Any, asked: Any, **options: Any) -> npt.NDArray[Any]:
    tensor = module.InferInput("x", [len(X)], "FP32")
    tensor.set_data_from_numpy(X)
    return np.asarray(asked.infer("double", [tensor], **options).as_numpy("y"))


def ask(module: Any, address: str) -> npt.NDArray[Any]:
    with client(module, address) as asked:
        return infer(module, asked)


def test_a_missing_environment_skips_or_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("ZTUNE_SOME_ENV", str(tmp_path))
    monkeypatch.delenv("ZTUNE_REQUIRE_SERVERS", raising=False)
    with pytest.raises(pytest.skip.Exception, match="make triton-env"):
        find_environment(".venv-triton", "ZTUNE_SOME_ENV", "triton-env")
    monkeypatch.setenv("ZTUNE_REQUIRE_SERVERS", "1")
    with pytest.raises(pytest.fail.Exception, match="make triton-env"):
        find_environment(".venv-triton", "ZTUNE_SOME_ENV", "triton-env")


def test_triton_answers_is_killed_and_comes_back(triton: TritonServer) -> None:
    for module, address in (
        (tritonclient.grpc, triton.grpc),
        (tritonclient.http, triton.http),
    ):
        assert np.array_equal(ask(module, address), 2 * X)
    addresses = triton.grpc, triton.http
    assert triton.pid is not None
    helpers = psutil.Process(triton.pid).children(recursive=True)
    assert helpers
    assert list(SHARED_MEMORY.glob(f"{triton.region}*"))
    triton.kill()
    assert not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in helpers)
    assert not list(SHARED_MEMORY.glob(f"{triton.region}*"))
    assert triton.pid is None
    with pytest.raises(InferenceServerException):
        ask(tritonclient.grpc, triton.grpc)
    triton.restart()
    assert (triton.grpc, triton.http) == addresses
    assert np.array_equal(ask(tritonclient.grpc, triton.grpc), 2 * X)
    assert np.array_equal(ask(tritonclient.http, triton.http), 2 * X)
    assert triton.log.count("Started GRPCInferenceService") == 2


def test_a_server_that_cannot_start_says_why(triton: TritonServer, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="failed to stat"):
        TritonServer(tmp_path / "nothing")


def test_mlserver_answers_with_the_bytes_it_was_given(mlserver: MlServer) -> None:
    for module, address, options in (
        (tritonclient.grpc, mlserver.grpc, {}),
        # MLServer has no binary tensors over HTTP: the data go as JSON, and come back exact.
        (tritonclient.http, mlserver.http, {"binary_data": False}),
    ):
        tensors = []
        for name, (value, datatype) in MANY.items():
            tensors.append(module.InferInput(name, list(value.shape), datatype))
            tensors[-1].set_data_from_numpy(value, **options)
        with client(module, address) as asked:
            answer = asked.infer("many", tensors)
            for name, (value, _) in MANY.items():
                got = answer.as_numpy(name.upper())
                assert got.dtype == value.dtype
                assert got.shape == value.shape
                assert got.tobytes() == value.tobytes()
            one = asked.infer("many", tensors, outputs=[module.InferRequestedOutput("N")])
            assert one.as_numpy("A") is None
            assert np.array_equal(one.as_numpy("N"), MANY["n"][0])
    with client(tritonclient.http, mlserver.http) as asked:
        metadata = asked.get_model_metadata("many")
    assert [(t["name"], t["datatype"], t["shape"]) for t in metadata["outputs"]] == [
        ("A", "FP32", [-1, 2]), ("D", "FP64", [-1]), ("N", "INT64", [-1]), ("U", "UINT8", [-1]),
    ]  # fmt: skip


def test_mlserver_is_killed_and_comes_back(mlserver: MlServer) -> None:
    mlserver.kill()
    with client(tritonclient.grpc, mlserver.grpc) as asked, pytest.raises(InferenceServerException):
        asked.is_server_live()
    mlserver.restart()
    with client(tritonclient.grpc, mlserver.grpc) as asked:
        assert asked.is_model_ready("many")


def drawn(seed: int, count: int) -> list[str]:
    with FaultProxy("127.0.0.1:9", seed, 0.2, 0.1, 0.2) as proxy:
        return [proxy.draw() for _ in range(count)]


def test_faults_follow_from_the_seed() -> None:
    faults = drawn(3, 400)
    assert faults == drawn(3, 400)
    assert faults != drawn(4, 400)
    resets = [fault for fault in faults if fault.startswith("reset")]
    assert resets == (["reset_before", "reset_after"] * len(resets))[: len(resets)]
    assert 50 < len(resets) < 110
    assert {"pass", "delay", "truncate"} <= set(faults)


def test_faults_in_grpc_count_and_come_where_they_say() -> None:
    with (
        FakeServer({"double": DOUBLE}) as fake,
        FaultProxy(fake.grpc, 1, 0.3, 0.2, 0.2, delay_s=0.1) as proxy,
    ):
        outcome, seconds = [], []
        for _ in range(40):
            # A connection of its own for each: one that failed waits before it tries again.
            started = time.monotonic()
            try:
                assert np.array_equal(ask(tritonclient.grpc, proxy.address), 2 * X)
                outcome.append("answered")
            except InferenceServerException as error:
                outcome.append(str(error.status()))
            seconds.append(time.monotonic() - started)
        counts = proxy.counts
        faults = drawn_like(proxy, 1)
        assert counts["requests"] == 40
        assert sum(counts.get(kind, 0) for kind in set(faults)) == 40
        for kind in ("pass", "delay", "reset_before", "reset_after", "truncate"):
            assert counts[kind] == faults.count(kind) > 0
        answered = {"pass": "answered", "delay": "answered"}
        assert outcome == [answered.get(fault, "StatusCode.UNAVAILABLE") for fault in faults]
        assert all(s >= 0.1 for s, fault in zip(seconds, faults, strict=True) if fault == "delay")
        # Before: the server never saw it. After: it did the work, and no answer arrived.
        assert fake.calls["ModelInfer"] == 40 - counts["reset_before"]
        assert proxy.sent > 40 * X.nbytes
        assert proxy.received > (counts["pass"] + counts["delay"]) * X.nbytes


def drawn_like(proxy: FaultProxy, seed: int) -> list[str]:
    rates = proxy.resets, proxy.delays, proxy.truncations
    with FaultProxy("127.0.0.1:9", seed, *rates) as twin:
        return [twin.draw() for _ in range(proxy.counts["requests"])]


def test_many_grpc_requests_on_one_connection_count_each() -> None:
    with FakeServer({"double": DOUBLE}) as fake, FaultProxy(fake.grpc, 0, 0, 0) as proxy:
        with client(tritonclient.grpc, proxy.address) as asked:
            for _ in range(20):
                assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
        assert proxy.counts == {"connections": 1, "requests": 20, "pass": 20}


def test_large_bodies_pass_whole() -> None:
    big = np.random.default_rng(0).random(3_000_000, np.float32)
    with FakeServer({"double": DOUBLE}) as fake, FaultProxy(fake.grpc, 0, 0, 0) as proxy:
        with client(tritonclient.grpc, proxy.address) as asked:
            tensor = tritonclient.grpc.InferInput("x", [len(big)], "FP32")
            tensor.set_data_from_numpy(big)
            answer = asked.infer("double", [tensor]).as_numpy("y")
        assert np.array_equal(answer, 2 * big)
        assert big.nbytes < proxy.sent < big.nbytes * 1.01
        assert big.nbytes < proxy.received < big.nbytes * 1.01


def test_faults_in_http_count_and_come_where_they_say(triton: TritonServer) -> None:
    with FaultProxy(triton.http, 1, 0.3, 0.2, 0.2, delay_s=0.1) as proxy:
        body = b'{"inputs": [{"name": "x", "datatype": "FP32", "shape": [1], "data": [1.5]}]}'
        outcome, seconds = [], []
        # Python's own client, since it never asks twice by itself.
        connection = http.client.HTTPConnection(proxy.address, timeout=5)
        for _ in range(40):
            started = time.monotonic()
            try:
                connection.request("POST", "/v2/models/double/infer", body)
                assert b'"data":[3.0]' in connection.getresponse().read()
                outcome.append("answered")
            except http.client.IncompleteRead:
                outcome.append("truncate")
                connection.close()
            except OSError:
                outcome.append("reset")
                connection.close()
            seconds.append(time.monotonic() - started)
        connection.close()
        faults = drawn_like(proxy, 1)
        answered = {"pass": "answered", "delay": "answered"}
        assert outcome == [answered.get(fault, fault.partition("_")[0]) for fault in faults]
        assert all(s >= 0.1 for s, fault in zip(seconds, faults, strict=True) if fault == "delay")
        assert len(faults) == 40
        counts = proxy.counts
        # A connection lives until a fault ends it.
        broken = sum(counts[kind] for kind in ("reset_before", "reset_after", "truncate"))
        assert counts["connections"] in (broken, broken + 1)


def test_tritonclient_over_http_goes_through_the_proxy(triton: TritonServer) -> None:
    with FaultProxy(triton.http, 0, 0, 0) as proxy:
        with client(tritonclient.http, proxy.address) as asked:
            for _ in range(5):
                assert np.array_equal(infer(tritonclient.http, asked), 2 * X)
        assert proxy.counts == {"connections": 1, "requests": 5, "pass": 5}


def test_where_an_answer_is_cut() -> None:
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n"
    assert middle(head) == len(head) + 50
    assert middle(head[:10]) == 5
    assert 0 < middle(b"HTTP/1.1 204 No Content\r\nContent-Length: 0\r\n\r\n") < 30


def test_a_proxy_refuses_pauses_and_outlives_its_target() -> None:
    with FakeServer({"double": DOUBLE}) as fake, FaultProxy(fake.grpc, 0, 0, 0) as proxy:
        assert np.array_equal(ask(tritonclient.grpc, proxy.address), 2 * X)
        proxy.refuse()
        with pytest.raises(InferenceServerException, match="refused"):
            ask(tritonclient.grpc, proxy.address)
        proxy.refuse(False)
        assert np.array_equal(ask(tritonclient.grpc, proxy.address), 2 * X)
        proxy.pause()
        with (
            client(tritonclient.grpc, proxy.address) as asked,
            pytest.raises(InferenceServerException, match="Deadline"),
        ):
            infer(tritonclient.grpc, asked, client_timeout=0.3)
        proxy.resume()
        assert np.array_equal(ask(tritonclient.grpc, proxy.address), 2 * X)
        with client(tritonclient.grpc, proxy.address) as asked:
            infer(tritonclient.grpc, asked)
            proxy.drop()
            with pytest.raises(InferenceServerException):
                for _ in range(3):  # the client may not know yet, and then connects again
                    proxy.refuse()
                    infer(tritonclient.grpc, asked)
    (nobody,) = free_ports(1)
    with FaultProxy(f"127.0.0.1:{nobody}", 0, 0, 0) as proxy:
        with pytest.raises(InferenceServerException):
            ask(tritonclient.grpc, proxy.address)
        assert proxy.counts["unreachable"] >= 1


def tls(certificates: Certificates, **more: Path) -> dict[str, Any]:
    return {
        "ssl": True,
        "root_certificates": str(certificates.authority),
        **{key: str(path) for key, path in more.items()},
    }


def test_tls_is_accepted_from_the_right_certificate_only(certificates: Certificates) -> None:
    with FakeServer({"double": DOUBLE}) as fake:
        for pair, good in (
            (certificates.valid, True),
            (certificates.expired, False),
            (certificates.wrong_host, False),
        ):
            with (
                TlsProxy(fake.grpc, pair.cert, pair.key) as proxy,
                client(tritonclient.grpc, proxy.address, **tls(certificates)) as asked,
            ):
                if good:
                    assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
                    assert proxy.counts["handshakes"] == 1
                else:
                    with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
                        infer(tritonclient.grpc, asked, client_timeout=5)
        assert fake.calls["ModelInfer"] == 1


def test_mutual_tls_asks_who_the_client_is(certificates: Certificates) -> None:
    shown = certificates.client, certificates.stranger, None
    with (
        FakeServer({"double": DOUBLE}) as fake,
        TlsProxy(
            fake.grpc, certificates.valid.cert, certificates.valid.key, certificates.authority
        ) as proxy,
    ):
        for pair in shown:
            own = {"certificate_chain": pair.cert, "private_key": pair.key} if pair else {}
            with client(tritonclient.grpc, proxy.address, **tls(certificates, **own)) as asked:
                if pair is certificates.client:
                    assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
                else:
                    with pytest.raises(InferenceServerException, match="UNAVAILABLE"):
                        infer(tritonclient.grpc, asked, client_timeout=5)
        assert fake.calls["ModelInfer"] == 1


def test_tls_before_http_and_before_faults(
    triton: TritonServer, certificates: Certificates
) -> None:
    trusting = ssl.create_default_context(cafile=str(certificates.authority))
    valid, expired = certificates.valid, certificates.expired
    with (
        FaultProxy(triton.http, 0, 0, 0) as faults,
        TlsProxy(faults.address, valid.cert, valid.key) as proxy,
        TlsProxy(faults.address, expired.cert, expired.key) as old,
    ):
        connection = http.client.HTTPSConnection(proxy.address, timeout=5, context=trusting)
        for _ in range(2):
            connection.request("GET", "/v2/health/ready")
            answer = connection.getresponse()
            answer.read()
            assert answer.status == 200
        connection.close()
        assert faults.counts["requests"] == 2
        connection = http.client.HTTPSConnection(old.address, timeout=5, context=trusting)
        with pytest.raises(ssl.SSLCertVerificationError, match="expired"):
            connection.request("GET", "/v2/health/ready")
        connection.close()


def test_triton_takes_arguments_such_as_its_own_tls(
    repository: Path, certificates: Certificates
) -> None:
    pair = certificates.valid
    args = ["--grpc-use-ssl=1", f"--grpc-server-cert={pair.cert}", f"--grpc-server-key={pair.key}"]
    with (
        TritonServer(repository, args=args) as server,
        client(tritonclient.grpc, server.grpc, **tls(certificates)) as asked,
    ):
        assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
        server.stop()
        assert server.pid is None
        assert "All models are stopped" in server.log


def test_the_fake_server_answers_as_a_server_does() -> None:
    with (
        FakeServer({"double": DOUBLE}, extensions=["a", "b"]) as fake,
        client(tritonclient.grpc, fake.grpc) as asked,
    ):
        assert asked.is_server_live()
        assert asked.is_server_ready()
        assert asked.is_model_ready("double")
        assert not asked.is_model_ready("other")
        assert list(asked.get_server_metadata().extensions) == ["a", "b"]
        metadata = asked.get_model_metadata("double")
        (tensor,) = metadata.inputs
        assert (tensor.name, tensor.datatype, list(tensor.shape)) == ("x", "FP32", [-1])
        assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
        with pytest.raises(InferenceServerException, match="no model"):
            asked.get_model_metadata("other")
        with pytest.raises(InferenceServerException, match="no output"):
            infer(tritonclient.grpc, asked, outputs=[tritonclient.grpc.InferRequestedOutput("z")])


def test_the_fake_server_asks_for_its_token() -> None:
    with (
        FakeServer({"double": DOUBLE}, token="right") as fake,
        client(tritonclient.grpc, fake.grpc) as asked,
    ):
        bearing = {"authorization": "Bearer right"}
        assert np.array_equal(infer(tritonclient.grpc, asked, headers=bearing), 2 * X)
        for headers in (None, {"authorization": "Bearer wrong"}, {"authorization": "right"}):
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                infer(tritonclient.grpc, asked, headers=headers)
            with pytest.raises(InferenceServerException, match="UNAUTHENTICATED"):
                asked.get_server_metadata(headers=headers)


def test_a_hook_spoils_or_fails_an_answer() -> None:
    wrong = np.full((2, 2), np.nan)

    def spoil(request: Any, honest: Any) -> Any:
        put(honest, "y", wrong)
        return honest

    def lose(request: Any, honest: Any) -> Any:
        raise FailedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "too much")

    with (
        FakeServer({"double": DOUBLE}, hook=spoil) as fake,
        client(tritonclient.grpc, fake.grpc) as asked,
    ):
        assert np.array_equal(infer(tritonclient.grpc, asked), wrong, equal_nan=True)
        fake.hook = lose
        with pytest.raises(InferenceServerException, match="too much"):
            infer(tritonclient.grpc, asked)
        fake.hook = None
        assert np.array_equal(infer(tritonclient.grpc, asked), 2 * X)
