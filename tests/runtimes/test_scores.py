"""Compare scores computed by a graph with those computed on the host."""

from collections.abc import Iterator

import numpy as np
import pytest

from runtimes import providers
from runtimes.bundle import load_bundle
from runtimes.ort import OrtPromptEncoder, OrtPromptGraph
from runtimes.providers import Execution
from runtimes.scores import OrtScores
from runtimes.tokenizer import Tokenizer
from tests.conftest import MINI
from ztune.errors import ZtuneError
from ztune.objective import FewShotObjective, NumpyScores
from ztune.types import F32, I64, Batch, Prompts

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAMES = tuple(f"{a} {b}" for a in DIGITS for b in ("hand", "small drawn shape", "ink", "big"))
N_CONTEXT, N_VIEWS, N_IMAGES = 4, 2, 60
SCALE, BIAS = 37.5, -2.0


def encoder(execution: Execution, n_candidates: int = 6) -> OrtPromptEncoder:
    bundle = load_bundle(MINI)
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), execution)
    return graph.encoder(NAMES, N_CONTEXT, n_candidates)


def images() -> tuple[F32, I64]:
    rng = np.random.default_rng(0)
    features = rng.standard_normal((N_VIEWS, N_IMAGES, load_bundle(MINI).embed_dim))
    features /= np.linalg.norm(features, axis=-1, keepdims=True)
    return features.astype(np.float32), np.arange(N_IMAGES, dtype=np.int64) % len(NAMES)


def rounds(sizes: tuple[int, ...] = (6, 6, 1)) -> Iterator[tuple[F32, Batch]]:
    rng = np.random.default_rng(1)
    for number, size in enumerate(sizes):
        contexts = rng.standard_normal((size, N_CONTEXT, load_bundle(MINI).text.width))
        n = (24, 24, N_IMAGES)[number % 3]
        batch = Batch(rng.permutation(N_IMAGES)[:n], rng.integers(N_VIEWS, size=n), number + 1)
        yield contexts.astype(np.float32), batch


def check(execution: Execution, tolerance: float) -> OrtPromptEncoder:
    features, labels = images()
    reference = FewShotObjective(NumpyScores(encoder(Execution()), features, SCALE, BIAS), labels)
    own = encoder(execution)
    objective = FewShotObjective(OrtScores(own, features, SCALE, BIAS, execution), labels)
    for contexts, batch in rounds():
        expected, got = reference(Prompts(contexts), batch), objective(Prompts(contexts), batch)
        np.testing.assert_allclose(got.losses, expected.losses, atol=tolerance)
        np.testing.assert_allclose(got.accuracies, expected.accuracies, atol=1e-12)
        assert got.losses.dtype == got.accuracies.dtype == np.float64
        assert got.losses.shape == (len(contexts),)
        assert got.logits is None
    return own


@pytest.mark.parametrize(
    ("limit", "n_candidates", "n_groups"), [(None, 6, 1), (4, 2, 1), (1, 2, 5)]
)
def test_they_are_equal_for_every_plan(limit: int | None, n_candidates: int, n_groups: int) -> None:
    own = check(Execution(memory_limit=limit), 1e-6)
    assert (own.plan.n_candidates, len(own.plan.groups)) == (n_candidates, n_groups)
    # Groups must reorder the classes for this test to be meaningful.
    assert not np.array_equal(np.concatenate(own.plan.groups), np.arange(len(NAMES)))


def test_a_loss_that_is_not_finite_names_the_candidate() -> None:
    features, labels = images()
    scores = OrtScores(encoder(Execution()), features, SCALE, BIAS, Execution())
    contexts, batch = next(rounds())
    contexts[2] = np.nan
    with pytest.raises(ZtuneError, match=r"batch 1, candidate 3 of 6: the loss is nan"):
        FewShotObjective(scores, labels)(Prompts(contexts), batch)


def test_an_error_of_onnxruntime_is_one_line() -> None:
    features, labels = images()
    scores = OrtScores(encoder(Execution()), features, SCALE, BIAS, Execution())
    contexts, _ = next(rounds())
    beyond = Batch(np.array([N_IMAGES]), np.array([N_VIEWS]), 1)
    with pytest.raises(ZtuneError, match=r"^the score graph failed while running: ") as caught:
        scores(Prompts(contexts), beyond, labels[:1])
    assert "\n" not in str(caught.value)


@pytest.mark.gpu
@pytest.mark.parametrize("cuda_graph", [True, False])
def test_on_cuda_they_are_close_and_a_candidate_batch_is_captured(cuda_graph: bool) -> None:
    if "CUDAExecutionProvider" not in providers.onnxruntime().get_available_providers():
        pytest.skip("no onnxruntime-gpu here")
    own = check(Execution("cuda", cuda_graph=cuda_graph), 1e-4)
    assert own.cuda_graph == ("captured" if cuda_graph else "not captured: disabled")
