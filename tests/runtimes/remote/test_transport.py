"""One request and its answer over gRPC and HTTP, and every way in which there is none."""

import contextlib
import gzip
import json
import re
import socket
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from runtimes.remote import http_transport, transport
from runtimes.remote.endpoint import Connection, parse_location
from runtimes.remote.grpc_transport import GrpcTransport
from runtimes.remote.http_transport import HttpTransport
from runtimes.remote.service import open_transport
from runtimes.remote.transport import CallError, Request, Transport, to_server_error
from tests.servers.fake import FailedError, FakeModel, FakeServer, Tensor
from tests.servers.process import free_ports
from tests.servers.tls import Certificates, Pair, TlsProxy, make_certificates
from tests.servers.web import Asked, Reply, WebServer, chunked, says, slowly
from ztune.errors import ConfigError

grpc = pytest.importorskip("grpc")

X: np.ndarray[Any, Any] = np.array([0.1, np.pi, -3.0], np.float32)
DOUBLE = FakeModel(
    [Tensor("x", "FP32", [-1])],
    [Tensor("y", "FP32", [-1])],
    lambda given: {"y": 2 * given["x"]},
)
ASK = Request("double", {"x": X}, ["y"])
SECONDS = 5.0


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ZTUNE_TOKEN", raising=False)
    monkeypatch.delenv("ZTUNE_BASIC_AUTH", raising=False)


@pytest.fixture
def fake() -> Iterator[FakeServer]:
    with FakeServer({"double": DOUBLE}, extensions=["a", "binary_tensor_data"]) as server:
        yield server


@pytest.fixture
def web() -> Iterator[WebServer]:
    with WebServer(serve) as server:
        yield server


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@contextlib.contextmanager
def opened(url: str, **settings: Any) -> Iterator[Transport]:
    endpoint = parse_location(f"{url}/m").endpoint
    made = open_transport(endpoint, Connection(**settings, named=endpoint))
    try:
        yield made
    finally:
        made.close()


def failure(call: Callable[[], object]) -> CallError:
    """Return the error of a call, which is one line of bounded length."""
    with pytest.raises(CallError) as caught:
        call()
    text = str(caught.value)
    assert "\n" not in text
    assert text.isprintable()
    assert len(text) < 400
    return caught.value


def serve(asked: Asked) -> Reply:
    """Answer as an honest server of the model `double`."""
    if asked.path == "/v2":
        return says({"name": "web", "extensions": ["binary_tensor_data"]})
    if "/health/" in asked.path or (asked.method == "POST" and "/infer" not in asked.path):
        return Reply()
    if asked.method == "GET":
        return says({"name": "double", "inputs": [], "outputs": []})
    body = asked.body
    if asked.headers.get("content-encoding"):
        body = zlib.decompress(body, wbits=47)
    head = asked.headers.get("inference-header-content-length")
    if head is None:
        (tensor,) = json.loads(body)["inputs"]
        data = [2 * value for value in tensor["data"]]
        return says({"outputs": [{**tensor, "name": "y", "data": data}]})
    return binary(2 * np.frombuffer(body[int(head) :], np.float32))


def binary(y: np.ndarray[Any, Any], **changes: Any) -> Reply:
    """Return the reply of a tensor `y` as bytes; `changes` are what its header says otherwise."""
    described: dict[str, Any] = {"name": "y", "datatype": "FP32", "shape": list(y.shape)}
    described["parameters"] = {"binary_data_size": y.nbytes}
    head = json.dumps({"outputs": [{**described, **changes}]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head))}
    return Reply(200, head + y.tobytes(), headers)


def always(reply: Reply) -> Callable[[Asked], Reply]:
    return lambda asked: reply


# -- gRPC ------------------------------------------------------------------------------------------

KINDS = {
    "CANCELLED": "away",
    "UNKNOWN": "broken",
    "INVALID_ARGUMENT": "refused",
    "DEADLINE_EXCEEDED": "away",
    "NOT_FOUND": "missing",
    "ALREADY_EXISTS": "refused",
    "PERMISSION_DENIED": "denied",
    "UNAUTHENTICATED": "denied",
    "RESOURCE_EXHAUSTED": "busy",
    "FAILED_PRECONDITION": "refused",
    "ABORTED": "away",
    "UNIMPLEMENTED": "refused",
    "OUT_OF_RANGE": "refused",
    "INTERNAL": "broken",
    "UNAVAILABLE": "away",
    "DATA_LOSS": "refused",
}


def test_what_each_grpc_status_means(fake: FakeServer) -> None:
    assert set(KINDS) == {code.name for code in grpc.StatusCode} - {"OK"}
    with opened(f"triton://{fake.grpc}") as asked:
        for name, kind in KINDS.items():
            said = FailedError(grpc.StatusCode[name], "some\n\x1b[31m words")

            def fail(request: Any, honest: Any, said: FailedError = said) -> None:
                raise said

            fake.hook = fail
            error = failure(lambda: asked.infer(ASK, SECONDS))
            assert error.kind == kind, name
            assert error.retryable == (kind in ("away", "busy", "broken"))
            assert fake.grpc in str(error)
            if name not in ("DEADLINE_EXCEEDED", "UNIMPLEMENTED"):
                assert "some [31m words" in str(error)
        fake.hook = None
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        assert fake.calls["ModelInfer"] == len(KINDS) + 1  # nothing is sent twice


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("wrong shape", "refused"),
        ("Request for unknown model: 'm' is not found", "missing"),
    ],
)
def test_words_say_what_a_status_does_not(fake: FakeServer, words: str, kind: str) -> None:
    def fail(request: Any, honest: Any) -> None:
        raise FailedError(grpc.StatusCode.INVALID_ARGUMENT, words)

    fake.hook = fail
    with opened(f"triton://{fake.grpc}") as asked:
        assert failure(lambda: asked.infer(ASK, SECONDS)).kind == kind
    with (
        WebServer(always(says({"error": words}, 400))) as web,
        opened(f"http://{web.address}") as a,
    ):
        assert failure(lambda: a.infer(ASK, SECONDS)).kind == kind


def test_what_a_grpc_server_tells_of_itself(fake: FakeServer) -> None:
    with opened(f"triton://{fake.grpc}") as asked:
        assert isinstance(asked, GrpcTransport)
        assert asked.ready(SECONDS)
        assert asked.server(SECONDS)["extensions"] == ["a", "binary_tensor_data"]
        told = asked.model("double", "", SECONDS)
        assert told["inputs"] == [{"name": "x", "datatype": "FP32", "shape": ["-1"]}]
        assert failure(lambda: asked.model("other", "", SECONDS)).kind == "missing"


def test_a_deadline_ends_a_grpc_call(fake: FakeServer) -> None:
    release = threading.Event()

    def wait(request: Any, honest: Any) -> Any:
        release.wait(10)
        return honest

    fake.hook = wait
    with opened(f"triton://{fake.grpc}") as asked:
        began = time.monotonic()
        error = failure(lambda: asked.infer(ASK, 0.2))
        assert 0.2 <= time.monotonic() - began < 5
    release.set()
    assert (error.kind, "no answer within the deadline" in str(error)) == ("away", True)


def test_a_grpc_answer_must_hold_what_was_asked_for(fake: FakeServer) -> None:
    def lacking(request: Any, honest: Any) -> Any:
        del honest.outputs[:], honest.raw_output_contents[:]
        return honest

    def short(request: Any, honest: Any) -> Any:
        honest.raw_output_contents[0] = honest.raw_output_contents[0][:-4]
        return honest

    def odd(request: Any, honest: Any) -> Any:
        honest.raw_output_contents[0] = honest.raw_output_contents[0][:-1]
        return honest

    def empty(request: Any, honest: Any) -> Any:
        del honest.raw_output_contents[:]
        return honest

    def foreign(request: Any, honest: Any) -> Any:
        honest.outputs[0].datatype = "X"
        return honest

    with opened(f"triton://{fake.grpc}") as asked:
        fake.hook = lacking
        error = failure(lambda: asked.infer(ASK, SECONDS))
        assert (error.kind, 'no output "y"' in str(error)) == ("refused", True)
        for hook in (short, odd, empty, foreign):
            fake.hook = hook
            error = failure(lambda: asked.infer(ASK, SECONDS))
            assert (error.kind, "unreadable answer" in str(error)) == ("broken", True), hook


def test_a_grpc_answer_that_is_too_large(fake: FakeServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 1000)
    big = replace(ASK, inputs={"x": np.zeros(300, np.float32)})
    with opened(f"triton://{fake.grpc}") as asked:
        error = failure(lambda: asked.infer(big, SECONDS))
        assert (error.kind, "larger than max" in str(error)) == ("refused", True)
        assert len(asked.infer(ASK, SECONDS)["y"]) == 3


def test_a_grpc_token_is_sent_and_asked_for(
    fake: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.token = "hunter2"
    with opened(f"triton://{fake.grpc}") as asked:
        for call in (lambda: asked.ready(SECONDS), lambda: asked.infer(ASK, SECONDS)):
            error = failure(call)
            assert error.kind == "denied"
            assert "ZTUNE_TOKEN or `token_file`" in str(to_server_error(error))
    monkeypatch.setenv("ZTUNE_TOKEN", "wrong")
    with opened(f"triton://{fake.grpc}") as asked:
        error = failure(lambda: asked.infer(ASK, SECONDS))
        assert (error.kind, "wrong" in str(error)) == ("denied", False)
    monkeypatch.setenv("ZTUNE_TOKEN", "hunter2")
    with opened(f"triton://{fake.grpc}") as asked:
        assert asked.ready(SECONDS)
        assert asked.server(SECONDS)["name"] == "fake"
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


@pytest.mark.parametrize("compression", ["none", "gzip", "deflate"])
def test_grpc_compresses(fake: FakeServer, compression: str) -> None:
    with opened(f"triton://{fake.grpc}", compression=compression) as asked:
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


def test_closing_ends_a_grpc_call(fake: FakeServer) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait(request: Any, honest: Any) -> Any:
        entered.set()
        release.wait(10)
        return honest

    fake.hook = wait
    kind, seconds = ended_by_closing(f"triton://{fake.grpc}", entered)
    release.set()
    assert kind == "away"
    assert seconds < 2


def ended_by_closing(url: str, entered: threading.Event) -> tuple[str, float]:
    """Return how a request ends that is under way when its transport is closed, and how soon."""
    kinds: list[str] = []
    with opened(url) as asked:

        def ask() -> None:
            kinds.append(failure(lambda: asked.infer(ASK, 10)).kind)

        thread = threading.Thread(target=ask)
        thread.start()
        assert entered.wait(30)
        began = time.monotonic()
        asked.close()
        thread.join(8)
        seconds = time.monotonic() - began
        assert failure(lambda: asked.infer(ASK, 10)).kind == "away"
    return kinds[0], seconds


@pytest.mark.parametrize("scheme", ["triton", "http"])
def test_nobody_there(scheme: str) -> None:
    (port,) = free_ports(1)
    with opened(f"{scheme}://127.0.0.1:{port}") as asked:
        error = failure(lambda: asked.ready(SECONDS))
        assert error.kind == "away"
        assert str(error) in (
            f"{scheme}://127.0.0.1:{port}: Connection refused",
            f"{scheme}://127.0.0.1:{port}: Failed to connect to remote host: Connection refused",
        )
        assert "check the address" in str(to_server_error(error))


# -- HTTP ------------------------------------------------------------------------------------------


def test_http_asks_with_bytes_and_without(web: WebServer) -> None:
    with opened(f"http://{web.address}") as asked:
        assert isinstance(asked, HttpTransport)
        assert asked.ready(SECONDS)
        assert asked.server(SECONDS)["name"] == "web"
        assert asked.binary
        assert asked.model("double", "3", SECONDS)["name"] == "double"
        assert [one.path for one in web.asked[-2:]] == [
            "/v2/models/double/versions/3",
            "/v2/models/double/versions/3/ready",
        ]
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        assert X.tobytes() in web.asked[-1].body
        web.answer = lambda one: says({}) if one.path == "/v2" else serve(one)
        asked.server(SECONDS)
        assert not asked.binary
        got = asked.infer(ASK, SECONDS)["y"]
        assert web.asked[-1].headers["content-type"] == "application/json"
        assert (got.dtype, got.tobytes()) == (np.float32, (2 * X).tobytes())
        assert asked.infer(replace(ASK, version="7"), SECONDS)
        assert web.asked[-1].path == "/v2/models/double/versions/7/infer"


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (400, b'{"error": "wrong shape"}', "refused", "wrong shape (HTTP 400)"),
        (401, b"", "denied", "Unauthorized (HTTP 401)"),
        (403, b'{"detail": "no entry"}', "denied", "no entry (HTTP 403)"),
        (404, b'{"detail": "Model m not found"}', "missing", "Model m not found (HTTP 404)"),
        (408, b"", "away", "Request Timeout (HTTP 408)"),
        (413, b"<html>", "refused", "Content Too Large (HTTP 413)"),
        (429, b"slow down", "busy", "Too Many Requests (HTTP 429)"),
        (500, b'{"error": "a\\n\\u001b[2Jb"}', "broken", "a [2Jb (HTTP 500)"),
        (500, b'["error"]', "broken", "Internal Server Error (HTTP 500)"),
        (500, b'{"error": ', "broken", "Internal Server Error (HTTP 500)"),
        (502, b"", "away", "Bad Gateway (HTTP 502)"),
        (503, b'{"error": "loading"}', "away", "loading (HTTP 503)"),
        (504, b"", "away", "Gateway Timeout (HTTP 504)"),
        (302, b"", "refused", "Found (HTTP 302)"),
        (204, b"", "refused", "No Content (HTTP 204)"),
    ],
)
def test_what_each_http_status_means(
    web: WebServer, status: int, body: bytes, kind: str, words: str
) -> None:
    with opened(f"http://{web.address}") as asked:
        web.answer = always(Reply(status, body))
        error = failure(lambda: asked.infer(ASK, SECONDS))
        alternatives = {words, words.replace("Content Too", "Request Entity Too")}
        assert (error.kind, str(error).split(": ", 1)[1]) in {(kind, one) for one in alternatives}
        # It was read to its end, and the connection goes on.
        web.answer = serve
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        assert web.n_connections == 1
        assert len(web.asked) == 2


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(
    web: WebServer, status: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", "hunter2")
    with WebServer(serve) as other, opened(f"http://{web.address}") as asked:
        for there in (other.address, web.address):
            location = {"Location": f"http://{there}/v2/models/other/infer"}
            web.answer = always(Reply(status, b"", location))
            error = failure(lambda: asked.infer(ASK, SECONDS))
            assert (error.kind, f"(HTTP {status})" in str(error)) == ("refused", True)
        assert other.asked == []
        assert [one.path for one in web.asked] == ["/v2/models/double/infer"] * 2


def test_a_server_that_is_not_ready_and_one_that_wants_a_token(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(f"http://{web.address}") as asked:
        for live, ready in ((503, 503), (200, 400), (200, 503)):
            statuses = {"/v2/health/live": live, "/v2/health/ready": ready}
            web.answer = lambda one, told=statuses: Reply(told[one.path])  # type: ignore[misc]
            assert not asked.ready(SECONDS)
        web.answer = always(says({"error": "who is it?"}, 401))
        error = failure(lambda: asked.ready(SECONDS))
        assert (error.kind, "who is it?" in str(error)) == ("denied", True)
        assert "ZTUNE_TOKEN" in str(to_server_error(error))
        assert "authorization" not in web.asked[-1].headers
        web.answer = lambda one: Reply(200 if one.path == "/v2/models/double" else 400, b"{}")
        assert failure(lambda: asked.model("double", "", SECONDS)).kind == "loading"
    monkeypatch.setenv("ZTUNE_TOKEN", "hunter2")
    with opened(f"http://{web.address}") as asked:
        web.answer = serve
        for call in (
            lambda: asked.ready(SECONDS),
            lambda: asked.server(SECONDS),
            lambda: asked.model("double", "", SECONDS),
            lambda: asked.infer(ASK, SECONDS),
        ):
            call()
            assert web.asked[-1].headers["authorization"] == "Bearer hunter2"


BODY = binary(2 * X)


@pytest.mark.parametrize("cut", [0, 1, len(BODY.body) - 1], ids=["head", "first byte", "last byte"])  # type: ignore[arg-type]
@pytest.mark.parametrize("form", ["length", "chunks"])
def test_a_body_cut_short_is_no_answer(web: WebServer, cut: int, form: str) -> None:
    assert isinstance(BODY.body, bytes)
    headers, content = dict(BODY.headers), BODY.body[:cut]
    if form == "chunks":
        headers["Transfer-Encoding"] = "chunked"
        reply = Reply(200, chunked(*([content] if content else []), end=False), headers, ends=True)
    else:
        reply = Reply(200, content, headers, length=len(BODY.body), ends=True)
    with opened(f"http://{web.address}") as asked:
        web.answer = always(reply)
        assert failure(lambda: asked.infer(ASK, SECONDS)).kind == "away"
        web.answer = serve
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


def test_chunked_answers(web: WebServer) -> None:
    assert isinstance(BODY.body, bytes)
    body = chunked(BODY.body[:1], BODY.body[1:60], BODY.body[60:])
    headers = {**BODY.headers, "Transfer-Encoding": "chunked"}
    web.answer = always(Reply(200, body, headers))
    with opened(f"http://{web.address}") as asked:
        for _ in range(3):
            np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        assert web.n_connections == 1
    # Without length or chunks a body ends with its connection.
    web.answer = always(Reply(200, iter([BODY.body]), {**BODY.headers, "Connection": "close"}))
    with opened(f"http://{web.address}") as asked:
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


@pytest.mark.parametrize("part", ["body", "headers", "chunks"])
def test_a_deadline_is_over_the_whole_answer(web: WebServer, part: str) -> None:
    assert isinstance(BODY.body, bytes)
    if part == "body":
        reply = Reply(200, slowly(BODY.body, 0.05), BODY.headers, length=len(BODY.body))
    elif part == "headers":
        reply = Reply(raw=slowly(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nX: " + b"x" * 50, 0.05))
    else:
        whole = chunked(*(bytes([byte]) for byte in BODY.body))
        headers = {**BODY.headers, "Transfer-Encoding": "chunked"}
        reply = Reply(200, slowly(whole, 0.05), headers)
    web.answer = always(reply)
    with opened(f"http://{web.address}") as asked:
        began = time.monotonic()
        error = failure(lambda: asked.infer(ASK, 0.4))
        seconds = time.monotonic() - began
    assert 0.4 <= seconds < 2  # the answer would take more than four
    assert (error.kind, "no answer within the deadline" in str(error)) == ("away", True)


def test_a_server_that_says_nothing(web: WebServer) -> None:
    release = threading.Event()

    def wait(asked: Asked) -> Reply:
        release.wait(10)
        return Reply()

    web.answer = wait
    with opened(f"http://{web.address}") as asked:
        began = time.monotonic()
        assert failure(lambda: asked.infer(ASK, 0.2)).kind == "away"
        assert 0.2 <= time.monotonic() - began < 5
    release.set()


def test_an_http_answer_that_is_too_large(web: WebServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 1000)
    with opened(f"http://{web.address}") as asked:
        headers = {"Transfer-Encoding": "chunked"}
        for reply in (
            Reply(200, b"x" * 1001),
            Reply(200, chunked(b"x" * 600, b"x" * 600), headers),
        ):
            web.answer = always(reply)
            error = failure(lambda: asked.infer(ASK, SECONDS))
            assert (error.kind, "larger than 1000 bytes" in str(error)) == ("refused", True)
        web.answer = serve
        assert len(asked.infer(ASK, SECONDS)["y"]) == 3
        monkeypatch.setattr(http_transport, "_LARGEST_METADATA", 10)
        assert failure(lambda: asked.server(SECONDS)).kind == "refused"


@pytest.mark.parametrize(
    ("reply", "kind", "words"),
    [
        (Reply(200, b"<html>"), "broken", "unreadable answer"),
        (Reply(200, b""), "broken", "unreadable answer"),
        (Reply(200, b"\xff\xfe"), "broken", "unreadable answer"),
        (says([1]), "broken", "unreadable answer"),
        (says({"outputs": [{"name": "y"}]}), "broken", "unreadable answer"),
        (says({"outputs": []}), "refused", 'no output "y"'),
        (says({}), "broken", "unreadable answer"),
        (binary(2 * X, shape=[4]), "broken", "unreadable answer"),
        (binary(2 * X, datatype="FP64"), "broken", "unreadable answer"),
        (binary(2 * X, datatype="NONE"), "broken", "unreadable answer"),
        (binary(2 * X, parameters={"binary_data_size": 8}), "broken", "unreadable answer"),
        (
            Reply(200, b"{}", {"Inference-Header-Content-Length": "x"}),
            "broken",
            "unreadable answer",
        ),
    ],
)
def test_answers_that_are_none(web: WebServer, reply: Reply, kind: str, words: str) -> None:
    web.answer = always(reply)
    with opened(f"http://{web.address}") as asked:
        error = failure(lambda: asked.infer(ASK, SECONDS))
        assert (error.kind, words in str(error)) == (kind, True), str(error)


def test_metadata_that_is_none(web: WebServer) -> None:
    with opened(f"http://{web.address}") as asked:
        for body in (b"<html>", b"[1]", b"\xff"):
            web.answer = always(Reply(200, body))
            assert failure(lambda: asked.server(SECONDS)).kind == "refused"


@pytest.mark.parametrize(
    ("live", "ready", "kind", "said"),
    [
        (404, 404, "foreign", "/v2/health/live: Not Found (HTTP 404) (expected a KServe-v2 server"),
        (400, 400, "foreign", "/v2/health/live: Bad Request (HTTP 400) (expected a KServe-v2 ser"),
        (302, 200, "foreign", "/v2/health/live: Found (HTTP 302) (expected a KServe-v2 server"),
        (200, 404, "foreign", "/v2/health/ready: Not Found (HTTP 404) (expected a KServe-v2"),
        (401, 401, "denied", "Unauthorized (HTTP 401) (give a token with ZTUNE_TOKEN"),
        (200, 403, "denied", "Forbidden (HTTP 403) (give a token with ZTUNE_TOKEN"),
        (500, 500, "broken", "Internal Server Error (HTTP 500) (see the server's log)"),
        (
            502,
            502,
            "away",
            "Bad Gateway (HTTP 502) (check the address, and that the server is running)",
        ),
        (429, 429, "busy", "Too Many Requests (HTTP 429) (the server is overloaded; retry later)"),
    ],
)
def test_a_status_of_the_health_says_what_is_wrong(
    live: int, ready: int, kind: str, said: str, web: WebServer
) -> None:
    statuses = {"/v2/health/live": live, "/v2/health/ready": ready}
    web.answer = lambda asked: Reply(statuses[asked.path], b"<html></html>")
    with opened(f"http://{web.address}") as asked:
        error = failure(lambda: asked.ready(SECONDS))
        assert error.kind == kind
        assert said in str(to_server_error(error))


@pytest.mark.parametrize("secured", [False, True])
def test_one_protocol_at_the_port_of_the_other(
    secured: bool, web: WebServer, fake: FakeServer, certificates: Certificates
) -> None:
    given = settings(certificates) if secured else {}
    pair = certificates.valid
    http_, grpc_, s = web.address, fake.grpc, "s" if secured else ""
    with contextlib.ExitStack() as stack:
        if secured:
            http_, grpc_ = (
                stack.enter_context(TlsProxy(one, pair.cert, pair.key)).address
                for one in (http_, grpc_)
            )
        for address, scheme, other, words in (
            (http_, f"triton{s}", f"http{s}", "HTTP, not gRPC"),
            (grpc_, f"http{s}", f"triton{s}", "gRPC, not HTTP"),
        ):
            with opened(f"{scheme}://{address}", **given) as asked:
                error = failure(lambda one=asked: one.ready(SECONDS))  # type: ignore[misc]
            assert (error.kind, error.retryable) == ("foreign", True)
            expected = f"{scheme}://{address}: the port speaks {words} (use {other}://{address})"
            assert str(to_server_error(error)) == expected
    assert all("authorization" not in one.headers for one in web.asked)


@contextlib.contextmanager
def listening(speak: Callable[[socket.socket], None]) -> Iterator[str]:
    """Yield the address of a port where `speak` is called with each connection."""

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                speak(connection)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}"
        finally:
            with contextlib.suppress(OSError):  # macOS has nothing to shut down here
                listener.shutdown(socket.SHUT_RDWR)
            listener.close()
            thread.join()


@pytest.mark.parametrize("greeting", [b"SSH-2.0-OpenSSH_9.7\r\n", b"* OK IMAP4 ready\r\n"])
def test_a_port_of_neither(greeting: bytes) -> None:
    def greet(connection: socket.socket) -> None:
        connection.sendall(greeting)
        connection.recv(1 << 16)

    with listening(greet) as address:
        for scheme, said in (("triton", "gRPC server"), ("http", "not an HTTP server")):
            with opened(f"{scheme}://{address}") as asked:
                error = failure(lambda one=asked: one.ready(SECONDS))  # type: ignore[misc]
            assert error.kind == "foreign"
            assert said in str(error)
            assert "expected a KServe-v2 server" in str(to_server_error(error))


def test_an_http_server_that_closes_what_is_no_http() -> None:
    """Triton's is one."""

    def speak(connection: socket.socket) -> None:
        if not connection.recv(1 << 16).startswith(b"PRI * HTTP/2.0"):
            connection.sendall(b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n")

    with listening(speak) as address, opened(f"triton://{address}") as asked:
        error = failure(lambda: asked.ready(SECONDS))
        assert f"the port speaks HTTP, not gRPC (use http://{address})" in str(error)


def test_a_grpc_server_of_something_else() -> None:
    server = grpc.server(ThreadPoolExecutor(1))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with opened(f"triton://127.0.0.1:{port}") as asked:
            error = failure(lambda: asked.ready(SECONDS))
        assert error.kind == "foreign"
        assert "UNIMPLEMENTED) (expected a KServe-v2 server" in str(to_server_error(error))
    finally:
        server.stop(None).wait()


def test_one_connection_does_for_many_requests_of_a_thread(web: WebServer) -> None:
    with opened(f"http://{web.address}") as asked:
        for _ in range(5):
            asked.infer(ASK, SECONDS)
        assert {one.connection for one in web.asked} == {1}
        threads = [threading.Thread(target=asked.infer, args=(ASK, SECONDS)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
        assert web.n_connections <= 2


def test_an_idle_connection_that_the_server_has_closed_is_replaced(web: WebServer) -> None:
    with opened(f"http://{web.address}") as asked:
        for number in (1, 2, 3):
            asked.infer(ASK, SECONDS)
            assert web.asked[-1].connection == number
            web.hang_up()
        # Also where it is closed right behind the answer.
        web.answer = lambda one: serve(one)._replace(ends=True)
        asked.infer(ASK, SECONDS)
        web.hang_up()
        asked.infer(ASK, SECONDS)
        assert len(web.asked) == 5  # each was sent once


def test_what_comes_unasked_is_no_answer_to_the_next_question(web: WebServer) -> None:
    late = binary(np.zeros(3, np.float32))
    assert isinstance(late.body, bytes)
    more = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n" % len(late.body)
    head = f"Inference-Header-Content-Length: {late.headers['Inference-Header-Content-Length']}"
    more += head.encode() + b"\r\n\r\n" + late.body
    assert isinstance(BODY.body, bytes)
    with opened(f"http://{web.address}") as asked:
        web.answer = always(Reply(200, BODY.body + more, BODY.headers, length=len(BODY.body)))
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        web.answer = serve
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


@pytest.mark.parametrize("compression", ["gzip", "deflate"])
def test_http_compresses_both_ways(web: WebServer, compression: str) -> None:
    def pack(content: bytes) -> bytes:
        return gzip.compress(content) if compression == "gzip" else zlib.compress(content)

    def packed(one: Asked) -> Reply:
        reply = serve(one)
        assert isinstance(reply.body, bytes)
        headers = {**reply.headers, "Content-Encoding": compression}
        return reply._replace(body=pack(reply.body), headers=headers)

    web.answer = packed
    with opened(f"http://{web.address}", compression=compression) as asked:
        asked.server(SECONDS)
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        one = web.asked[-1]
        assert one.headers["content-encoding"] == one.headers["accept-encoding"] == compression
        assert X.tobytes() in zlib.decompress(one.body, wbits=47 if compression == "gzip" else 15)
        assert X.tobytes() not in one.body
        error = Reply(400, pack(b'{"error": "wrong"}'), {"Content-Encoding": compression})
        web.answer = always(error)
        assert "wrong (HTTP 400)" in str(failure(lambda: asked.infer(ASK, SECONDS)))


def test_a_small_body_that_unpacks_to_a_large_one(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "LARGEST_ANSWER", 100_000)
    for n_bytes, kind in ((10_000_000, "refused"), (100_001, "refused"), (100_000, "broken")):
        web.answer = always(Reply(200, gzip.compress(bytes(n_bytes)), {"Content-Encoding": "gzip"}))
        with opened(f"http://{web.address}", compression="gzip") as asked:
            assert failure(lambda: asked.infer(ASK, SECONDS)).kind == kind


@pytest.mark.parametrize(
    "body", [b"none", gzip.compress(b"{}" * 50, mtime=0)[:-9], b""], ids=["text", "cut", "empty"]
)
def test_a_body_that_does_not_unpack(web: WebServer, body: bytes) -> None:
    web.answer = always(Reply(200, body, {"Content-Encoding": "gzip"}))
    with opened(f"http://{web.address}", compression="gzip") as asked:
        error = failure(lambda: asked.infer(ASK, SECONDS))
        assert (error.kind, "unreadable answer" in str(error)) == ("broken", True)


def test_closing_ends_an_http_call(web: WebServer) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait(asked: Asked) -> Reply:
        entered.set()
        release.wait(10)
        return Reply()

    web.answer = wait
    kind, seconds = ended_by_closing(f"http://{web.address}", entered)
    release.set()
    assert kind == "away"
    assert seconds < 2


@pytest.mark.parametrize("stopped", ["by the deadline", "by closing"])
def test_closing_leaves_no_socket_of_a_request_half_sent(stopped: str) -> None:
    entered, gone = threading.Event(), threading.Event()

    def accept_and_wait(connection: socket.socket) -> None:
        connection.recv(1)  # the rest of the request fills the buffers of both sides
        entered.set()
        gone.wait(10)

    request = Request("double", {"x": np.zeros(5_000_000, np.float32)}, ["y"])
    with listening(accept_and_wait) as address:
        asked = open_transport(parse_location(f"http://{address}/m").endpoint, Connection())
        with ThreadPoolExecutor(1) as pool:
            seconds = 0.3 if stopped == "by the deadline" else SECONDS
            answer = pool.submit(asked.infer, request, seconds)
            assert entered.wait(10)
            if stopped == "by the deadline":
                assert isinstance(answer.exception(), CallError)
            asked.close()
            assert isinstance(answer.exception(), CallError)
        peers = [one.raddr.port for one in psutil.Process().net_connections() if one.raddr]
        gone.set()
    assert int(address.rpartition(":")[2]) not in peers


def test_an_interrupted_answer_is_not_taken_for_the_next_one(
    web: WebServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, timeout: float | None = None) -> None:
        raise KeyboardInterrupt

    with opened(f"http://{web.address}") as asked:
        asked.infer(ASK, SECONDS)
        with monkeypatch.context() as patch:
            patch.setattr("concurrent.futures.Future.result", interrupt)
            with pytest.raises(KeyboardInterrupt):
                asked.infer(replace(ASK, inputs={"x": -X}), SECONDS)
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)


# -- TLS -------------------------------------------------------------------------------------------


def settings(certificates: Certificates, own: Pair | None = None, **more: Any) -> dict[str, Any]:
    shown = {} if own is None else {"tls_cert": str(own.cert), "tls_key": str(own.key)}
    return {"tls_ca": str(certificates.authority), **shown, **more}


@pytest.fixture(params=["tritons", "https"])
def secure(request: pytest.FixtureRequest) -> Iterator[tuple[str, str]]:
    """Give the scheme, and the address of a server without TLS that speaks its protocol."""
    if request.param == "tritons":
        with FakeServer({"double": DOUBLE}) as fake:
            yield request.param, fake.grpc
    else:
        with WebServer(serve) as web:
            yield request.param, web.address


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("valid", ""),
        ("expired", "TLS failed: certificate has expired"),
        ("wrong_host", "TLS failed: (the certificate is for another host|IP address mismatch)"),
        ("unknown", "TLS failed: unable to get local issuer certificate"),
    ],
)
def test_a_server_is_who_its_certificate_says(
    secure: tuple[str, str], certificates: Certificates, shown: str, words: str
) -> None:
    scheme, address = secure
    unknown = shown == "unknown"
    pair: Pair = certificates.valid if unknown else getattr(certificates, shown)
    given = settings(certificates)
    if unknown:
        given["tls_ca"] = str(certificates.strange_authority)
    with (
        TlsProxy(address, pair.cert, pair.key) as proxy,
        opened(f"{scheme}://{proxy.address}", **given) as asked,
    ):
        check_tls(asked, words)


def check_tls(asked: Transport, words: str) -> None:
    if not words:
        assert asked.ready(SECONDS)
        np.testing.assert_array_equal(asked.infer(ASK, SECONDS)["y"], 2 * X)
        return
    error = failure(lambda: asked.infer(ASK, SECONDS))
    assert error.kind == "away"
    assert re.search(words, str(error)), str(error)
    assert len(str(to_server_error(error))) < 200
    hint = "(check `tls_ca`, `tls_cert` and `tls_key`; runs do not save them)"
    if "does not use TLS" in words:
        hint = "(use triton:// or http:// for a server without TLS)"
    assert str(to_server_error(error)).endswith(hint)


@pytest.mark.parametrize(
    ("shown", "words"),
    [
        ("client", ""),
        ("stranger", "TLS failed: the server (closed the connection|does not trust the authority)"),
        (None, "TLS failed: the server (closed the connection|requires a client certificate)"),
    ],
)
def test_a_client_is_who_its_certificate_says(
    secure: tuple[str, str], certificates: Certificates, shown: str | None, words: str
) -> None:
    scheme, address = secure
    own = getattr(certificates, shown) if shown else None
    valid, ours = certificates.valid, certificates.authority
    with (
        TlsProxy(address, valid.cert, valid.key, ours) as proxy,
        opened(f"{scheme}://{proxy.address}", **settings(certificates, own)) as asked,
    ):
        check_tls(asked, words)


def test_a_server_without_tls(secure: tuple[str, str], certificates: Certificates) -> None:
    scheme, address = secure
    with opened(f"{scheme}://{address}", **settings(certificates)) as asked:
        check_tls(asked, "TLS failed: the server does not use TLS")


def test_insecure_is_for_https_alone(secure: tuple[str, str], certificates: Certificates) -> None:
    scheme, address = secure
    pair = certificates.expired
    with TlsProxy(address, pair.cert, pair.key) as proxy:
        url = f"{scheme}://{proxy.address}"
        if scheme == "https":
            with opened(url, insecure=True) as asked:
                check_tls(asked, "")
        else:
            with (
                pytest.raises(ConfigError, match="`insecure` is not supported"),
                opened(url, insecure=True),
            ):
                pass


def test_files_that_are_no_certificates(
    secure: tuple[str, str], certificates: Certificates, tmp_path: Path
) -> None:
    scheme, address = secure
    (tmp_path / "garbage").write_text("garbage")
    other = Pair(certificates.client.cert, certificates.stranger.key)
    for given in (
        settings(certificates, tls_ca=str(tmp_path / "garbage")),
        settings(certificates, other),
    ):
        with (
            pytest.raises(ConfigError, match="invalid file of"),
            opened(f"{scheme}://{address}", **given),
        ):
            pass


def test_an_error_repeats_no_secret_that_a_server_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZTUNE_TOKEN", "s3cr3t")
    reply = says({"error": "cannot read Bearer s3cr3t, nor s3cr3t"}, status=400)
    with WebServer(always(reply)) as server, opened(f"http://{server.address}") as web:
        text = str(failure(lambda: web.server(2)))
        assert "cannot read …, nor …" in text
        assert "s3cr3t" not in text
    x = Tensor("x", "FP32", (-1,))
    double = FakeModel([x], [x], lambda given: given)

    def refuse(request: Any, honest: Any) -> Any:
        raise FailedError(grpc.StatusCode.INVALID_ARGUMENT, "cannot read Bearer s3cr3t")

    with (
        FakeServer({"double": double}, hook=refuse) as fake,
        opened(f"triton://{fake.grpc}") as remote,
    ):
        asked = Request("double", {"x": np.zeros(1, np.float32)}, ("x",))
        text = str(failure(lambda: remote.infer(asked, 2)))
        assert "cannot read …" in text
        assert "s3cr3t" not in text


def test_a_server_that_nests_without_end_is_refused_in_one_line() -> None:
    for status in (200, 400):
        bomb = Reply(status, b"[" * 200_000)
        with WebServer(always(bomb)) as server, opened(f"http://{server.address}") as web:
            assert failure(lambda: web.server(2)).kind == "refused"


def test_grpc_speaks_to_nobody_but_the_server_that_was_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    heard: list[str] = []

    def proxy(asked: Asked) -> Reply:
        heard.append(asked.path)
        return Reply(502)

    with WebServer(proxy) as server, FakeServer({}) as fake:
        for name in ("http_proxy", "https_proxy", "grpc_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://{server.address}")
        with opened(f"triton://{fake.grpc}") as remote:
            assert remote.ready(5)
        with opened(f"http://{server.address}") as web:
            assert failure(lambda: web.ready(5)).kind == "away"
    assert heard == ["/v2/health/live"]
