"""A real Triton that serves the embedded bundle by the Python backend."""

import re
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from export.client import read_client_file
from export.triton import Serving, export_triton
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import parity_inputs
from runtimes.prompts import name_tokens
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI, ROOT
from tests.servers.triton import TritonServer, triton_environment
from ztune.types import I64

grpc = pytest.importorskip("tritonclient.grpc")

Arrays = dict[str, np.ndarray[Any, Any]]
WORDS = ("zero", "one", "small two", "three")
PARTS = ("image", "text", "prompt", "score", "client")
OPTIONS = (
    "--model-control-mode=none",
    "--strict-readiness=true",
    "--disable-auto-complete-config",
)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return load_bundle(MINI)


@pytest.fixture(scope="module")
def server(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    triton_environment()  # skips before anything is written
    repository = tmp_path_factory.mktemp("served") / "repository"
    export_triton(bundle, repository, "mini", Serving(backend="python", threads=1))
    with TritonServer(repository, args=OPTIONS) as running:
        yield running


@pytest.fixture
def client(server: TritonServer) -> Iterator[Any]:
    opened = grpc.InferenceServerClient(server.grpc)
    yield opened
    # Whatever a test asked for, the server and all its models live on.
    assert opened.is_server_live()
    assert opened.is_server_ready()
    for part in PARTS:
        assert opened.is_model_ready(f"mini_{part}")
    assert ask(opened, "client", {"slice": np.array([0, 1])}, ["bytes"])["bytes"] == b"{"[0]
    opened.close()


def ask(client: Any, part: str, feeds: Arrays, outputs: list[str] | None = None) -> Arrays:
    kinds = {"float32": "FP32", "int64": "INT64", "uint8": "UINT8", "float64": "FP64"}
    inputs = []
    for name, value in feeds.items():
        given = grpc.InferInput(name, list(value.shape), kinds[value.dtype.name])
        given.set_data_from_numpy(value)
        inputs.append(given)
    wanted = None if outputs is None else [grpc.InferRequestedOutput(name) for name in outputs]
    answer = client.infer(f"mini_{part}", inputs, outputs=wanted, client_timeout=30)
    return {one.name: answer.as_numpy(one.name) for one in answer.get_response().outputs}


def refused(
    client: Any, part: str, feeds: Arrays, *parts: str, status: str = "INVALID_ARGUMENT"
) -> None:
    with pytest.raises(grpc.InferenceServerException) as caught:
        ask(client, part, feeds)
    assert str(caught.value.status()) == f"StatusCode.{status}"
    for words in parts:
        assert words in str(caught.value)


def local(server: TritonServer, part: str, feeds: Arrays, outputs: list[str]) -> list[Any]:
    """Answer with the very graph that the server has."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    path = server.repository / f"mini_{part}" / "1" / "model.onnx"
    graph = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return list(graph.run(outputs, feeds))


def texts(bundle: Bundle, n_candidates: int = 3, n_context: int = 4) -> Arrays:
    spec = bundle.text
    ids = name_tokens(spec, Tokenizer(bundle), WORDS, n_context)
    rows = [(*row, *spec.suffix_ids) for row in ids]
    tokens = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    contexts = np.random.default_rng(n_context).normal(size=(n_candidates, n_context, spec.width))
    return {"contexts": contexts.astype(np.float32), "tokens": tokens}


def images(bundle: Bundle, n: int = 9, seed: int = 0) -> Arrays:
    features = np.random.default_rng(seed).normal(size=(n, bundle.embed_dim)).astype(np.float32)
    return {"features": features, "labels": np.arange(n, dtype=np.int64) % len(WORDS)}


def rows_of(*rows: int) -> I64:
    return np.array(rows, dtype=np.int64)


@pytest.mark.parametrize("part", ["image", "text"])
@pytest.mark.parametrize("n", [1, 3, 8])
def test_towers_answer_as_here(
    server: TritonServer, client: Any, bundle: Bundle, part: str, n: int
) -> None:
    ((name, value),) = parity_inputs(bundle.file("parity.safetensors"), part)[0].items()
    feeds = {name: np.resize(value, (n, *value.shape[1:]))}
    answer = ask(client, part, feeds)
    assert set(answer) == {"features", "digest"}
    (features,) = local(server, part, feeds, ["features"])
    np.testing.assert_array_equal(answer["features"], features)
    assert [bytes(row).hex() for row in answer["digest"]] == [bundle.digest] * n


def test_more_rows_than_a_batch_are_refused(client: Any, bundle: Bundle) -> None:
    size = bundle.image.size
    refused(
        client, "image", {"pixels": np.zeros((9, 3, size, size), dtype=np.float32)},
        "batch-size must be <= 8",
    )  # fmt: skip


@pytest.mark.parametrize("n_context", [1, 8])
def test_texts_answer_as_here(
    server: TritonServer, client: Any, bundle: Bundle, n_context: int
) -> None:
    feeds = texts(bundle, n_context=n_context)
    answer = ask(client, "prompt", feeds)
    (features,) = local(server, "prompt", feeds, ["features"])
    np.testing.assert_array_equal(answer["features"], features)
    assert answer["features"].shape == (3, len(WORDS), bundle.embed_dim)
    assert bytes(answer["digest"]).hex() == bundle.digest


def test_scores_answer_as_here(server: TritonServer, client: Any, bundle: Bundle) -> None:
    feeds = texts(bundle) | images(bundle)
    answer = ask(client, "score", feeds)
    wanted = ["losses", "correct", "logits"]
    assert set(answer) == {*wanted, "digest"}
    for name, expected in zip(wanted, local(server, "score", feeds, wanted), strict=True):
        assert answer[name].dtype == expected.dtype
        np.testing.assert_array_equal(answer[name], expected)
    assert bytes(answer["digest"]).hex() == bundle.digest
    # Outputs that were not requested are not sent.
    assert set(ask(client, "score", feeds, ["losses"])) == {"losses"}


def changed(feeds: Arrays, **values: Any) -> Arrays:
    """Return the feeds with other arrays; None leaves one out."""
    return {name: value for name, value in (feeds | values).items() if value is not None}


def test_malformed_inputs_are_errors(client: Any, bundle: Bundle) -> None:
    good = texts(bundle) | images(bundle)
    contexts, tokens, labels = good["contexts"], good["tokens"], good["labels"]
    for values, words in (
        ({"contexts": None}, "expected 4 inputs but got 3"),
        ({"features": None, "labels": None}, "expected 4 inputs but got 2"),
        ({"contexts": contexts[:, :, :-1].copy()}, "unexpected shape for input 'contexts'"),
        ({"contexts": contexts[0]}, "unexpected shape for input 'contexts'"),
        ({"contexts": contexts.astype(np.float64)}, "data-type is 'FP64'"),
        ({"contexts": np.zeros((1, 30, 64), dtype=np.float32)}, "Non-zero status code"),
        ({"tokens": tokens + 10_000}, "out of data bounds"),
        ({"tokens": np.full((1, 100), 5)}, "Non-zero status code"),
        ({"labels": labels + len(WORDS)}, "Non-zero status code"),
        ({"labels": labels[:1]}, "Non-zero status code"),
        ({"labels": labels[:0]}, "Non-zero status code"),
        ({"labels": labels[:, None]}, "unexpected shape for input 'labels'"),
        ({"other": labels}, "expected 4 inputs but got 5"),
    ):
        refused(client, "score", changed(good, **values), words)
    np.testing.assert_array_equal(
        ask(client, "score", good)["losses"], ask(client, "score", good)["losses"]
    )
    refused(client, "client", {"slice": rows_of(1)}, "unexpected shape for input 'slice'")
    refused(client, "text", {"tokens": np.zeros((1, 7), dtype=np.int64)}, "unexpected shape")


def test_an_error_is_one_line_of_bounded_length(client: Any, bundle: Bundle) -> None:
    feeds = changed(texts(bundle) | images(bundle), labels=rows_of(0))
    with pytest.raises(Exception, match="Non-zero status code") as caught:
        ask(client, "score", feeds)
    message = caught.value.message()  # type: ignore[attr-defined]
    assert "\n" not in message
    assert len(message) <= 500


def test_the_client_half_is_downloaded_in_slices(
    client: Any, bundle: Bundle, tmp_path: Path
) -> None:
    content, step = b"", 50_000
    while True:
        answer = ask(client, "client", {"slice": rows_of(len(content), step)})
        assert bytes(answer["digest"]).hex() == bundle.digest
        content += answer["bytes"].tobytes()
        if len(answer["bytes"]) < step:
            break
    sizes = answer["sizes"].tolist()
    assert sum(sizes) == len(content)
    for name, size in zip(bundle.client_files, sizes, strict=True):
        part, content = content[:size], content[size:]
        assert part == read_client_file(bundle, name), name
        (tmp_path / name).write_bytes(part)
    half = load_bundle(tmp_path)
    assert half.digest == bundle.digest
    assert half.is_client_half
    half.check_client_files()


def test_endpoints_are_closed_as_the_page_says(tmp_path: Path, bundle: Bundle) -> None:
    triton_environment()
    page = (ROOT / "docs" / "serving.md").read_text()
    (restricted,) = re.findall(r"--grpc-restricted-protocol=(\S+)=SECRET", page)
    repository = tmp_path / "repository"
    export_triton(bundle, repository, "mini", Serving(backend="python", access="losses"))
    options = [
        f"--grpc-restricted-protocol={restricted}=SECRET",
        f"--http-restricted-api={restricted}=SECRET",
    ]
    with TritonServer(repository, args=options) as server:
        client = grpc.InferenceServerClient(server.grpc)
        feeds = texts(bundle) | images(bundle)
        assert set(ask(client, "score", feeds)) == {"losses", "correct", "digest"}
        assert {m.name for m in client.get_model_metadata("mini_score").outputs} == {
            "losses", "correct", "digest",
        }  # fmt: skip
        for closed in (
            client.get_model_repository_index,
            lambda **given: client.get_model_config("mini_score", **given),
            client.get_inference_statistics,
            client.get_trace_settings,
            client.get_log_settings,
            client.get_system_shared_memory_status,
        ):
            with pytest.raises(Exception, match="This protocol is restricted"):
                closed()
            closed(headers={"triton-grpc-protocol-admin-key": "SECRET"})
        url = f"http://{server.http}/v2/models/mini_score/config"
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(url)
        assert caught.value.code == 403
        caught.value.close()
        with urllib.request.urlopen(f"http://{server.http}/v2/health/live") as answer:
            assert answer.status == 200
        client.close()


def test_the_page_names_options_that_the_server_has(server: TritonServer) -> None:
    command = [server._command()[0], "--help"]
    done = subprocess.run(command, env=server._environment(), capture_output=True, text=True)
    known = set(re.findall(r"^\s+(--[a-z0-9-]+)", done.stdout + done.stderr, re.MULTILINE))
    assert "--model-repository" in known
    page = (ROOT / "docs" / "serving.md").read_text()
    # The others are ztune's, docker's and pip's.
    words = r"--(?:grpc|http|model|strict|disable-auto|exit|metrics|allow)-[a-z-]+"
    named = set(re.findall(words, page)) - {"--http-max-input-size"}  # newer than the one here
    assert {"--grpc-use-ssl-mutual", "--strict-readiness"} <= named
    assert named <= known
