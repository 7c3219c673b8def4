"""Questions to servers that fail, forget, lie, go away and come back."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtimes.remote.endpoint import Connection, Location, parse_endpoint
from runtimes.remote.service import Ask, KeptImages, Question, Service
from runtimes.remote.shared_memory import Expected, SharedMemory
from runtimes.remote.transport import CallError, Request, Transport
from tests.servers import fake as fakes
from tests.servers.fake import Arrays, FailedError, FakeModel, FakeServer, Tensor, put
from tests.servers.proxy import FaultProxy
from ztune.errors import AwayError, ServerError

grpc = pytest.importorskip("grpc")
from tritonclient.grpc import service_pb2  # noqa: E402 - only where there is one

DIGEST = bytes(range(32))
OTHER = bytes(32)
N_LEFT = Path("/dev/shm")


def digest(value: bytes = DIGEST) -> np.ndarray[Any, Any]:
    return np.frombuffer(value, np.uint8)


class Fake(FakeServer):
    """Triples contexts, scores with images that it keeps, and is ready when it is told to be."""

    def __init__(self, *, tells: bool = True, keeps: bool = True) -> None:
        self.ready = True
        self.seen: list[int] = []
        """The first number of each request that arrived to be tripled."""
        self.kept: dict[bytes, Any] = {}
        told = [Tensor("digest", "UINT8", [32])] if tells else []
        contexts = [Tensor("contexts", "FP32", [-1, -1, 2]), Tensor("tokens", "INT64", [-1, -1])]
        images = [Tensor("features", "FP32", [-1, 2]), Tensor("labels", "INT64", [-1])]
        named = [Tensor("kept", "UINT8", [32]), Tensor("rows", "INT64", [-1])]
        super().__init__(
            {
                "m_prompt": FakeModel(
                    contexts, [Tensor("features", "FP32", [-1, -1, 2]), *told], self.tripled
                ),
                "m_score": FakeModel(
                    [*contexts, *images, *(named if keeps else [])],
                    [Tensor("losses", "FP64", [-1]), *told],
                    self.scored,
                ),
            }
        )

    def tripled(self, given: Arrays) -> Arrays:
        self.seen.append(int(given["contexts"].flat[0]))
        return {"features": 3 * given["contexts"], "digest": digest()}

    def scored(self, given: Arrays) -> Arrays:
        if "kept" in given and "features" in given:
            self.kept[given["kept"].tobytes()] = given["features"]
            return {"digest": digest()}
        if "kept" in given:
            name = given["kept"].tobytes()
            if name not in self.kept:
                raise FailedError(grpc.StatusCode.NOT_FOUND, "no images are kept")
            total = self.kept[name][given["rows"]].sum()
        else:
            total = given["features"].sum()
        losses = np.full(len(given["contexts"]), total, np.float64)
        return {"losses": losses, "digest": digest()}


@pytest.fixture(autouse=True)
def _as_ready_and_as_lenient_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def ready(self: Any, request: Any, context: Any) -> Any:
        return service_pb2.ServerReadyResponse(ready=self._server.ready)

    strict = fakes.answer

    def lenient(request: Any, model: FakeModel) -> Any:  # all inputs are optional
        return strict(request, model._replace(inputs=request.inputs))

    monkeypatch.setattr(fakes._Service, "ServerReady", ready)
    monkeypatch.setattr(fakes, "answer", lenient)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with Fake() as server:
        yield server


@contextlib.contextmanager
def serving(
    *addresses: str, remark: Callable[[str], None] = lambda line: None, **settings: Any
) -> Iterator[Service]:
    first, *others = [parse_endpoint(f"triton://{address}") for address in addresses]
    chosen: dict[str, Any] = {"deadline": 20.0, "give_up": 20.0, "shared_memory": "off"} | settings
    connection = Connection(**chosen)
    service = Service(Location(first, "m"), others, connection, remark)
    try:
        service.start()
        service.digest = DIGEST
        yield service
    finally:
        service.close()


def question(number: int = 1, n: int = 2) -> Question:
    contexts = np.full((n, 1, 2), number, np.float32)
    tokens = np.zeros((1, 1), np.int64)
    wanted = {"features": Expected("FP32", (n, 1, 2))}
    return Question("prompt", {"contexts": contexts, "tokens": tokens}, wanted, n)


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


# -- one server ------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", ["UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED", "INTERNAL"])
def test_it_is_asked_until_it_answers(fake: Fake, code: str) -> None:
    remarks: list[str] = []
    sent: list[tuple[int, int]] = []
    with serving(fake.grpc, remark=remarks.append) as service:
        service.sending = lambda part, n: sent.append((part, n))
        fake.hook = failing(code, 3)
        assert numbers(service.ask([question(7, n=3)])) == [21]
        assert fake.calls["ModelInfer"] == 4
        assert sent == [(0, 3)] * 4  # written down each time it goes
        assert len(remarks) == 2
        assert "so it is" in remarks[0]
        assert "trying again for 20 s" in remarks[0]
        assert remarks[1].endswith("answers again")
        # Nothing is left of it: the next one goes at once.
        n_ready = fake.calls["ServerReady"]
        service.ask([question()])
        assert fake.calls["ServerReady"] == n_ready
        assert (service.requests, service.payload_bytes[1]) == (2, 3 * 8 + 2 * 8 + 2 * 32)


def test_it_is_written_down_before_it_goes(fake: Fake) -> None:
    def full(part: int, n: int) -> None:
        raise OSError("no space")

    with serving(fake.grpc) as service:
        service.sending = full
        for questions in ([question()], [question(), question()]):
            with pytest.raises(OSError, match="no space"):
                service.ask(questions)
        assert fake.seen == []
        service.sending = lambda part, n: fake.seen.append(-part)
        service.ask([question(number) for number in (5, 6)], first=3)
        assert sorted(fake.seen) == [-4, -3, 5, 6]
        assert fake.seen.index(5) > fake.seen.index(-3)
        assert fake.seen.index(6) > fake.seen.index(-4)
        # What holds no query is not written down.
        fake.seen.clear()
        service.ask([Question("prompt", question(9).inputs, question(9).outputs)])
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
            service.ask([question()])
        assert 0.6 <= time.monotonic() - began < 8  # the server would answer after ten
    release.set()


def test_a_server_that_is_not_ready_is_sent_nothing(fake: Fake) -> None:
    with serving(fake.grpc) as service:
        fake.hook = failing("UNAVAILABLE", 1)
        fake.ready = False
        asked: list[float] = []
        thread = threading.Thread(target=lambda: asked.extend(numbers(service.ask([question()]))))
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
        pytest.raises(ServerError, match=r"has m_prompt, m_score, but none is ready \(wait"),
        serving(fake.grpc),
    ):
        pass


def test_a_server_that_never_is_ready_again(fake: Fake) -> None:
    with serving(fake.grpc, give_up=0.5) as service:
        fake.hook = failing("UNAVAILABLE")
        fake.ready = False
        with pytest.raises(AwayError, match=r"no answer for 0\.5 s"):
            service.ask([question()])
        assert fake.calls["ModelInfer"] == 1


@pytest.mark.parametrize(
    "code", ["INVALID_ARGUMENT", "NOT_FOUND", "PERMISSION_DENIED", "UNIMPLEMENTED"]
)
def test_what_would_fail_again_is_not_repeated(fake: Fake, code: str) -> None:
    with serving(fake.grpc) as service:
        fake.hook = failing(code)
        for questions in ([question()], [question(), question()]):
            with pytest.raises(ServerError) as caught:
                service.ask(questions)
            assert not isinstance(caught.value, AwayError)
            assert "\n" not in str(caught.value)
        assert fake.calls["ModelInfer"] <= 3


def test_a_server_that_fails_inside_is_asked_five_times(fake: Fake) -> None:
    with serving(fake.grpc, give_up=60) as service:
        fake.hook = failing("INTERNAL", words="out of memory")
        with pytest.raises(ServerError, match=r"out of memory \(see the server's log\)"):
            service.ask([question()])
        assert fake.calls["ModelInfer"] == 5
        fake.hook = None
        assert numbers(service.ask([question()])) == [3]


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
            r"another model than the run began with \(bundle 000000000000…, ",
        ),
        ("digest", digest(DIGEST[:31] + b"x"), "expected 000102030405…; put the former one back"),
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
            service.ask([question()])
        assert fake.calls["ModelInfer"] == 1


def test_each_row_says_whose_it_is(fake: Fake) -> None:
    rows = np.stack([digest()] * 3)
    fake.models["m_text"] = FakeModel(
        [Tensor("tokens", "INT64", [-1, 2])],
        [Tensor("features", "FP32", [-1, 2]), Tensor("digest", "UINT8", [-1, 32])],
        lambda given: {"features": np.ones((3, 2), np.float32), "digest": rows},
    )
    asking = Question(
        "text", {"tokens": np.zeros((3, 2), np.int64)}, {"features": Expected("FP32", (3, 2))}
    )
    with serving(fake.grpc) as service:
        assert service.ask([asking])[0]["features"].sum() == 6
        rows[2, 31] = 0
        with pytest.raises(ServerError, match="another model than the run began with"):
            service.ask([asking])


# -- images that a server keeps ------------------------------------------------------------------


def images(number: int) -> KeptImages:
    features = np.full((4, 2), number, np.float32) * np.arange(4, dtype=np.float32)[:, None]
    return KeptImages.of(features, np.zeros(4, np.int64))


def scoring(kept: KeptImages, *rows: int) -> Question:
    inputs = {
        **question().inputs,
        "kept": np.frombuffer(kept.name, np.uint8),
        "rows": np.array(rows, np.int64),
    }
    return Question("score", inputs, {"losses": Expected("FP64", (2,))}, 2, kept)


def losses(answers: Sequence[dict[str, Any]]) -> list[float]:
    return [float(answer["losses"][0]) for answer in answers]


def test_images_are_sent_once_to_each_server(fake: Fake) -> None:
    kept, others = images(1), images(10)
    sent: list[tuple[int, int]] = []
    with Fake() as second, serving(fake.grpc, second.grpc) as service:
        service.sending = lambda part, n: sent.append((part, n))
        asked = [scoring(kept, 1, 3)] * 4 + [scoring(others, 2)] * 4
        for _ in range(3):
            assert losses(service.ask(asked)) == [8.0] * 4 + [40.0] * 4
        for server in (fake, second):
            assert server.calls["ModelInfer"] == 3 * 4 + 2
            assert set(server.kept) == {kept.name, others.name}
        assert sorted(sent) == sorted([(number, 2) for number in range(8)] * 3)


def test_images_that_a_server_forgot_are_sent_again(fake: Fake) -> None:
    kept = images(1)
    sent: list[int] = []
    with serving(fake.grpc) as service:
        service.sending = lambda part, n: sent.append(n)
        service.ask([scoring(kept, 1)])
        fake.kept.clear()
        assert losses(service.ask([scoring(kept, 3)])) == [6.0]
        assert kept.name in fake.kept
        # Keep, ask; ask in vain, keep, ask.
        assert fake.calls["ModelInfer"] == 5
        assert sent == [2, 2]  # the server said that it had evaluated nothing


def test_images_that_are_always_forgotten_are_sent_with_the_question(fake: Fake) -> None:
    class Nothing(dict[bytes, Any]):
        def __setitem__(self, key: bytes, value: Any) -> None:
            """Keep nothing, as behind an address with another server for each request."""

    fake.kept = Nothing()
    with serving(fake.grpc, give_up=60) as service:
        assert losses(service.ask([scoring(images(1), 1, 3)])) == [8.0]
        # Three times keep and ask, and then everything at once.
        assert fake.calls["ModelInfer"] == 7


def test_images_that_a_server_does_not_take_go_with_every_request(fake: Fake) -> None:
    def full(request: Any, honest: Any) -> Any:
        names = {given.name for given in request.inputs}
        if {"kept", "features"} <= names:
            raise FailedError(grpc.StatusCode.INVALID_ARGUMENT, "more than 512 bytes")
        return honest

    said: list[str] = []
    with serving(fake.grpc, remark=said.append) as service:
        fake.hook = full
        asked = [scoring(images(1), 1, 3)] * 3
        for _ in range(2):
            assert losses(service.ask(asked)) == [8.0] * 3
        assert fake.calls["ModelInfer"] == 1 + 2 * 3  # it was asked to keep them once
    (line,) = said
    assert "more than 512 bytes" in line
    assert "sent with every request" in line


def test_a_server_that_refuses_everything_is_not_asked_again(fake: Fake) -> None:
    with serving(fake.grpc) as service:
        fake.hook = failing("INVALID_ARGUMENT", words="more than 512 bytes")
        with pytest.raises(ServerError, match="more than 512 bytes"):
            service.ask([scoring(images(1), 1)] * 3)
        assert fake.calls["ModelInfer"] <= 1 + 3  # to keep the images, then each with its own


def test_one_deadline_is_enough_where_images_cannot_be_sent(fake: Fake) -> None:
    release = threading.Event()

    def wait(request: Any, honest: Any) -> Any:
        release.wait(10)
        return honest

    with serving(fake.grpc, deadline=1, give_up=0.1) as service:
        fake.hook = wait
        began = time.monotonic()
        with pytest.raises(AwayError):
            service.ask([scoring(images(1), 1)] * 4)
        assert time.monotonic() - began < 3  # and not one after the other
    release.set()


# -- several servers -------------------------------------------------------------------------------


def test_the_nth_question_goes_to_the_nth_server(fake: Fake) -> None:
    with Fake() as second, Fake() as third:
        servers = (fake, second, third)
        with serving(*(server.grpc for server in servers)) as service:
            asked = [question(number) for number in range(7)]
            for _ in range(3):
                assert numbers(service.ask(asked)) == [3.0 * number for number in range(7)]
            assert [sorted(server.seen) for server in servers] == [
                [0, 0, 0, 3, 3, 3, 6, 6, 6],
                [1, 1, 1, 4, 4, 4],
                [2, 2, 2, 5, 5, 5],
            ]
            service.ask(asked[:2], first=2)
            assert (third.seen[-1], fake.seen[-1]) == (0, 1)
            assert service.ask_server(4, question(100))
            assert second.seen[-1] == 100


def test_another_server_takes_the_share_of_one_that_is_away(fake: Fake) -> None:
    with (
        Fake() as second,
        FaultProxy(second.grpc, 0, 0, 0) as proxy,
        serving(fake.grpc, proxy.address, give_up=20) as service,
    ):
        asked = [question(number) for number in range(4)]
        service.ask(asked)
        assert sorted(second.seen) == [1, 3]
        proxy.refuse()
        assert numbers(service.ask(asked)) == [0, 3, 6, 9]
        assert sorted(fake.seen) == [0, 0, 1, 2, 2, 3]
        with pytest.raises(AwayError):  # where it is asked alone nobody stands in for it
            with_less_patience(service).ask_server(1, question())
        proxy.refuse(False)
        until = time.monotonic() + 30
        while len(second.seen) == 2 and time.monotonic() < until:
            service.ask(asked)
        service.ask(asked)
        fake.seen.clear()
        second.seen.clear()
        service.ask(asked)
        assert (sorted(fake.seen), sorted(second.seen)) == ([0, 2], [1, 3])


def with_less_patience(service: Service) -> Service:
    service.connection = Connection(deadline=2, give_up=0.2)
    return service


def test_a_server_that_comes_back_as_another_one_ends_the_run(fake: Fake) -> None:
    def other(request: Any, honest: Any) -> Any:
        put(honest, "digest", digest(OTHER))
        return honest

    with (
        FaultProxy(fake.grpc, 0, 0, 0) as proxy,
        serving(proxy.address, give_up=20) as service,
    ):
        service.ask([question()])
        proxy.refuse()
        timer = threading.Timer(0.3, proxy.refuse, (False,))
        fake.hook = other
        timer.start()
        with pytest.raises(ServerError, match="another model than the run began with"):
            service.ask([question()])
        timer.join()


def test_servers_must_offer_the_same(fake: Fake) -> None:
    with (
        Fake(keeps=False) as other,
        pytest.raises(ServerError, match="offers other models than"),
        serving(fake.grpc, other.grpc),
    ):
        pass


def test_a_server_that_tells_no_digest_is_looked_at_when_it_is_back() -> None:
    with (
        Fake(tells=False) as first,
        Fake(tells=False) as second,
        serving(first.grpc, second.grpc, give_up=20) as service,
    ):
        looked: list[float] = []

        def look(ask: Ask) -> None:
            looked.extend(numbers([ask(question(50))]))

        service.prove = look
        service.ask([question(1), question(2)])
        assert looked == []
        second.hook = failing("UNAVAILABLE", 1)
        first.seen.clear()
        second.seen.clear()
        assert numbers(service.ask([question(1), question(2)])) == [3, 6]
        until = time.monotonic() + 10
        while not looked and time.monotonic() < until:
            service.ask([question(1), question(2)])
        assert looked == [150]
        assert (50 in first.seen, 50 in second.seen) == (False, True)

        # What fails while one looks is a server that is still away, ...
        second.hook = failing("UNAVAILABLE", 2)
        service.ask([question(1), question(2)])
        while len(looked) < 2 and time.monotonic() < until:
            service.ask([question(1), question(2)])
        assert looked == [150, 150]

        # ... and what looks wrong ends the run.
        def wrong(ask: Ask) -> None:
            raise ServerError("it is another model")

        service.prove = wrong
        second.hook = failing("UNAVAILABLE", 1)
        with pytest.raises(ServerError, match="it is another model"):
            while time.monotonic() < until:
                service.ask([question(1), question(2)])


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
        asked = [question(number) for number in range(9)]
        answers: list[float] = []
        thread = threading.Thread(target=lambda: answers.extend(numbers(service.ask(asked))))
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
                service.ask([question()] * n)
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
            service.ask([question()])
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
                service.ask([question()] * 3)
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
            service.ask([question()] * n)
            time.sleep(5)
        crowd.release.set()
        time.sleep(0.2)  # for what is still on its way, and what should not follow
        assert crowd.total == min(n, 2)
        fake.hook = None
        assert numbers(service.ask([question(4), question(5)])) == [12, 15]


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
            service.ask([question(number) for number in range(4)])
        time.sleep(0.3)
        n_sent = fake.calls["ModelInfer"]
        time.sleep(0.7)
        assert fake.calls["ModelInfer"] == n_sent


# -- shared memory, by itself ----------------------------------------------------------------------


class Shelf:
    """A transport whose server opens the regions it is told of, and answers as `act` does."""

    def __init__(self) -> None:
        self.endpoint = parse_endpoint("triton://127.0.0.1:1")
        self.open: dict[str, int] = {}
        self.act: Callable[[Request], dict[str, Any]] = self.doubled
        self.away = False
        self.asked: list[str] = []

    def doubled(self, request: Request) -> dict[str, Any]:
        (given,), (wanted,) = request.inputs_at.values(), request.outputs_at.values()
        assert given.name == wanted.name in self.open
        path = N_LEFT / given.name
        with path.open("r+b") as file:
            file.seek(given.offset)
            x = np.frombuffer(file.read(given.n_bytes), np.float32)
            file.seek(wanted.offset)
            file.write((2 * x).tobytes())
        return {"y": np.broadcast_to(np.zeros((), np.float32), x.shape)}

    def infer(self, request: Request, seconds: float) -> dict[str, Any]:
        self.asked.append(next(iter(request.inputs_at.values())).name)
        return self.act(request)

    def share(self, name: str, key: str, n_bytes: int, seconds: float) -> None:
        if self.away:
            raise CallError("nobody", "away")
        assert (N_LEFT / key.strip("/")).stat().st_size >= n_bytes
        self.open[name] = n_bytes

    def unshare(self, name: str, seconds: float) -> None:
        if self.away:
            raise CallError("nobody", "away")
        self.open.pop(name, None)


def doubled(memory: SharedMemory, n: int = 3) -> Any:
    x = np.arange(n, dtype=np.float32)
    request = Request("m", {"x": x}, ["y"])
    return memory.infer(request, {"y": Expected("FP32", (n,))}, 1.0)["y"]


@pytest.fixture
def shelf() -> Shelf:
    return Shelf()


@pytest.fixture
def memory(shelf: Shelf) -> Iterator[SharedMemory]:
    transport: Transport = shelf  # type: ignore[assignment]
    made = SharedMemory(transport)
    yield made
    made.close()
    assert not left(shelf)


def left(shelf: Shelf) -> list[str]:
    return [name for name in set(shelf.asked) if (N_LEFT / name).exists()]


def test_a_region_is_used_again_and_grows(shelf: Shelf, memory: SharedMemory) -> None:
    for n in (3, 4, 100_000, 300_000, 5):
        np.testing.assert_array_equal(doubled(memory, n), 2 * np.arange(n))
    assert len(set(shelf.asked)) == 2
    assert len(shelf.open) == len(left(shelf)) == 1
    memory.close()
    assert not shelf.open
    assert not left(shelf)
    with pytest.raises(CallError, match="given up"):
        doubled(memory)


@pytest.mark.parametrize(
    ("kind", "closed"), [("away", False), ("broken", False), ("refused", True), ("missing", True)]
)
def test_a_region_of_a_failed_request_is_never_used_again(
    shelf: Shelf, memory: SharedMemory, kind: str, closed: bool
) -> None:
    doubled(memory)

    def fail(request: Request) -> dict[str, Any]:
        raise CallError("so it is", kind)

    shelf.act = fail
    with pytest.raises(CallError, match="so it is"):
        doubled(memory)
    first = shelf.asked[-1]
    assert not left(shelf)
    # The server is told only where it is done with the region.
    assert (first not in shelf.open) == closed
    shelf.act = shelf.doubled
    np.testing.assert_array_equal(doubled(memory), [0, 2, 4])
    assert shelf.asked[-1] != first


def test_a_server_closes_what_it_did_not_answer_for_long_after(
    shelf: Shelf, memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(request: Request) -> dict[str, Any]:
        raise CallError("so it is", "away")

    for _ in range(3):
        shelf.act = fail
        with pytest.raises(CallError, match="so it is"):
            doubled(memory)
        shelf.act = shelf.doubled
        doubled(memory)
    assert len(shelf.open) == 4
    monkeypatch.setattr("runtimes.remote.shared_memory._LATE", 0.0)
    doubled(memory, 400_000)
    assert list(shelf.open) == shelf.asked[-1:]


def test_a_server_that_says_another_shape_is_believed(shelf: Shelf, memory: SharedMemory) -> None:
    doubled(memory)
    shelf.act = lambda request: {"y": np.zeros((2,), np.float32)}
    assert doubled(memory).shape == (2,)  # and so it is refused, not read from what was there
    shelf.act = lambda request: {"y": np.zeros((3,), np.int64)}
    assert doubled(memory).dtype == np.int64


def test_a_region_in_use_goes_when_its_request_ends(shelf: Shelf, memory: SharedMemory) -> None:
    entered, release = threading.Event(), threading.Event()

    def wait(request: Request) -> dict[str, Any]:
        entered.set()
        release.wait(10)
        return shelf.doubled(request)

    shelf.act = wait
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(doubled(memory)))
    thread.start()
    assert entered.wait(30)
    memory.close()
    assert len(left(shelf)) == 1
    release.set()
    thread.join(30)
    np.testing.assert_array_equal(got[0], [0, 2, 4])
    assert not left(shelf)


def test_threads_have_regions_of_their_own(shelf: Shelf, memory: SharedMemory) -> None:
    barrier = threading.Barrier(3, timeout=30)

    def together(request: Request) -> dict[str, Any]:
        barrier.wait()
        return shelf.doubled(request)

    shelf.act = together
    got: dict[int, Any] = {}
    threads = [
        threading.Thread(target=lambda n=n: got.update({n: doubled(memory, n)})) for n in (3, 4, 5)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    for n in (3, 4, 5):
        np.testing.assert_array_equal(got[n], 2 * np.arange(n))
    assert len(set(shelf.asked)) == len(shelf.open) == 3


def test_closing_tells_a_server_that_is_away_once(shelf: Shelf, memory: SharedMemory) -> None:
    doubled(memory)
    shelf.away = True
    memory.close()
    assert not left(shelf)


def test_a_region_that_cannot_be_had(
    shelf: Shelf, memory: SharedMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    before = set(N_LEFT.glob(f"ztune_{os.getpid()}_*"))
    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(CallError, match=r"no shared memory of \d+ bytes \(No space left") as caught:
        doubled(memory)
    assert caught.value.kind == "refused"
    shelf.away = True
    monkeypatch.undo()
    with pytest.raises(CallError, match="nobody"):
        doubled(memory)
    assert set(N_LEFT.glob(f"ztune_{os.getpid()}_*")) <= before
