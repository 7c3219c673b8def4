"""A bundle on real servers against the same bundle here: encoders, losses, images."""

import shutil
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
from runtimes.remote.connect import CheckedService, connect
from runtimes.remote.endpoint import Connection
from runtimes.remote.served import ServerPromptEncoder, ServerRuntime, ServerScorer
from runtimes.tokenizer import Tokenizer
from tests.conftest import DIGITS, MINI
from tests.servers.mlserver import MlServer, mlserver_environment
from tests.servers.triton import TritonServer, triton_environment
from ztune import capabilities
from ztune.errors import ConfigError, ServerError
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
        ("kept", bundle, Serving("python", threads=1, access="losses"), ("score",)),
        ("int8", small, Serving("python", threads=1), ("image", "client")),
    ):
        export_triton(source, folder / name, name, serving)
        for part in parts:
            shutil.move(folder / name / f"{name}_{part}", repository)
    _make_as_before(repository / "kept_score" / "config.pbtxt")
    with TritonServer(repository, args=["--model-load-thread-count=4"]) as server:
        yield server


def _make_as_before(config: Path) -> None:
    """Give a score model the inputs that it had when servers kept images, all of them optional."""
    kept = """input {
  name: "kept"
  data_type: TYPE_UINT8
  dims: 32
}
input {
  name: "rows"
  data_type: TYPE_INT64
  dims: -1
}
"""
    text = config.read_text().replace("output {", f"{kept}output {{", 1)
    config.write_text(text.replace("input {", "input {\n  optional: true"))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def connected(bundle: Bundle, cache: Path) -> Iterator[Any]:
    """Connect to servers; what is left open when the test ends is closed."""
    opened: list[CheckedService] = []

    def connecting(url: str, client: Path | None = MINI, **settings: Any) -> ServerRuntime:
        chosen: dict[str, Any] = {"deadline": 20.0, "give_up": 20.0}
        made = connect(
            url,
            Connection(**chosen | settings),
            client,
            lambda line: None,
            lambda done, total: None,
        )
        opened.append(made)
        return ServerRuntime(made.service, made.bundle)

    yield connecting
    for one in opened:
        one.service.close()


def contexts(bundle: Bundle, n: int = N_CANDIDATES, m: int = N_CONTEXT, seed: int = 0) -> F32:
    values = np.random.default_rng(seed).normal(size=(n, m, bundle.text.width))
    return values.astype(np.float32)


def encoder(
    served: ServerRuntime, losses: str = "auto", n: int = N_CANDIDATES, m: int = N_CONTEXT
) -> ServerPromptEncoder:
    chosen = ServerRuntime(served.service, served.bundle, losses=losses)
    return chosen.prompts(Tokenizer(served.bundle)).encoder(WORDS, m, n)


def local_encoder(bundle: Bundle, n: int = N_CANDIDATES, m: int = N_CONTEXT) -> Any:
    return OrtPromptGraph(bundle, Tokenizer(bundle), Execution(threads=1)).encoder(WORDS, m, n)


def in_requests_of(encoder: ServerPromptEncoder, n: int) -> ServerPromptEncoder:
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
    triton: TritonServer, connected: Any, bundle: Bundle, n: int
) -> None:
    given = contexts(bundle)
    served = connected(f"triton://{triton.grpc}/all")
    own = encoder(served)
    assert own.plan.n_candidates == N_CANDIDATES
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
    with pytest.raises(ServerError, match="offers losses, but no text features"):
        encoder(served).encode(contexts(bundle))
    with pytest.raises(ConfigError, match="the server offers none"):
        ServerRuntime(served.service, bundle, losses="here")


def test_what_a_server_gives(triton: TritonServer, connected: Any) -> None:
    text = {capabilities.LOSS, capabilities.CONTEXTS}
    for name, given in (
        ("all", {*text, capabilities.LOGITS, capabilities.TEXTS, capabilities.FEATURES}),
        ("logits", {*text, capabilities.LOGITS, capabilities.TEXTS}),
        ("losses", text),
    ):
        served = connected(f"triton://{triton.grpc}/{name}")
        assert served.capabilities == given
        assert served.missing == capabilities.EVERYTHING - given
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


def check_scores(
    served: ServerRuntime, bundle: Bundle, *, logits: bool, cut: int | None = None
) -> None:
    features, labels = images(bundle)
    own = encoder(served, "server")
    if cut:
        in_requests_of(own, cut)
    scores = ServerScorer(own, features, labels, logits=logits)
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
def test_losses_and_logits_are_those_of_the_host(
    triton: TritonServer, connected: Any, bundle: Bundle, name: str
) -> None:
    served = connected(f"triton://{triton.grpc}/{name}")
    check_scores(served, bundle, logits=True)
    check_scores(served, bundle, logits=False, cut=2)


def test_losses_alone_are_those_of_the_host(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    check_scores(connected(f"triton://{triton.grpc}/losses"), bundle, logits=False)
    check_scores(connected(f"http://{triton.http}/losses"), bundle, logits=False, cut=2)


def test_a_model_that_could_keep_images_is_sent_them(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    served = connected(f"triton://{triton.grpc}/kept")
    assert {"kept", "rows"} < set(served.service.offers["score"].inputs)
    check_scores(served, bundle, logits=False)


def test_the_plan_says_how_many_bytes_a_request_has(
    triton: TritonServer, connected: Any, bundle: Bundle
) -> None:
    features, labels = images(bundle)
    served = connected(f"triton://{triton.grpc}/losses")
    own = encoder(served, "server")
    before = own.plan.n_bytes
    scorer = served.scorer(own, features, labels, logits=False)
    assert own.plan.n_bytes == before + N_IMAGES * (4 * bundle.embed_dim + 8)
    assert f", {own.plan.n_bytes / 1e6:.3g} MB each; losses computed by" in own.plan.describe()
    sent = served.service.payload_bytes[0]
    scorer(Prompts(contexts(bundle)), batches()[0], labels)
    assert served.service.payload_bytes[0] - sent == own.plan.n_bytes
    # Of a smaller set, validation images, the plan says no less.
    served.scorer(own, features[:, :2], labels[:2], logits=False)
    assert own.plan.n_bytes == before + N_IMAGES * (4 * bundle.embed_dim + 8)


@pytest.mark.parametrize(
    ("name", "ways"),
    [
        ("all", "use `losses=here` or fewer images or a larger `max_request` if"),
        ("losses", "use fewer images or a larger `max_request` if"),
    ],
)
def test_a_request_above_the_limit_is_refused_before_it_is_sent(
    triton: TritonServer, connected: Any, bundle: Bundle, name: str, ways: str
) -> None:
    n = 2000
    features = np.zeros((1, n, bundle.embed_dim), np.float32)
    labels = np.zeros(n, np.int64)
    served = connected(f"triton://{triton.grpc}/{name}", max_request=1)
    before = served.service.requests
    words = rf"6 candidates and 2000 images takes 1\.\d+ MB, more than `max_request` 1 \({ways}"
    with pytest.raises(ConfigError, match=words):
        served.scorer(encoder(served, "server"), features, labels, logits=False)
    assert served.service.requests == before
    served = connected(f"triton://{triton.grpc}/{name}", max_request=2)
    assert served.scorer(encoder(served, "server"), features, labels, logits=False)


def test_all_kinds_of_requests_have_the_limit(triton: TritonServer, connected: Any) -> None:
    pixels = connected(f"triton://{triton.grpc}/all", max_request=0.05)
    words = (
        r"8 image\(s\) takes 0\.0553 MB, more than `max_request` 0\.05 \(use `images=local` or a"
    )
    with pytest.raises(ConfigError, match=words):
        pixels.images()
    assert connected(f"triton://{triton.grpc}/all", max_request=0.06).images()
    # Text features come from the logits of unit vectors, as many as a feature has values.
    vectors = connected(f"triton://{triton.grpc}/logits", max_request=0.02)
    words = r"6 candidates and 128 unit vectors takes 0\.07\d+ MB, more than `max_request` 0\.02 \("
    with pytest.raises(ConfigError, match=words):
        encoder(vectors)
    assert vectors.service.payload_bytes[0] < 20_000


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
        chosen = ServerRuntime(served.service, bundle, losses=losses)
        own = chosen.prompts(Tokenizer(bundle)).encoder(WORDS, N_CONTEXT, N_CANDIDATES)
        scorer = chosen.scorer(own, features, labels, logits=logits)
        assert (scorer is not None) == by_server, (name, losses, logits)


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
