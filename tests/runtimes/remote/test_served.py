"""A bundle on real servers against the same bundle here: encoders, losses, images, regions."""

import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export.quantize import quantize_bundle
from export.served import prompt_graph, score_graph
from export.triton import Serving, export_triton
from export.weights import write_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtImageEncoder, OrtPromptGraph
from runtimes.providers import Execution
from runtimes.remote.connect import Connected, connect
from runtimes.remote.endpoint import Connection
from runtimes.remote.served import Served, ServedPromptEncoder, ServedScores
from runtimes.remote.service import Service
from runtimes.remote.transport import CallError
from runtimes.tokenizer import Tokenizer
from tests.conftest import DIGITS, MINI
from tests.servers.mlserver import MlServer, mlserver_environment
from tests.servers.triton import SHARED_MEMORY, TritonServer, triton_environment
from ztune import access
from ztune.errors import AwayError, ConfigError, ServerError
from ztune.objective import NumpyScores
from ztune.types import F32, I64, Batch, Prompts

pytest.importorskip("tritonclient.grpc")

WORDS = ("zero", "one", "small two", "three", "a very large drawn four", "five")
N_CONTEXT, N_CANDIDATES, N_VIEWS, N_IMAGES = 4, 6, 2, 10


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(MINI)


@pytest.fixture(scope="module")
def triton(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """One server with all that a bundle can be served as, by names of their own."""
    triton_environment()
    folder = tmp_path_factory.mktemp("served")
    small = quantize_bundle(bundle, folder / "quantized", "int8")
    repository = folder / "repository"
    repository.mkdir()
    # Each model is a process that takes its time to start, so there is none that no test asks.
    for name, source, serving, parts in (
        ("all", bundle, Serving("python", threads=1), ("image", "prompt", "score", "client")),
        ("logits", bundle, Serving("python", threads=1, access="logits"), ("score",)),
        ("losses", bundle, Serving("python", threads=1, access="losses"), ("score",)),
        ("sent", bundle, Serving("python", threads=1, access="losses", instances=2), ("score",)),
        ("int8", small, Serving("python", threads=1), ("image", "client")),
    ):
        export_triton(source, folder / name, name, serving)
        for part in parts:
            shutil.move(folder / name / f"{name}_{part}", repository)
    with TritonServer(repository, args=["--model-load-thread-count=4"]) as server:
        yield server


@pytest.fixture(scope="module")
def twin(triton: TritonServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    """A second server with some of the first one's models."""
    repository = tmp_path_factory.mktemp("twin")
    for model in triton.repository.iterdir():
        if model.name.startswith(("all", "losses")):
            shutil.copytree(model, repository / model.name)
    with TritonServer(repository, args=["--model-load-thread-count=4"]) as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def connected(bundle: Bundle, cache: Path) -> Iterator[Any]:
    """Connect to servers; what is left open when the test ends is closed."""
    opened: list[Connected] = []
    before = regions()

    def connecting(url: str, *others: str, client: Path | None = MINI, **settings: Any) -> Served:
        chosen: dict[str, Any] = {"shared_memory": "off", "deadline": 20.0, "give_up": 20.0}
        made = connect(
            url,
            others,
            Connection(**chosen | settings),
            client,
            lambda line: None,
            lambda done, total: None,
        )
        opened.append(made)
        return Served(made.service, made.bundle)

    yield connecting
    for one in opened:
        one.service.close()
    assert regions() == before


def regions() -> set[str]:
    return {path.name for path in SHARED_MEMORY.glob(f"ztune_{os.getpid()}_*")}


def contexts(bundle: Bundle, n: int = N_CANDIDATES, m: int = N_CONTEXT, seed: int = 0) -> F32:
    values = np.random.default_rng(seed).normal(size=(n, m, bundle.text.width))
    return values.astype(np.float32)


def encoder(
    served: Served, losses: str = "auto", n: int = N_CANDIDATES, m: int = N_CONTEXT
) -> ServedPromptEncoder:
    chosen = Served(served.service, served.bundle, losses=losses)
    return chosen.prompts(Tokenizer(served.bundle)).encoder(WORDS, m, n)


def local_encoder(bundle: Bundle, n: int = N_CANDIDATES, m: int = N_CONTEXT) -> Any:
    return OrtPromptGraph(bundle, Tokenizer(bundle), Execution(threads=1)).encoder(WORDS, m, n)


def in_requests_of(encoder: ServedPromptEncoder, n: int) -> ServedPromptEncoder:
    encoder.plan = replace(encoder.plan, n_candidates=n)
    return encoder


# -- encoders --------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", [1, 4, 9])
def test_features_are_the_bits_of_a_local_run(
    triton: TritonServer, connected: Any, bundle: Bundle, m: int
) -> None:
    given = contexts(bundle, m=m)
    expected = local_encoder(bundle, m=m).encode(given)
    for url in (f"triton://{triton.grpc}/all", f"http://{triton.http}/all"):
        served = connected(url)
        got = encoder(served, m=m).encode(given)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.float32
        assert got.flags.c_contiguous
    # so that another class or candidate in its place would be seen
    assert len(np.unique(expected[..., 0])) == expected[..., 0].size


@pytest.mark.parametrize("n", [1, 2, 4])
def test_a_round_in_several_requests_has_the_bits_of_the_whole(
    triton: TritonServer, twin: TritonServer, connected: Any, bundle: Bundle, n: int
) -> None:
    given = contexts(bundle)
    served = connected(f"triton://{triton.grpc}/all", f"triton://{twin.grpc}")
    own = encoder(served)
    assert (own.plan.n_servers, own.plan.n_candidates) == (2, 4)
    before = served.service.requests
    got = in_requests_of(own, n).encode(given)
    assert served.service.requests - before == -(-N_CANDIDATES // n)
    # As a local run cuts it: products of other sizes may sum in another order.
    local = local_encoder(bundle)
    parts = [local_encoder(bundle, n=n).encode(given[i : i + n]) for i in range(0, 6, n)]
    np.testing.assert_array_equal(got, np.concatenate(parts))
    np.testing.assert_allclose(got, local.encode(given), atol=1e-6)


def test_templates_are_encoded_as_here(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    served, tokenizer = connected(f"triton://{triton.grpc}/all"), Tokenizer(bundle)
    for template in ("a photo of the digit {}.", "{}"):
        got = served.prompts(tokenizer).encode_template(template, WORDS)
        local = OrtPromptGraph(bundle, tokenizer, Execution(threads=1))
        np.testing.assert_allclose(got, local.encode_template(template, WORDS), atol=1e-6)


def test_logits_of_unit_vectors_are_the_features(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    served = connected(f"triton://{triton.grpc}/logits")
    given = contexts(bundle)
    expected = local_encoder(bundle).encode(given)
    np.testing.assert_allclose(encoder(served).encode(given), expected, atol=1e-6)
    np.testing.assert_allclose(
        in_requests_of(encoder(served), 2).encode(given), expected, atol=1e-6
    )


def test_losses_alone_give_no_features(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    served = connected(f"triton://{triton.grpc}/losses")
    with pytest.raises(ServerError, match="gives no text features, losses alone"):
        encoder(served).encode(contexts(bundle))
    with pytest.raises(ConfigError, match="the server gives no text features"):
        Served(served.service, bundle, losses="here")


def test_what_a_server_gives(triton: TritonServer, connected: Any) -> None:
    text = {access.LOSS, access.CONTEXTS}
    for name, given in (
        ("all", {*text, access.LOGITS, access.TEXTS, access.FEATURES}),
        ("logits", {*text, access.LOGITS, access.TEXTS}),
        ("losses", text),
        ("sent", text),
    ):
        served = connected(f"triton://{triton.grpc}/{name}")
        assert served.access == given
        assert served.missing == access.EVERYTHING - given
    assert encoder(connected(f"triton://{triton.grpc}/all"), "server").plan.image_features == (
        "kept by the server"
    )
    assert encoder(served).plan.image_features == "sent with every request"
    with pytest.raises(ServerError, match="offers no image features"):
        served.images()


# -- losses ----------------------------------------------------------------------------------------


def images(bundle: Bundle) -> tuple[F32, I64]:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(N_VIEWS, N_IMAGES, bundle.embed_dim))
    labels = np.arange(N_IMAGES, dtype=np.int64) % len(WORDS)
    # Some images are near their class, so that some are right.
    near = local_encoder(bundle).encode(contexts(bundle, seed=2))[0][labels]
    features[:, ::2] = near[::2] + 0.03 * features[:, ::2]
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return features.astype(np.float32), labels


def batches() -> list[Batch]:
    """Return the views and rows of some steps: other views, an order of its own, a single one."""
    return [
        Batch(np.arange(N_IMAGES), np.zeros(N_IMAGES, np.int64), 1),
        Batch(np.array([7, 2, 2, 9, 0]), np.array([1, 0, 1, 1, 0]), 2),
        Batch(np.array([3]), np.array([1]), 3),
    ]


def check_scores(served: Served, bundle: Bundle, *, logits: bool, cut: int | None = None) -> None:
    features, labels = images(bundle)
    own = encoder(served, "server")
    if cut:
        in_requests_of(own, cut)
    scores = ServedScores(own, features, labels, logits=logits)
    host = NumpyScores(local_encoder(bundle), features, bundle.logit_scale, bundle.logit_bias)
    given, right = Prompts(contexts(bundle)), 0.0
    for batch in batches():
        known = labels[batch.images]
        got, expected = scores(given, batch, known), host(given, batch, known)
        # A rounding of logits up to 21 in 32 bits is 2e-6.
        np.testing.assert_allclose(got.losses, expected.losses, atol=3e-6, rtol=0)
        np.testing.assert_array_equal(got.accuracies, expected.accuracies)
        assert got.losses.dtype == got.accuracies.dtype == np.float64
        assert (got.logits is not None) == logits
        if got.logits is not None:
            assert expected.logits is not None
            np.testing.assert_allclose(got.logits, expected.logits, atol=1e-5)
        right += got.accuracies.mean()
    assert 0.1 < right < 2.9
    assert np.ptp(expected.losses) > 1e-3


@pytest.mark.parametrize("name", ["all", "logits"])
def test_losses_and_logits_of_kept_images_are_those_of_the_host(
    triton: TritonServer, connected: Any, bundle: Bundle, name: str
) -> None:
    served = connected(f"triton://{triton.grpc}/{name}")
    check_scores(served, bundle, logits=True)
    check_scores(served, bundle, logits=False, cut=2)


def test_losses_alone_are_those_of_the_host(
    triton: TritonServer, twin: TritonServer, connected: Any, bundle: Bundle
) -> None:
    for name in ("losses", "sent"):
        check_scores(connected(f"triton://{triton.grpc}/{name}"), bundle, logits=False)
    check_scores(connected(f"http://{triton.http}/sent"), bundle, logits=False, cut=2)
    both = connected(f"http://{triton.http}/losses", f"http://{twin.http}")
    check_scores(both, bundle, logits=False, cut=2)


def test_kept_images_cross_the_wire_once(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    features, labels = images(bundle)
    sent = {}
    for name in ("losses", "sent"):
        served = connected(f"triton://{triton.grpc}/{name}")
        scores = ServedScores(encoder(served, "server"), features, labels, logits=False)
        batch = Batch(np.arange(N_IMAGES), np.zeros(N_IMAGES, np.int64), 1)
        scores(Prompts(contexts(bundle)), batch, labels)
        before = served.service.payload_bytes[0]
        scores(Prompts(contexts(bundle)), batch, labels)
        sent[name] = served.service.payload_bytes[0] - before
    size = N_IMAGES * (4 * bundle.embed_dim + 8)
    assert sent["sent"] - sent["losses"] == size - 32 - 8 * N_IMAGES


def test_who_computes_losses(triton: TritonServer, connected: Any, bundle: Bundle) -> None:
    features, labels = images(bundle)
    for name, losses, logits, by_server in (
        ("all", "auto", False, False),  # so few that the bits of a local run are worth them
        ("all", "server", False, True),
        ("all", "server", True, True),
        ("all", "here", False, False),
        ("logits", "auto", True, True),
        ("losses", "auto", False, True),
        ("losses", "auto", True, False),
    ):
        served = connected(f"triton://{triton.grpc}/{name}")
        chosen = Served(served.service, bundle, losses=losses)
        own = chosen.prompts(Tokenizer(bundle)).encoder(WORDS, N_CONTEXT, N_CANDIDATES)
        scorer = chosen.scorer(own, features, labels, logits=logits)
        assert (scorer is not None) == by_server, (name, losses, logits)


# -- shared memory ---------------------------------------------------------------------------------


@pytest.mark.parametrize("protocol", ["triton", "http"])
def test_shared_memory_changes_no_byte(
    triton: TritonServer, connected: Any, bundle: Bundle, protocol: str
) -> None:
    address = triton.grpc if protocol == "triton" else triton.http
    given, (features, labels) = contexts(bundle), images(bundle)
    found = {}
    before = regions()
    for way in ("off", "on", "auto"):
        served = connected(f"{protocol}://{address}/all", shared_memory=way)
        own = in_requests_of(encoder(served, "server"), 2)
        scores = ServedScores(own, features, labels, logits=True)
        seen: list[np.ndarray[Any, Any]] = [own.encode(given)]
        for batch in batches():
            answer = scores(Prompts(given), batch, labels[batch.images])
            assert answer.logits is not None
            seen += [answer.losses, answer.accuracies, answer.logits]
        seen.append(served.images().encode(np.zeros((3, 24, 24, 3), np.uint8)))
        if way == "on":
            assert served.service.shares_memory
            assert regions() > before
        elif way == "off":
            assert regions() == before
        found[way] = [value.tobytes() for value in seen]
        served.service.close()
        assert regions() == before
    assert found["off"] == found["on"] == found["auto"]
    assert status(triton) == {}


def status(server: TritonServer) -> dict[str, Any]:
    """Return the regions that a server has open."""
    import tritonclient.http as client

    asked = client.InferenceServerClient(server.http)
    found = asked.get_system_shared_memory_status()
    asked.close()
    return {region["name"]: region for region in found}


def forget(server: TritonServer) -> None:
    import tritonclient.http as client

    asked = client.InferenceServerClient(server.http)
    asked.unregister_system_shared_memory()
    asked.close()


def test_regions_go_after_a_failed_request(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    before = regions()
    served = connected(f"triton://{triton.grpc}/all", shared_memory="on")
    own = in_requests_of(encoder(served), 2)
    expected = own.encode(contexts(bundle))
    assert len(regions() - before) > 1
    tokens = own.tokens
    own.tokens = tokens + 10_000  # no such ids
    with pytest.raises(ServerError, match="out of data bounds"):
        own.encode(contexts(bundle))
    own.tokens = tokens
    np.testing.assert_array_equal(own.encode(contexts(bundle)), expected)
    served.service.close()
    assert regions() == before
    # The server has said that it is done with them, and keeps none open.
    assert status(triton) == {}


@pytest.mark.parametrize("protocol", ["triton", "http"])
def test_a_server_that_knows_our_regions_no_longer(
    triton: TritonServer, connected: Any, bundle: Bundle, protocol: str
) -> None:
    features, labels = images(bundle)
    address = triton.grpc if protocol == "triton" else triton.http
    served = connected(f"{protocol}://{address}/all", shared_memory="on")
    own = in_requests_of(encoder(served, "server"), 2)
    scores = ServedScores(own, features, labels, logits=False)
    batch = batches()[1]
    expected = scores(Prompts(contexts(bundle)), batch, labels[batch.images])
    assert len(status(triton)) > 1
    forget(triton)  # as one does that was started anew while nothing was on its way
    got = scores(Prompts(contexts(bundle)), batch, labels[batch.images])
    np.testing.assert_array_equal(got.losses, expected.losses)
    assert status(triton)


def test_a_deadline_within_a_request_leaves_no_region(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    before = regions()
    served = connected(f"triton://{triton.grpc}/all", shared_memory="on")
    own = encoder(served)
    expected = own.encode(contexts(bundle))
    service: Service = served.service
    patient, service.connection = service.connection, Connection(deadline=0.002, give_up=0.01)
    large = np.repeat(contexts(bundle), 40, axis=0)
    with pytest.raises(AwayError, match="no answer for"):
        in_requests_of(own, 240).encode(large)
    assert regions() == before
    service.connection = patient
    # What the server may still write goes where nobody reads.
    for _ in range(5):
        np.testing.assert_array_equal(in_requests_of(own, 6).encode(contexts(bundle)), expected)


def test_closing_while_regions_are_in_use(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    before = regions()
    served = connected(f"triton://{triton.grpc}/all", shared_memory="on")
    own = in_requests_of(encoder(served), 2)
    own.encode(contexts(bundle))
    errors: list[BaseException] = []
    begun = threading.Event()
    served.service.sending = lambda part, n: begun.set()

    def ask() -> None:
        try:
            while True:
                own.encode(contexts(bundle, 40))
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    assert begun.wait(30)
    time.sleep(0.05)
    served.service.close()
    thread.join(30)
    assert [type(error) for error in errors] == [AwayError]
    assert regions() == before


# -- images --------------------------------------------------------------------------------------


def digits() -> Sequence[Path]:
    return sorted((DIGITS / "seven").glob("*.png"))[:11]


def test_images_are_encoded_as_here(triton: TritonServer, connected: Any, bundle: Bundle) -> None:
    served = connected(f"triton://{triton.grpc}/all")
    tower, local = served.images(), OrtImageEncoder(bundle, Execution(threads=1))
    pixels = np.stack([tower.read(path, None) for path in digits()])
    np.testing.assert_array_equal(pixels, np.stack([local.read(p, None) for p in digits()]))
    before = served.service.requests
    got = tower.encode(pixels)
    assert served.service.requests - before == 2  # of eight, and of what is left
    np.testing.assert_allclose(got, local.encode(pixels), atol=1e-6)
    assert np.abs(got[0] - got[1]).max() > 1e-4
    assert tower.identity != local.identity


def test_int8_images_have_no_company(triton: TritonServer, connected: Any, bundle: Bundle) -> None:
    served = connected(f"triton://{triton.grpc}/int8", client=None)
    assert served.bundle.precision == "int8"
    tower = served.images()
    pixels = np.stack([tower.read(path, None) for path in digits()[:3]])
    before = served.service.requests
    got = tower.encode(pixels)
    assert served.service.requests - before == 3
    alone = np.concatenate([tower.encode(pixels[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(got, alone)
    quantized = load_bundle(triton.repository.parent / "quantized")
    local = OrtImageEncoder(quantized, Execution(threads=1))
    expected = np.concatenate([local.encode(pixels[i : i + 1]) for i in range(3)])
    np.testing.assert_array_equal(got, expected)


# -- another server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mlserver(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlServer]:
    mlserver_environment()
    folder = tmp_path_factory.mktemp("mlserver")
    for part, graph in (
        ("prompt", prompt_graph(bundle)),
        ("score", score_graph(bundle, logits=True)),
    ):
        (folder / f"mini_{part}").mkdir()
        write_graph(graph, folder / f"mini_{part}" / "model.onnx")
    with MlServer(folder) as server:
        yield server


@pytest.mark.parametrize("protocol", ["triton", "http"])
def test_a_server_of_another_make(
    mlserver: MlServer, connected: Any, bundle: Bundle, protocol: str
) -> None:
    address = mlserver.grpc if protocol == "triton" else mlserver.http
    served = connected(f"{protocol}://{address}/mini")
    given = contexts(bundle)
    np.testing.assert_array_equal(
        encoder(served).encode(given), local_encoder(bundle).encode(given)
    )
    check_scores(served, bundle, logits=True)
    assert encoder(served, "server").plan.image_features == "sent with every request"
    assert not served.service.shares_memory


def test_shared_memory_that_a_server_does_not_offer(mlserver: MlServer, connected: Any) -> None:
    with pytest.raises(ServerError, match="does not offer system_shared_memory"):
        connected(f"triton://{mlserver.grpc}/mini", shared_memory="on")
    assert not connected(
        f"triton://{mlserver.grpc}/mini", shared_memory="auto"
    ).service.shares_memory


def test_a_region_that_a_server_cannot_open(triton: TritonServer, connected: Any) -> None:
    served = connected(f"triton://{triton.grpc}/all")
    (server,) = served.service._servers
    with pytest.raises(CallError) as caught:
        server.transport.share("nowhere", "/ztune_nowhere", 100, 5)
    assert not caught.value.passing or caught.value.kind == "broken"
