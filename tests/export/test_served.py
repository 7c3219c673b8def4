"""The graphs of a server against the local path: the same features, losses and bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import ModelProto

from export.client import read_client_file
from export.quantize import quantize_bundle
from export.served import client_graph, image_graph, prompt_graph, score_graph, text_graph
from runtimes.bundle import Bundle, load_bundle
from runtimes.ort import OrtPromptGraph, parity_inputs
from runtimes.prompts import name_tokens, token_table
from runtimes.providers import Execution
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from tests.export.conftest import Exported
from ztune.objective import NumpyScores
from ztune.types import F32, I64, Batch, Prompts

# A sequence tower without a first token, and one that reads a class token at the end.
SEQUENCES = ("ViT-B-16-SigLIP", "coca_ViT-B-32")
WORDS = ("cat", "traffic light", "red panda", "dog", "house", "sea of light", "red", "photo", "a")
# class names, context tokens (0: the longest that fits), candidates
SHAPES = [(1, 1, 1), (1, 4, 3), (2, 8, 1), (3, 0, 2), (9, 4, 5), (9, 0, 1)]


@pytest.fixture(scope="module", params=["mini", "mini int8", *SEQUENCES])
def bundle(
    request: pytest.FixtureRequest,
    small: Callable[[str], Exported],
    tmp_path_factory: pytest.TempPathFactory,
) -> Bundle:
    if request.param == "mini":
        return load_bundle(MINI)
    if request.param == "mini int8":
        folder = tmp_path_factory.mktemp("served")
        return quantize_bundle(load_bundle(MINI), folder / "int8", "int8")
    return small(request.param)[1]


@pytest.fixture(scope="module", params=["mini", "sequence"])
def tower(request: pytest.FixtureRequest, small: Callable[[str], Exported]) -> Bundle:
    """Return a bundle of either kind of prompt graph."""
    return load_bundle(MINI) if request.param == "mini" else small(SEQUENCES[0])[1]


def session(model: ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )


def served_tokens(bundle: Bundle, names: Sequence[str], n_context: int) -> I64:
    """Return what a client sends for class names: their ids with what closes them, then -1."""
    spec = bundle.text
    ids = name_tokens(spec, Tokenizer(bundle), names, n_context)
    rows = [(*row, *spec.suffix_ids) for row in ids]
    tokens = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for target, row in zip(tokens, rows, strict=True):
        target[: len(row)] = row
    return tokens


def context_that_fits(bundle: Bundle, names: Sequence[str]) -> int:
    longest = served_tokens(bundle, names, 1).shape[1]
    return bundle.text.context_length - len(bundle.text.prefix_ids) - longest


def random_contexts(bundle: Bundle, n: int, n_context: int) -> F32:
    rng = np.random.default_rng(n_context)
    table = token_table(bundle)
    values = rng.normal(size=(n, n_context, bundle.text.width)) * 2 * table.std()
    return values.astype(np.float32)


def unit_features(bundle: Bundle, n: int) -> F32:
    values = np.random.default_rng(n).normal(size=(n, bundle.embed_dim))
    return (values / np.linalg.norm(values, axis=-1, keepdims=True)).astype(np.float32)


def digest_of(bundle: Bundle) -> list[int]:
    return list(bytes.fromhex(bundle.digest))


def test_prompt_features_are_those_of_the_local_path(bundle: Bundle) -> None:
    graph = session(prompt_graph(bundle))
    local = OrtPromptGraph(bundle, Tokenizer(bundle), Execution())
    for n_classes, n_context, n_candidates in SHAPES:
        names = WORDS[:n_classes]
        m = n_context or context_that_fits(bundle, names)
        contexts = random_contexts(bundle, n_candidates, m)
        expected = local.encoder(names, m, n_candidates).encode(contexts)
        feeds = {"contexts": contexts, "tokens": served_tokens(bundle, names, m)}
        features, digest = graph.run(["features", "digest"], feeds)
        assert features.shape == (n_candidates, n_classes, bundle.embed_dim)
        assert features.dtype == np.float32
        np.testing.assert_allclose(features, expected, atol=2e-6)
        assert digest.tolist() == digest_of(bundle)
        # so that the comparison would notice another class, another candidate, another context
        if n_classes > 1:
            assert np.abs(expected[:, 0] - expected[:, 1]).max() > 1e-3
        if n_candidates > 1:
            assert np.abs(expected[0] - expected[1]).max() > 1e-4


def test_scores_are_those_of_the_host(bundle: Bundle) -> None:
    names, m, n_candidates, n_images = WORDS[:7], 4, 3, 11
    local = OrtPromptGraph(bundle, Tokenizer(bundle), Execution())
    encoder = local.encoder(names, m, n_candidates)
    contexts = random_contexts(bundle, n_candidates, m)
    features = unit_features(bundle, n_images)
    # Some images near a class, so that some are right.
    features[:4] = encoder.encode(contexts)[0, :4]
    labels = np.arange(n_images, dtype=np.int64) % len(names)
    host = NumpyScores(encoder, features[None], bundle.logit_scale, bundle.logit_bias)
    batch = Batch(np.arange(n_images), np.zeros(n_images, dtype=np.int64), 1)
    expected = host(Prompts(contexts), batch, labels)
    feeds = {
        "contexts": contexts,
        "tokens": served_tokens(bundle, names, m),
        "features": features,
        "labels": labels,
    }
    graph = session(score_graph(bundle, logits=True))
    wanted = ["losses", "correct", "logits", "digest"]
    losses, correct, logits, digest = graph.run(wanted, feeds)
    assert (losses.dtype, correct.dtype, logits.dtype) == (np.float64, np.int64, np.float32)
    np.testing.assert_allclose(losses, expected.losses, atol=1e-5)
    np.testing.assert_array_equal(correct, np.rint(expected.accuracies * n_images))
    assert expected.logits is not None
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4)
    assert digest.tolist() == digest_of(bundle)
    assert 0 < correct.sum() < n_candidates * n_images
    # The order of labels counts.
    moved, _ = graph.run(["losses", "correct"], {**feeds, "labels": np.roll(labels, 1)})
    assert np.abs(moved - losses).min() > 1e-3


def test_without_logits_there_is_no_such_output(tower: Bundle) -> None:
    names = [value.name for value in score_graph(tower, logits=False).graph.output]
    assert names == ["losses", "correct", "digest"]
    names = [value.name for value in score_graph(tower, logits=True).graph.output]
    assert names == ["losses", "correct", "logits", "digest"]


@pytest.mark.parametrize("name", ["image", "text"])
def test_towers_answer_as_they_did_and_sign_each_row(bundle: Bundle, name: str) -> None:
    (feeds, _) = parity_inputs(bundle.file("parity.safetensors"), name)
    graph = image_graph(bundle) if name == "image" else text_graph(bundle)
    (given,) = feeds
    plain = onnxruntime.InferenceSession(
        str(bundle.file(f"{name}.onnx")), providers=["CPUExecutionProvider"]
    )
    served = session(graph)
    for rows in (1, len(feeds[given])):
        part = {given: feeds[given][:rows]}
        features, digests = served.run(["features", "digest"], part)
        np.testing.assert_array_equal(features, plain.run(["features"], part)[0])
        assert digests.tolist() == [digest_of(bundle)] * rows


def test_the_client_half_in_slices(tower: Bundle) -> None:
    graph = session(client_graph(tower))
    files = [read_client_file(tower, name) for name in tower.client_files]
    whole = b"".join(files)

    def cut(start: int, length: int) -> bytes:
        part, sizes, digest = graph.run(
            ["bytes", "sizes", "digest"], {"slice": np.array([start, length], dtype=np.int64)}
        )
        assert sizes.tolist() == [len(content) for content in files]
        assert digest.tolist() == digest_of(tower)
        assert part.dtype == np.uint8
        return bytes(part.tobytes())

    n = len(whole)
    assert cut(0, 100) == whole[:100]
    assert cut(n - 7, 7) == whole[-7:]
    assert cut(n - 7, 100) == whole[-7:]
    assert cut(n, 100) == b""
    assert cut(n + 5, 100) == b""
    assert cut(5, 0) == b""
    assert cut(0, 2**62) == whole
    step = 100_000
    assert b"".join(cut(start, step) for start in range(0, n, step)) == whole


def test_what_is_too_long_is_refused_and_never_cut(tower: Bundle) -> None:
    graph = session(prompt_graph(tower))
    m = context_that_fits(tower, WORDS[:3])
    tokens = served_tokens(tower, WORDS[:3], m)
    graph.run(None, {"contexts": random_contexts(tower, 1, m), "tokens": tokens})
    for more in (1, 2, tower.text.context_length):
        feeds = {"contexts": random_contexts(tower, 1, m + more), "tokens": tokens}
        with pytest.raises(Exception, match="Non-zero status code"):
            graph.run(None, feeds)


@pytest.mark.parametrize("n_labels", [0, 1, 2, 4])
def test_another_number_of_labels_than_of_images_is_refused(tower: Bundle, n_labels: int) -> None:
    graph = session(score_graph(tower, logits=False))
    feeds = {
        "contexts": random_contexts(tower, 2, 2),
        "tokens": served_tokens(tower, WORDS[:2], 2),
        "features": unit_features(tower, 3),
        "labels": np.zeros(n_labels, dtype=np.int64),
    }
    with pytest.raises(Exception, match="Non-zero status code"):
        graph.run(None, feeds)
    graph.run(None, {**feeds, "labels": np.zeros(3, dtype=np.int64)})


def test_ids_beyond_the_table_are_refused(tower: Bundle) -> None:
    graph = session(prompt_graph(tower))
    rows = len(token_table(tower))
    contexts = random_contexts(tower, 1, 2)
    graph.run(None, {"contexts": contexts, "tokens": np.array([[rows - 1, rows - 1]])})
    with pytest.raises(Exception, match="out of data bounds"):
        graph.run(None, {"contexts": contexts, "tokens": np.array([[rows - 1, rows]])})


def valid_request(tower: Bundle) -> dict[str, Any]:
    return {
        "contexts": random_contexts(tower, 1, 4),
        "tokens": served_tokens(tower, ["dog", "traffic light"], 4),
        "features": unit_features(tower, 3),
        "labels": np.array([0, 1, 0]),
    }


@pytest.mark.parametrize("label", [-1, -2, -3, 2, 2**40, -(2**63)])
def test_a_label_that_no_class_has_is_refused(tower: Bundle, label: int) -> None:
    scoring, request = session(score_graph(tower, logits=True)), valid_request(tower)
    scoring.run(["losses"], request)
    request["labels"][1] = label
    with pytest.raises(Exception, match="Out of range value"):
        scoring.run(["losses"], request)


def negative_id(tokens: I64) -> None:
    tokens[0, 0] = -2


def negative_padding(tokens: I64) -> None:
    tokens[tokens == -1] = -7


def smallest(tokens: I64) -> None:
    tokens[1, 1] = -(2**63)


def gap(tokens: I64) -> None:
    tokens[1, 0] = -1


def no_ids(tokens: I64) -> None:
    tokens[0] = -1


@pytest.mark.parametrize("spoil", [negative_id, negative_padding, smallest, gap, no_ids])
def test_rows_that_are_not_ids_and_then_padding_are_refused(
    tower: Bundle, spoil: Callable[[I64], None]
) -> None:
    request = valid_request(tower)
    assert (request["tokens"] == -1).any()
    spoil(request["tokens"])
    with pytest.raises(Exception, match="out of data bounds"):
        session(score_graph(tower, logits=False)).run(["losses"], request)


@pytest.mark.parametrize("more", [0, 1, 50])
def test_padding_beyond_the_context_is_refused(tower: Bundle, more: int) -> None:
    request = valid_request(tower)
    n_ids = tower.text.context_length - len(tower.text.prefix_ids) - 4
    tokens = np.full((2, n_ids + more), -1)
    tokens[:, : request["tokens"].shape[1]] = request["tokens"]
    prompt = session(prompt_graph(tower))
    features = prompt.run(["features"], {k: request[k] for k in ("contexts", "tokens")})[0]
    given = {"contexts": request["contexts"], "tokens": tokens}
    if more:
        with pytest.raises(Exception, match="Non-zero status code"):
            prompt.run(["features"], given)
    else:
        np.testing.assert_allclose(prompt.run(["features"], given)[0], features, atol=1e-5)


def test_rows_without_columns_are_refused(tower: Bundle) -> None:
    given = {"contexts": random_contexts(tower, 1, 4), "tokens": np.zeros((2, 0), np.int64)}
    with pytest.raises(Exception, match="Non-zero status code"):
        session(prompt_graph(tower)).run(["features"], given)


@pytest.mark.parametrize("token", [-1, -2, -(2**63), 2**40])
def test_a_text_with_an_id_outside_the_table_is_refused(tower: Bundle, token: int) -> None:
    given, _ = parity_inputs(tower.file("parity.safetensors"), "text")
    text = session(text_graph(tower))
    text.run(["features"], given)
    given["tokens"][0, 1] = token
    with pytest.raises(Exception, match="out of data bounds"):
        text.run(["features"], given)


def test_losses_alone_give_the_differences_of_text_features_away() -> None:
    """What docs/serving.md says of access levels."""
    bundle = load_bundle(MINI)
    names = WORDS[:3]
    given = {
        "contexts": random_contexts(bundle, 1, 4),
        "tokens": served_tokens(bundle, names, 4),
    }
    (texts,) = session(prompt_graph(bundle)).run(["features"], given)
    scores = session(score_graph(bundle, logits=False))
    axes = np.eye(bundle.embed_dim, dtype=np.float32)
    losses = np.array(
        [
            [
                scores.run(["losses"], {**given, "features": axis[None], "labels": label})[0][0]
                for axis in axes
            ]
            for label in np.arange(len(names))[:, None]
        ]
    )
    found = -(losses - losses[0]) / bundle.logit_scale
    np.testing.assert_allclose(found, texts[0] - texts[0, 0], atol=1e-6)
    # The logits of the same images give them whole.
    feeds = {**given, "features": axes, "labels": np.zeros(len(axes), dtype=np.int64)}
    (logits,) = session(score_graph(bundle, logits=True)).run(["logits"], feeds)
    whole = (logits[0].T - bundle.logit_bias) / bundle.logit_scale
    np.testing.assert_allclose(whole, texts[0], atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_every_graph_is_one_that_old_servers_know(tmp_path: Path, precision: str) -> None:
    bundle = load_bundle(MINI)
    if precision != "fp32":
        bundle = quantize_bundle(bundle, tmp_path / precision, precision)
    for model in (
        image_graph(bundle),
        text_graph(bundle),
        prompt_graph(bundle),
        score_graph(bundle, logits=True),
        client_graph(bundle),
    ):
        onnx.checker.check_model(model, full_check=precision == "fp32")
        assert model.ir_version <= 10
        assert all(part.version <= 21 for part in model.opset_import if part.domain == "")
        assert "digest" in [value.name for value in model.graph.output]
        names = [weight.name for weight in model.graph.initializer]
        assert len(names) == len(set(names))
