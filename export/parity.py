"""Compare every graph with open_clip in torch before a bundle is written.

The references are independent of the graphs: whole sequences through open_clip's own forward, with
contexts and image tokens inserted by hooks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.graphs import visual_tower
from export.loaded import LoadedClip
from runtimes.bundle import Parity, TextSpec
from runtimes.graph_check import check_graph
from runtimes.prompts import feeds, placeholder_id
from runtimes.providers import onnxruntime
from runtimes.tokenizer import Tokenizer
from runtimes.weights import WEIGHTS
from ztune.errors import ZtuneError
from ztune.types import F32, I64

LIMIT = 1e-4
NAMES = ("cat", "traffic light", "red panda", "x", "old wooden house by the sea", "dog", "boat 42")
TEXTS = ("a photo of a cat.", "a sketch of a very large traffic light!", "7", "x y z", "boats")
BATCHES = (1, 3, 5)
Feeds = Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Case:
    """Inputs of one graph and torch's output for them."""

    feeds: Feeds
    features: F32


def image_cases(loaded: LoadedClip, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """Yield random images, one batch size at a time."""
    random = torch.Generator().manual_seed(0)
    size = loaded.image.size
    for batch in batches:
        pixels = torch.randn(batch, 3, size, size, generator=random)
        yield Case({"pixels": pixels.numpy()}, _image(loaded, pixels))


def image_prompted_cases(
    loaded: LoadedClip, shapes: Sequence[tuple[int, int, int]] = ((1, 1, 1), (2, 3, 7), (3, 2, 4))
) -> Iterator[Case]:
    """Yield random images and tokens, one shape (candidates, images, tokens) at a time."""
    random = torch.Generator().manual_seed(2)
    tower = visual_tower(loaded.model)
    size, width = loaded.image.size, int(tower.positional_embedding.shape[1])
    for n_candidates, n_images, n_tokens in shapes:
        pixels = torch.randn(n_images, 3, size, size, generator=random)
        tokens = torch.randn(n_candidates, n_tokens, width, generator=random)
        features = image_prompted_reference(loaded, pixels, tokens)
        yield Case({"pixels": pixels.numpy(), "tokens": tokens.numpy()}, features)


def text_cases(loaded: LoadedClip, batches: Sequence[int] = BATCHES) -> Iterator[Case]:
    """Yield tokenized texts, one batch size at a time."""
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    limit = loaded.text.context_length - len(loaded.text.prefix_ids) - len(loaded.text.suffix_ids)
    # Different texts for each batch size; a small tower may not hold the long ones.
    fitting = [text for text in TEXTS if 0 < len(tokenizer.encode(text)) <= limit]
    if not fitting:
        raise ZtuneError(
            f"the text tower takes {loaded.text.context_length} tokens: too few for a text"
        )
    for turn, batch in enumerate(batches):
        texts = [fitting[(turn + i) % len(fitting)] for i in range(batch)]
        tokens = tokenizer.pad([tokenizer.sequence(text) for text in texts])
        yield Case({"tokens": tokens}, _text(loaded, torch.from_numpy(tokens)))


def prompt_cases(
    loaded: LoadedClip, shapes: Sequence[tuple[int, int, int]] | None = None
) -> Iterator[Case]:
    """Yield random contexts, one shape (candidates, context length, classes) at a time.

    A context length of 0 means the longest that fits.
    """
    random = torch.Generator().manual_seed(1)
    tokenizer = Tokenizer.from_json(loaded.tokenizer_json, loaded.text)
    table = loaded.tower.table()
    for n_candidates, n_context, n_classes in shapes or (
        (1, 1, 1),
        (3, 4, 7),
        (2, 8, 2),
        (1, 0, 3),
    ):
        names, room = _choose_names(loaded.text, tokenizer, n_classes)
        n_context = min(n_context or room, room)
        contexts = torch.randn(n_candidates, n_context, loaded.text.width, generator=random)
        contexts = contexts * float(table.std())
        given = feeds(loaded.text, table, names, n_context)
        features = prompt_reference(loaded, contexts, names)
        yield Case({"contexts": contexts.numpy(), **given}, features)


def _choose_names(
    spec: TextSpec, tokenizer: Tokenizer, n_classes: int
) -> tuple[list[tuple[int, ...]], int]:
    """Return ids of distinct names that leave room for a context, and the context's room."""
    room = spec.context_length - len(spec.prefix_ids) - len(spec.suffix_ids)
    distinct = dict.fromkeys(tokenizer.encode(f"{name}.") for name in NAMES)
    fitting = [ids for ids in distinct if 0 < len(ids) <= room // 2]
    if not fitting:
        raise ZtuneError(
            f"the text tower takes {spec.context_length} tokens: too few for a context and a name"
        )
    names = fitting[:n_classes]
    return names, room - max(len(ids) for ids in names)


def image_prompted_reference(loaded: LoadedClip, pixels: Tensor, tokens: Tensor) -> F32:
    """Return f32[P, N, e] of tokens f32[P, n, w] by open_clip's own forward."""
    tower = visual_tower(loaded.model)
    features = []
    for added in tokens:

        def put(_: Any, given: tuple[Tensor, ...], added: Tensor = added) -> tuple[Tensor, ...]:
            return (torch.cat([given[0], added.expand(len(given[0]), -1, -1)], 1),)

        def strip(_: Any, __: Any, states: Tensor) -> Tensor:
            return states[:, : -tokens.shape[1]]

        hooks = [
            tower.ln_pre.register_forward_pre_hook(put),
            tower.transformer.register_forward_hook(strip),
        ]
        try:
            features.append(_image(loaded, pixels))
        finally:
            for hook in hooks:
                hook.remove()
    return np.stack(features)


def _image(loaded: LoadedClip, pixels: Tensor) -> F32:
    model: Any = loaded.model
    with torch.no_grad():
        features: F32 = model.encode_image(pixels, normalize=True).numpy()
    return features


def _text(loaded: LoadedClip, tokens: Tensor) -> F32:
    model: Any = loaded.model
    with torch.no_grad():
        features: F32 = model.encode_text(tokens, normalize=True).numpy()
    return features


def prompt_reference(loaded: LoadedClip, contexts: Tensor, names: Sequence[tuple[int, ...]]) -> F32:
    """Return f32[P, C, e] of contexts f32[P, m, d] by open_clip's own forward."""
    spec = loaded.text
    n_context = contexts.shape[1]
    first = len(spec.prefix_ids)
    tokens: I64 = np.full((len(names), spec.context_length), spec.pad_id, dtype=np.int64)
    for row, ids in zip(tokens, names, strict=True):
        sequence = [*spec.prefix_ids, *[placeholder_id(spec)] * n_context, *ids, *spec.suffix_ids]
        row[: len(sequence)] = sequence
    features = []
    for context in contexts:

        def put(_: Any, __: Any, embedded: Tensor, context: Tensor = context) -> Tensor:
            embedded = embedded.clone()
            embedded[:, first : first + n_context] = context
            return embedded

        hook = loaded.tower.embedding.register_forward_hook(put)
        try:
            features.append(_text(loaded, torch.from_numpy(tokens)))
        finally:
            hook.remove()
    return np.stack(features)


def open_graph(graph: Path) -> Any:
    """Open a graph on the CPU.

    Raises: FormatError for one that no bundle may have.
    """
    shared = (graph.parent / WEIGHTS).exists()
    check_graph(graph, WEIGHTS if shared else f"{graph.name}.data")
    ort = onnxruntime()
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(graph), options, providers=["CPUExecutionProvider"])


def compare(graph: Path, cases: Iterator[Case] | Sequence[Case]) -> Parity:
    """Run a graph on every case and return the worst cosine and the largest difference.

    Raises: ZtuneError above LIMIT.
    """
    run = open_graph(graph)
    worst = Parity(cosine=1.0, max_abs=0.0)
    for case in cases:
        (features,) = run.run(["features"], dict(case.feeds))
        if features.shape != case.features.shape:
            raise ZtuneError(
                f"{graph.name} returns {features.shape}, torch {case.features.shape}: the exporter "
                "fixed a dynamic dimension; this model cannot be exported"
            )
        got, wide = features.astype(np.float64), case.features.astype(np.float64)
        lengths = np.linalg.norm(got, axis=-1) * np.linalg.norm(wide, axis=-1)
        cosines = (got * wide).sum(-1) / lengths
        # numpy's max and min propagate NaN, which then fails the limit.
        worst["cosine"] = float(np.min([worst["cosine"], cosines.min()]))
        worst["max_abs"] = float(np.max([worst["max_abs"], np.abs(features - case.features).max()]))
    if not worst["max_abs"] <= LIMIT:
        raise ZtuneError(
            f"{graph.name} differs from torch by {worst['max_abs']:.3g} (1 - cosine "
            f"{1 - worst['cosine']:.1e}), expected at most {LIMIT:g}: no bundle was written"
        )
    return worst
