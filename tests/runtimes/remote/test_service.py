"""Questions to a server that fails, lies, goes away and comes back."""

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest

from runtimes.remote import contract
from runtimes.remote.endpoint import Connection, parse_location
from runtimes.remote.service import Infer, ModelRequest, Service
from tests.servers import fake as fakes
from tests.servers.fake import Arrays, FailedError, FakeModel, FakeServer, Tensor, put
from tests.servers.proxy import FaultProxy
from ztune.errors import AwayError, ServerError

grpc = pytest.importorskip("grpc")
from tritonclient.grpc import service_pb2  # noqa: E402 - only where there is one

DIGEST = bytes(range(32))
OTHER = bytes(32)


def digest(value: bytes = DIGEST) -> np.ndarray[Any, Any]:
    return np.frombuffer(value, np.uint8)


class Fake(FakeServer):
    """Triples contexts, and is ready when it is told to be."""

    def __init__(self, *, tells: bool = True) -> None:
        self.ready = True
        self.seen: list[int] = []
        """The first number of each request that arrived to be tripled."""
        told = [Tensor("digest", "UINT8", [32])] if tells else []
        contexts = [Tensor("contexts", "FP32", [-1, -1, 2]), Tensor("tokens", "INT64", [-1, -1])]
        features = [Tensor("features", "FP32", [-1, -1, 2]), *told]
        super().__init__({"m_prompt": FakeModel(contexts, features, self.tripled)})

    def tripled(self, given: Arrays) -> Arrays:
        self.seen.append(int(given["contexts"].flat[0]))
        return {"features": 3 * given["contexts"], "digest": digest()}


@pytest.fixture(autouse=True)
def _as_ready_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(self: Any, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._server.ready)

    monkeypatch.setattr(fakes._Service, "ServerReady", ready)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


@contextlib.contextmanager
def serving(
    address: str, remark: Callable[[str], None] = lambda line: None, **settings: Any
) -> Iterator[Service]:
    chosen: dict[str, Any] = {"deadline": 20.0, "give_up": 20.0} | settings
    service = Service(parse_location(f"triton://{address}/m"), Connection(**chosen), remark)
    try:
        service.start()
        service.digest = DIGEST
        yield service
    finally:
        service.close()


def model_request(number: int = 1, n: int = 2) -> ModelRequest:
    contexts = np.full((n, 1, 2), number, np.float32)
    tokens = np.zeros((1, 1), np.int64)
    wanted = {"features": contract.Tensor("FP32", (n, 1, 2))}
    return ModelRequest("prompt", {"contexts": contexts, "tokens": tokens}, wanted, n)


def numbers(answers: Sequence[dict[str, Any]]) -> list[float]:
    return [float(answer["features"].flat[0]) for answer in answers]


def failing(code: str, times: int = 1_000_000, words: str = "so it is") -> Callable[..., Any]:
    """Return a hook that fails that often and then lets answers pass."""
    left, lock = [times], threading.Lock()

    def hook(request: Any, honest: Any) -> Any:
        with lock:
            left[0] -= 1
            if left[0] >= 0:
                raise FailedError(grpc.StatusCode[code], words)
        return honest

    return hook


# -- one question -------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL"])
def test_it_is_asked_until_it_answers(fake: Fake, code: str) -> None:
    remarks: list[str] = []
    sent: list[tuple[int, int]] = []
    with serving(fake.grpc, remark=remarks.append) as service:
        service.on_send = lambda part, n: sent.append((part, n))
        fake.hook = failing(code, 3)
        assert numbers(service.infer([model_request(7, n=3)])) == [21]
        assert fake.calls["ModelInfer"] == 4
        assert sent == [(0, 3)] * 4  # written down each time it goes
        assert len(remarks) == 2
        assert "so it is" in remarks[0]
        assert "retrying for up to 20 s" in remarks[0]
        assert remarks[1].endswith("answers again")
        # Nothing is left of it: the next one goes at once.
        n_ready = fake.calls["ServerReady"]
        service.infer([model_request()])
        assert fake.calls["ServerReady"] == n_ready
        assert (service.requests, service.payload_bytes[1]) == (2, 3 * 8 + 2 * 8 + 2 * 32)


def test_it_is_written_down_before_it_goes(fake: Fake) -> None:
    def full(part: int, n: int) -> None:
        raise OSError("no space")

    with serving(fake.grpc) as service:
        service.on_send = full
        for requests in ([model_request()], [model_request(), model_request()]):
            with pytest.raises(OSError, match="no space"):
                service.infer(requests)
        assert fake.seen == []
        service.on_send = lambda part, n: fake.seen.append(-10 - part)
        service.infer([model_request(number) for number in (5, 6)])
        assert sorted(fake.seen) == [-11, -10, 5, 6]
        assert fake.seen.index(5) > fake.seen.index(-10)
        assert fake.seen.index(6) > fake.seen.index(-11)
        # What holds no query is not written down.
        fake.seen.clear()
        service.infer([ModelRequest("prompt", model_request(9).inputs, model_request(9).outputs)])
        assert fake.seen == [9]


@pytest.mark.parametrize("silent", [False, True])
def test_it_is_given_up_after_the_agreed_time(fake: Fake, silent: bool) -> None:
    release = threading.Event()

    def wait(request: Any, honest: Any) -> Any:
        release.wait(10)
        return honest

    with serving(fake.grpc, deadline=0.3, give_up=0.6) as service:
        fake.hook = wait if silent else failing("UNAVAILABLE")
        began = time.monotonic()
        with pytest.raises(AwayError, match=r"no answer for 0\.6 s \(triton://.*: (so it|no answ)"):
            service.infer([model_request()])
        assert 0.6 <= time.monotonic() - began < 8  # the server would answer after ten
    release.set()


def test_a_server_that_is_not_ready_is_sent_nothing(fake: Fake) -> None:
    with serving(fake.grpc) as service:
        fake.hook = failing("UNAVAILABLE", 1)
        fake.ready = False
        asked: list[float] = []
        thread = threading.Thread(
            target=lambda: asked.extend(numbers(service.infer([model_request()])))
        )
        before = fake.calls.get("ServerReady", 0)
        thread.start()
        until = time.monotonic() + 30
        while fake.calls.get("ServerReady", 0) < before + 3 and time.monotonic() < until:
            time.sleep(0.01)
        assert fake.calls["ModelInfer"] == 1
        fake.ready = True
        thread.join(10)
        assert asked == [3]
        assert fake.calls["ModelInfer"] == 2


def test_models_that_are_not_ready_are_not_said_to_be_absent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def loading(self: Any, request: Any, context: Any) -> Any:
        return service_pb2.ModelReadyResponse(ready=False)

    monkeypatch.setattr(fakes._Service, "ModelReady", loading)
    with (
        Fake() as fake,
        pytest.raises(ServerError, match=r"has m_prompt, but none is ready \(wait"),
        serving(fake.grpc),
    ):
        pass


def test_a_server_that_never_is_ready_again(fake: Fake) -> None:
    with serving(fake.grpc, give_up=0.5) as service:
        fake.hook = failing("UNAVAILABLE")
        fake.ready = False
        with pytest.raises(AwayError, match=r"no answer for 0\.5 s"):
            service.infer([model_request()])
        assert fake.calls["ModelInfer"] == 1


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED"]
)
def test_what_would_fail_again_is_not_repeated(fake: Fake, code: str) -> None:
    with serving(fake.grpc) as service:
        fake.hook = failing(code)
        for requests in ([model_request()], [model_request(), model_request()]):
            with pytest.raises(ServerError) as caught:
                service.infer(requests)
            assert not isinstance(caught.value, AwayError)
            assert "\n" not in str(caught.value)
        assert fake.calls["ModelInfer"] <= 3


def test_a_server_that_fails_inside_is_asked_five_times(fake: Fake) -> None:
    with serving(fake.grpc, give_up=60) as service:
        fake.hook = failing("INTERNAL", words="out of memory")
        with pytest.raises(ServerError, match=r"out of memory \(see the server's log\)"):
            service.infer([model_request()])
        assert fake.calls["ModelInfer"] == 5
        fake.hook = None
        assert numbers(service.infer([model_request()])) == [3]


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (
            "features",
            np.zeros((2, 1, 3), np.float32),
            r'"features" is float32\[2, 1, 3\], expected ',
        ),
        ("features", np.zeros((1, 1, 2), np.float32), r"float32\[1, 1, 2\], expected "),
        ("features", np.zeros((2, 2), np.float32), r"float32\[2, 2\], expected "),
        ("features", np.zeros((2, 1, 2)), r"float64\[2, 1, 2\], expected float32\[2, 1, 2\]"),
        (
            "digest",
            digest(OTHER),
            r"now serves bundle 000000000000…, ",
        ),
        ("digest", digest(DIGEST[:31] + b"x"), "expected 000102030405… .restore that bundle"),
        ("digest", digest(DIGEST * 2), r'"digest" is uint8\[64\], expected uint8\[32\]'),
        ("digest", np.zeros(32, np.int64), r'"digest" is int64\[32\], expected uint8\[32\]'),
    ],
)
def test_an_answer_of_another_kind_is_refused(
    fake: Fake, name: str, value: np.ndarray[Any, Any], words: str
) -> None:
    def spoil(request: Any, honest: Any) -> Any:
        put(honest, name, value)
        return honest

    with serving(fake.grpc) as service:
        fake.hook = spoil
        with pytest.raises(ServerError, match=words):
            service.infer([model_request()])
        assert fake.calls["ModelInfer"] == 1


def test_each_row_says_whose_it_is(fake: Fake) -> None:
    rows = np.stack([digest()] * 3)
    fake.models["m_text"] = FakeModel(
        [Tensor("tokens", "INT64", [-1, 2])],
        [Tensor("features", "FP32", [-1, 2]), Tensor("digest", "UINT8", [-1, 32])],
        lambda given: {"features": np.ones((3, 2), np.float32), "digest": rows},
    )
    asking = ModelRequest(
        "text",
        {"tokens": np.zeros((3, 2), np.int64)},
        {"features": contract.Tensor("FP32", (3, 2))},
    )
    with serving(fake.grpc) as service:
        assert service.infer([asking])[0]["features"].sum() == 6
        rows[2, 31] = 0
        with pytest.raises(ServerError, match="now serves bundle"):
            service.infer([asking])


def test_a_server_that_comes_back_as_another_one_ends_the_run(fake: Fake) -> None:
    def other(request: Any, honest: Any) -> Any:
        put(honest, "digest", digest(OTHER))
        return honest

    with (
        FaultProxy(fake.grpc, 0, 0, 0) as proxy,
        serving(proxy.address, give_up=20) as service,
    ):
        service.infer([model_request()])
        proxy.refuse()
        timer = threading.Timer(0.3, proxy.refuse, (False,))
        fake.hook = other
        timer.start()
        with pytest.raises(ServerError, match="now serves bundle"):
            service.infer([model_request()])
        timer.join()


def test_a_server_that_reports_no_digest_is_proved_when_it_is_back() -> None:
    with Fake(tells=False) as fake, serving(fake.grpc, give_up=20) as service:
        proved: list[float] = []

        def verify(ask: Infer) -> None:
            proved.extend(numbers([ask(model_request(50))]))

        service.verify = verify
        service.infer([model_request(1), model_request(2)])
        assert proved == []
        fake.hook = failing("UNAVAILABLE", 1)
        assert numbers(service.infer([model_request(1)])) == [3]
        assert proved == [150]

        # What fails while it is proved is a server that is still away, ...
        fake.hook = failing("UNAVAILABLE", 2)
        assert numbers(service.infer([model_request(1)])) == [3]
        assert proved == [150, 150]

        # ... and what looks wrong ends the run.
        def wrong(ask: Infer) -> None:
            raise ServerError("it is another model")

        service.verify = wrong
        fake.hook = failing("UNAVAILABLE", 1)
        with pytest.raises(ServerError, match="it is another model"):
            service.infer([model_request(1)])


# -- many at once, and the end ---------------------------------------------------------------------


class Crowd:
    """A hook that holds requests until it is told to let them go, and counts those it holds."""

    def __init__(self, enough: int) -> None:
        self.now = self.most = self.total = 0
        self.enough = enough
        self.full, self.release = threading.Event(), threading.Event()
        self._lock = threading.Lock()

    def __call__(self, request: Any, honest: Any) -> Any:
        with self._lock:
            self.now += 1
            self.total += 1
            self.most = max(self.most, self.now)
            if self.now >= self.enough:
                self.full.set()
        self.release.wait(10)
        with self._lock:
            self.now -= 1
        return honest


@pytest.mark.parametrize("n", [2, 3])
def test_no_more_than_agreed_are_on_their_way(fake: Fake, n: int) -> None:
    crowd = Crowd(n)
    with serving(fake.grpc, max_inflight=n) as service:
        fake.hook = crowd
        asked = [model_request(number) for number in range(9)]
        answers: list[float] = []
        thread = threading.Thread(target=lambda: answers.extend(numbers(service.infer(asked))))
        thread.start()
        assert crowd.full.wait(30)
        time.sleep(0.1)  # for one too many to arrive
        assert crowd.now == n
        crowd.release.set()
        thread.join(10)
        assert answers == [3.0 * number for number in range(9)]
        assert crowd.most <= n


@pytest.mark.parametrize("n", [1, 5])
def test_closing_ends_what_is_on_its_way(fake: Fake, n: int) -> None:
    crowd = Crowd(min(n, 2))
    errors: list[BaseException] = []
    with serving(fake.grpc, max_inflight=2, deadline=20) as service:
        fake.hook = crowd

        def ask() -> None:
            try:
                service.infer([model_request()] * n)
            except BaseException as error:
                errors.append(error)

        thread = threading.Thread(target=ask)
        thread.start()
        assert crowd.full.wait(30)
        began = time.monotonic()
        service.close()
        thread.join(30)
        assert time.monotonic() - began < 8
        assert [type(error) for error in errors] == [AwayError]
        assert no_request_threads()
        crowd.release.set()
        assert crowd.total == min(n, 2)
        with pytest.raises(AwayError, match="stopped"):
            service.infer([model_request()])
    assert errors


def no_request_threads() -> bool:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        if not any(t.name.startswith("ztune-request") for t in threading.enumerate()):
            return True
        time.sleep(0.01)
    return False


def test_closing_while_nobody_answers(fake: Fake) -> None:
    with serving(fake.grpc, give_up=60) as service:
        fake.hook = failing("UNAVAILABLE")
        fake.ready = False
        errors: list[str] = []

        def ask() -> None:
            with pytest.raises(AwayError) as caught:
                service.infer([model_request()] * 3)
            errors.append(str(caught.value))

        thread = threading.Thread(target=ask)
        thread.start()
        while fake.calls.get("ServerReady", 0) < 5:
            time.sleep(0.01)
        service.close()
        thread.join(30)
        assert errors == ["stopped"]
        assert no_request_threads()


@pytest.mark.parametrize("n", [1, 6])
def test_an_interrupted_round_sends_nothing_more(fake: Fake, n: int) -> None:
    interrupted = threading.Lock()

    class Interrupting(Crowd):
        def __call__(self, request: Any, honest: Any) -> Any:
            if interrupted.acquire(blocking=False):  # once
                main = threading.main_thread().ident
                assert main is not None
                threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
            return super().__call__(request, honest)

    crowd = Interrupting(2)
    with serving(fake.grpc, max_inflight=2) as service:
        fake.hook = crowd
        with pytest.raises(KeyboardInterrupt):
            service.infer([model_request()] * n)
            time.sleep(5)
        crowd.release.set()
        time.sleep(0.2)  # for what is still on its way, and what should not follow
        assert crowd.total == min(n, 2)
        fake.hook = None
        assert numbers(service.infer([model_request(4), model_request(5)])) == [12, 15]


def test_after_a_failed_round_nothing_of_it_is_sent_again(fake: Fake) -> None:
    def hook(request: Any, honest: Any) -> Any:
        number = np.frombuffer(request.raw_input_contents[0], np.float32)[0]
        code = "INVALID_ARGUMENT" if number == 0 else "UNAVAILABLE"
        if number == 0:
            time.sleep(0.1)  # so that the others wait to be sent again by then
        raise FailedError(grpc.StatusCode[code], "so it is")

    with serving(fake.grpc, give_up=60) as service:
        fake.hook = hook
        with pytest.raises(ServerError, match="so it is"):
            service.infer([model_request(number) for number in range(4)])
        time.sleep(0.3)
        n_sent = fake.calls["ModelInfer"]
        time.sleep(0.7)
        assert fake.calls["ModelInfer"] == n_sent
