"""Forward passes of a bundle on ONNX Runtime, local: numpy in, numpy out."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from runtimes.bundle import PARITY, Bundle
from runtimes.preprocess import crop, normalise, random_view, read_picture
from runtimes.prompts import class_feeds
from runtimes.providers import onnxruntime, open_session, require_placement
from runtimes.tokenizer import Tokenizer
from ztune.errors import ZtuneError
from ztune.tensors import read_tensors
from ztune.types import F32, I64, U8

# Class-name tokens of all candidates in one call of the prompt graph: bounds its memory. Part of
# what makes a run reproducible, hence a constant and no measurement.
_TOKENS_PER_CALL = 16384


class OrtImageEncoder:
    """The image tower (an ImageEncoder)."""

    def __init__(self, bundle: Bundle, provider: str):
        self._spec = bundle.image
        graph = bundle.file("image.onnx")
        _check_placement(bundle, "image", graph, provider)
        self._session = open_session(graph, provider)
        weights = bundle.files.get("image.onnx.data", ("",))[0]
        self._identity = "|".join(
            [
                bundle.files["image.onnx"][0] + weights,
                repr(bundle.image),
                provider,
                bundle.precision,
                f"onnxruntime {onnxruntime().__version__}",
            ]
        )

    @property
    def identity(self) -> str:
        return self._identity

    def read(self, path: Path, view: np.random.Generator | None) -> U8:
        image = read_picture(path)
        return crop(image, self._spec) if view is None else random_view(image, self._spec, view)

    def encode(self, pixels: U8) -> F32:
        feeds = {"pixels": normalise(pixels, self._spec)}
        return np.asarray(self._session.run(["features"], feeds)[0], dtype=np.float32)


class OrtTextEncoder:
    """The text tower on whole token sequences: hand-written templates."""

    def __init__(self, bundle: Bundle, provider: str):
        graph = bundle.file("text.onnx")
        _check_placement(bundle, "text", graph, provider)
        self._session = open_session(graph, provider)

    def encode(self, tokens: I64) -> F32:
        """Return unit features f32[B, e] of tokens i64[B, L]."""
        parts = [
            self._session.run(["features"], {"tokens": tokens[i : i + 64]})[0]
            for i in range(0, len(tokens), 64)
        ]
        return np.concatenate(parts).astype(np.float32)


class OrtPromptEncoder:
    """The prompt graph for fixed class names (a PromptEncoder)."""

    def __init__(
        self,
        bundle: Bundle,
        tokenizer: Tokenizer,
        classes: tuple[str, ...],
        n_context: int,
        provider: str,
    ):
        """Look up the class names once.

        Raises: DataError when a name is too long for the tower or two names have the same tokens.
        """
        self._feeds = class_feeds(bundle, tokenizer, classes, n_context)
        n_tokens = (
            len(self._feeds["name_positions"])
            if bundle.text.graph == "prefix"
            else self._feeds["tokens"].size
        )
        self._candidates_per_call = max(1, _TOKENS_PER_CALL // n_tokens)
        graph = bundle.file("prompt.onnx")
        _check_placement(bundle, "prompt", graph, provider)
        self._session = open_session(graph, provider)

    def encode(self, contexts: F32) -> F32:
        step = self._candidates_per_call
        parts = [
            self._session.run(["features"], {**self._feeds, "contexts": contexts[i : i + step]})[0]
            for i in range(0, len(contexts), step)
        ]
        return np.concatenate(parts).astype(np.float32)


def parity_inputs(bundle: Bundle, graph: str) -> tuple[dict[str, np.ndarray], F32]:
    """Return the stored inputs of one graph and torch's output for them.

    Raises: FormatError when the bundle's parity file is damaged or has none for this graph.
    """
    path = bundle.file(PARITY)
    arrays, _ = read_tensors(path, f'bundle "{bundle.path}": parity figures')
    own = {
        name.partition(".")[2]: array
        for name, array in arrays.items()
        if name.partition(".")[0] == graph
    }
    if "features" not in own or len(own) < 2:
        raise ZtuneError(f'bundle "{bundle.path}" stores no parity figures of {graph}.onnx')
    return own, own.pop("features")


def parity_on_this_machine(bundle: Bundle, graph: str, provider: str) -> dict[str, float]:
    """Return cosine (the worst) and max_abs between this machine's features and torch's."""
    feeds, expected = parity_inputs(bundle, graph)
    session = open_session(bundle.file(f"{graph}.onnx"), provider)
    got = session.run(["features"], feeds)[0].astype(np.float64)
    wide = expected.astype(np.float64)
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(wide, axis=-1)
    cosines = (got * wide).sum(axis=-1) / norms
    return {"cosine": float(cosines.min()), "max_abs": float(np.abs(got - wide).max())}


def _check_placement(bundle: Bundle, name: str, graph: Path, provider: str) -> None:
    # On the CPU there is nowhere else to run; on a device one profiled run proves it.
    if provider != "cpu":
        feeds, _ = parity_inputs(bundle, name)
        require_placement(graph, provider, feeds)
