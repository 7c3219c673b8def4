"""Forward passes of a bundle on ONNX Runtime, local: numpy in, numpy out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL

from runtimes.bundle import PARITY, Bundle
from runtimes.preprocess import PREPROCESS_VERSION, crop, normalise, random_view, read_picture
from runtimes.prompts import class_feeds
from runtimes.providers import (
    check_precision,
    onnxruntime,
    open_session,
    require_placement,
    run_graph,
)
from runtimes.tokenizer import Tokenizer
from ztune.errors import FormatError
from ztune.tensors import read_tensors
from ztune.types import F32, I64, U8

# Class-name tokens of all candidates in one call of the prompt graph: bounds its memory. Part of
# what makes a run reproducible, hence a constant and no measurement.
_TOKENS_PER_CALL = 16384


class _Graph:
    """One graph of a bundle, checked and open."""

    def __init__(self, bundle: Bundle, name: str, provider: str):
        check_precision(bundle.precision, provider)
        self._path = bundle.file(f"{name}.onnx")
        _check_placement(bundle, name, self._path, provider)
        self._session = open_session(self._path, provider)

    def run(self, feeds: Mapping[str, np.ndarray]) -> F32:
        features = run_graph(self._session, self._path, ["features"], feeds)[0]
        return np.asarray(features, dtype=np.float32)


class OrtImageEncoder:
    """The image tower (an ImageEncoder)."""

    def __init__(self, bundle: Bundle, provider: str):
        self._spec = bundle.image
        # Dynamic int8 scales activations over the whole call: a picture's features would depend on
        # its company, so there is none.
        self._alone = bundle.precision == "int8"
        self._graph = _Graph(bundle, "image", provider)
        weights = bundle.files.get("image.onnx.data", ("",))[0]
        self._identity = "|".join(
            [
                bundle.files["image.onnx"][0] + weights,
                repr(bundle.image),
                provider,
                bundle.precision,
                f"onnxruntime {onnxruntime().__version__}",
                f"preprocess {PREPROCESS_VERSION}",
                f"pillow {PIL.__version__}",
            ]
        )

    @property
    def identity(self) -> str:
        return self._identity

    def read(self, path: Path, view: np.random.Generator | None) -> U8:
        image = read_picture(path)
        return crop(image, self._spec) if view is None else random_view(image, self._spec, view)

    def encode(self, pixels: U8) -> F32:
        ready = normalise(pixels, self._spec)
        if not self._alone:
            return self._graph.run({"pixels": ready})
        return np.concatenate([self._graph.run({"pixels": one[None]}) for one in ready])


class OrtTextEncoder:
    """The text tower on whole token sequences: hand-written templates."""

    def __init__(self, bundle: Bundle, provider: str):
        self._graph = _Graph(bundle, "text", provider)

    def encode(self, tokens: I64) -> F32:
        """Return unit features f32[B, e] of tokens i64[B, L]."""
        parts = [self._graph.run({"tokens": tokens[i : i + 64]}) for i in range(0, len(tokens), 64)]
        return np.concatenate(parts)


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
        self._graph = _Graph(bundle, "prompt", provider)

    def encode(self, contexts: F32) -> F32:
        step = self._candidates_per_call
        parts = [
            self._graph.run({**self._feeds, "contexts": contexts[i : i + step]})
            for i in range(0, len(contexts), step)
        ]
        return np.concatenate(parts)


def parity_inputs(path: Path, graph: str) -> tuple[dict[str, np.ndarray], F32]:
    """Return the inputs of one graph kept in a parity file, and torch's output for them.

    Raises: FormatError when the file is damaged or has none for this graph.
    """
    arrays, _ = read_tensors(path, "parity figures")
    own = {
        name.partition(".")[2]: array
        for name, array in arrays.items()
        if name.partition(".")[0] == graph
    }
    if "features" not in own or len(own) < 2:
        raise FormatError(f"{path} keeps no parity figures of {graph}.onnx (export again)")
    return own, own.pop("features")


def parity_figures(parity: Path, name: str, graph: Path, provider: str) -> dict[str, float]:
    """Return cosine (the worst) and max_abs between a graph's features here and torch's."""
    feeds, expected = parity_inputs(parity, name)
    session = open_session(graph, provider)
    got = run_graph(session, graph, ["features"], feeds)[0].astype(np.float64)
    wide = expected.astype(np.float64)
    norms = np.linalg.norm(got, axis=-1) * np.linalg.norm(wide, axis=-1)
    cosines = (got * wide).sum(axis=-1) / norms
    return {"cosine": float(cosines.min()), "max_abs": float(np.abs(got - wide).max())}


def parity_on_this_machine(bundle: Bundle, graph: str, provider: str) -> dict[str, float]:
    """Return how far a bundle's graph is from torch on this machine."""
    return parity_figures(bundle.file(PARITY), graph, bundle.file(f"{graph}.onnx"), provider)


def _check_placement(bundle: Bundle, name: str, graph: Path, provider: str) -> None:
    # On the CPU there is nowhere else to run; on a device one profiled run proves it.
    if provider != "cpu":
        feeds, _ = parity_inputs(bundle.file(PARITY), name)
        require_placement(graph, provider, feeds)
