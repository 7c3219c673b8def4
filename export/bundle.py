"""Export a model as a bundle: graphs, token table, tokenizer and manifest."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from torch import nn

from export.graphs import (
    ImageGraph,
    PrefixGraph,
    PromptedImageGraph,
    SequenceGraph,
    TextGraph,
    visual_tower,
)
from export.half_store import rounded_to_half, to_exact_half, worst_cosine
from export.loaded import LoadedClip
from export.onnx import Input, export_onnx
from export.parity import (
    Case,
    compare,
    image_cases,
    image_prompted_cases,
    prompt_cases,
    text_cases,
)
from export.shared import SharedWeights
from export.source_parity import SourceParity, compare_ids, compare_logits, compare_pixels
from runtimes.bundle import (
    FORMAT,
    IMAGE_PROMPTED,
    MANIFEST,
    PARITY,
    VERSION,
    Bundle,
    Manifest,
    Parity,
    VisualSpec,
    compact_json,
    list_files,
    load_bundle,
)
from runtimes.providers import onnxruntime
from runtimes.weights import WEIGHTS
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain
from ztune.io.tensors import write_tensors
from ztune.types import F32, Json

# Inputs in the order of forward, with the names of their dynamic dimensions.
_IMAGE_DIMS: Mapping[str, Mapping[int, str]] = {"pixels": {0: "N"}}
_IMAGE_PROMPTED_DIMS: Mapping[str, Mapping[int, str]] = {
    "pixels": {0: "N"},
    "tokens": {0: "P", 1: "n"},
}
_TEXT_DIMS: Mapping[str, Mapping[int, str]] = {"tokens": {0: "B"}}
_PREFIX_DIMS: Mapping[str, Mapping[int, str]] = {
    "contexts": {0: "P", 1: "m"},
    "name_embeddings": {0: "T"},
    "name_positions": {0: "T"},
    "pad_index": {0: "C", 1: "n"},
    "unpad_index": {0: "T"},
    "eot_index": {0: "C"},
}
_SEQUENCE_DIMS: Mapping[str, Mapping[int, str]] = {
    "contexts": {0: "P", 1: "m"},
    "name_embeddings": {0: "R"},
    "sequence_index": {0: "C"},
    "tokens": {0: "C"},
}


def export_bundle(
    loaded: LoadedClip,
    out: Path,
    *,
    image_tokens: bool = False,
    store: str = "fp32",
    progress: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Write the bundle of a model to the new folder `out`, atomically.

    `image_tokens` adds an image tower that takes additional tokens. With `store` fp16 the matrices
    are rounded to it, which halves the bundle; the graphs compute in fp32 as before, and must match
    torch with the rounded weights.

    Raises: ConfigError when `out` is not empty, a weight exceeds fp16, or the
        image tower cannot take tokens; ZtuneError when a graph does not match torch.
    """
    if image_tokens:
        visual_tower(loaded.model)  # fails before anything is written
    with new_folder(out) as work:
        for note in loaded.notes:
            progress(f"note: {note}")
        _write_files(loaded, work, image_tokens, store, progress)
    return load_bundle(out)


@dataclass(frozen=True)
class _Graph:
    name: str
    module: nn.Module
    dims: Mapping[str, Mapping[int, str]]
    traced: Case
    """Every size is at least 2, and no two dynamic dimensions have the same size."""
    checked: Iterable[Case]


def _graphs(loaded: LoadedClip, image_tokens: bool) -> Iterator[_Graph]:
    model, spec = loaded.model, loaded.text
    (traced,) = image_cases(loaded, [2])
    yield _Graph("image", ImageGraph(model), _IMAGE_DIMS, traced, image_cases(loaded))
    if image_tokens:
        yield image_prompted_graph(loaded)
    (traced,) = text_cases(loaded, [2])
    yield _Graph("text", TextGraph(model), _TEXT_DIMS, traced, text_cases(loaded))
    prompt: nn.Module
    if spec.graph == "prefix":
        prompt, dims = PrefixGraph(loaded.tower, spec.prefix_ids[0]), _PREFIX_DIMS
    else:
        prompt, dims = SequenceGraph(model, loaded.tower), _SEQUENCE_DIMS
    (traced,) = prompt_cases(loaded, [(3, 6, 5)])
    yield _Graph("prompt", prompt, dims, traced, prompt_cases(loaded))


def image_prompted_graph(loaded: LoadedClip) -> _Graph:
    """Return the graph of an image tower with added tokens."""
    (traced,) = image_prompted_cases(loaded, [(3, 2, 5)])
    module, checked = PromptedImageGraph(loaded.model), image_prompted_cases(loaded)
    return _Graph("image_prompted", module, _IMAGE_PROMPTED_DIMS, traced, checked)


def export_graph(
    graph: _Graph,
    folder: Path,
    weights: SharedWeights,
    progress: Callable[[str], None],
    *,
    half: bool = False,
) -> tuple[Parity, dict[str, np.ndarray[Any, Any]]]:
    """Write and check one graph; return its parity figures and the tensors to reproduce them.

    `half` stores its weights in fp16 where that is exact.

    Raises: ZtuneError when the graph does not match torch.
    """
    path = folder / f"{graph.name}.onnx"
    progress(f"{path.name}: exporting")
    traced = graph.traced
    inputs = {
        name: Input(torch.from_numpy(traced.feeds[name]), dims) for name, dims in graph.dims.items()
    }
    export_onnx(graph.module, inputs, path, weights, half=half)
    figures = compare(path, [traced, *graph.checked])
    progress(
        f"{path.name}: maximum difference from torch {figures['max_abs']:.1e}, "
        f"minimum cosine {figures['cosine']:.7f}"
    )
    kept = {f"{graph.name}.{name}": value for name, value in traced.feeds.items()}
    return figures, {**kept, f"{graph.name}.features": traced.features}


def _write_files(
    loaded: LoadedClip,
    folder: Path,
    image_tokens: bool,
    store: str,
    progress: Callable[[str], None],
) -> None:
    ids, pixels = compare_ids(loaded), compare_pixels(loaded)
    parity: dict[str, Parity] = {}
    kept: dict[str, np.ndarray[Any, Any]] = {}
    stored: dict[str, Json] = {}
    weights, half = SharedWeights(folder / WEIGHTS), store == "fp16"
    exact: dict[str, F32] = {}
    if half:
        exact = {graph.name: graph.traced.features for graph in _graphs(loaded, image_tokens)}
    with rounded_to_half(loaded.model) if half else contextlib.nullcontext():
        for graph in _graphs(loaded, image_tokens):
            figures, tensors = export_graph(graph, folder, weights, progress, half=half)
            parity[graph.name] = figures
            kept |= tensors
        table = loaded.tower.table()
        narrow = to_exact_half(table) if half else None
        stored |= weights.finish(table if narrow is None else narrow)
        source = compare_logits(loaded, folder, ids, pixels)
    if half:
        cosines = {
            name: worst_cosine(kept[f"{name}.features"], features)
            for name, features in exact.items()
        }
        worst = min(cosines.values())
        progress(f"weights stored in fp16: minimum cosine to the original weights {worst:.7f}")
        stored |= {"store": store, "rounding": plain(cosines)}
    write_tensors(folder / PARITY, kept, {"format": "ztune-parity", "version": 1})
    (folder / "tokenizer.json").write_text(loaded.tokenizer_json, encoding="utf-8")
    embed_dim = int(kept["image.features"].shape[1])
    write_json(folder / MANIFEST, _manifest(loaded, folder, parity, source, embed_dim) | stored)
    for file in folder.iterdir():
        with file.open("rb+") as written:
            os.fsync(written.fileno())


def _manifest(
    loaded: LoadedClip,
    folder: Path,
    parity: Mapping[str, Parity],
    source: SourceParity,
    embed_dim: int,
) -> dict[str, Json]:
    model: Any = loaded.model
    bias = getattr(model, "logit_bias", None)
    manifest = Manifest(
        model_id=model_id(loaded),
        source=loaded.source,
        image=loaded.image,
        text=loaded.text,
        embed_dim=embed_dim,
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=0.0 if bias is None else float(bias),
        precision="fp32",
        visual=visual_spec(loaded) if (folder / IMAGE_PROMPTED).exists() else None,
        parity=parity,
        files=list_files(folder),
    )
    versions = {
        "ztune": metadata.version("ztune"),
        **{part.__name__: str(part.__version__) for part in (torch, open_clip, onnxruntime())},
        "onnx": metadata.version("onnx"),
    }
    made_with: dict[str, Json] = {
        "activation": activation(loaded.model),
        "source_parity": plain(source),
        "versions": dict(versions),
        "created_by": "ztune export",
    }
    return {"format": FORMAT, "version": VERSION, **plain(manifest), **made_with}


def activation(model: nn.Module) -> str:
    """Return the activation functions of both towers, by their names in torch and the library."""
    names = set()
    for part in model.modules():
        name = type(part).__name__
        if any(known in name for known in ("GELU", "ReLU", "SiLU")):
            tanh = getattr(part, "approximate", "") == "tanh"
            names.add(f"{name} (tanh)" if tanh else name)
    return ", ".join(sorted(names)) or "unknown"


def visual_spec(loaded: LoadedClip) -> VisualSpec:
    """Return the manifest's `visual`: statistics for initialising image tokens."""
    patches = visual_tower(loaded.model).conv1.weight.detach().double().numpy()
    return VisualSpec(
        int(patches.shape[0]), int(patches[0].size), float(patches.mean()), float(patches.std())
    )


def model_id(loaded: LoadedClip) -> str:
    """Return the digest of weights, architecture, tokenizer and preprocessing.

    It identifies the model independently of precision and graphs.
    """
    digest = hashlib.sha256()
    text = {key: value for key, value in plain(loaded.text).items() if key != "graph"}
    for part in (loaded.config, plain(loaded.image), text):
        digest.update(compact_json(part).encode())
    digest.update(hashlib.sha256(loaded.tokenizer_json.encode()).digest())
    for name, tensor in sorted(loaded.model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
