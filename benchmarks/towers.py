"""Models for benchmarks: random weights, exported once with the real exporter and cached.

    python -m benchmarks.towers ViT-B-32 --kind fp32

Kind `lean` has only the prompt graph, in fp32 and int8, and the naive graph of a competent user's
ONNX Runtime loop: whole sequences that include the contexts. The others are whole bundles of
`ztune export` and `ztune quantize`. Prints the folder's path.

Heavy imports happen only for an export, so that they do not affect benchmarks of memory.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.measure import ROOT, say
from runtimes.bundle import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    Precision,
    list_files,
    load_bundle,
)
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain
from ztune.system import versions

if TYPE_CHECKING:
    from export.loaded import LoadedClip

NAIVE = "naive.onnx"
# Inputs of the files besides the model: a change of the exporter triggers a new export.
_SOURCES = (
    "export", "runtimes/bundle.py", "runtimes/prompts.py", "runtimes/weights.py",
    "benchmarks/towers.py",
)  # fmt: skip
_PACKAGES = ("torch", "open_clip_torch", "onnx", "onnxruntime", "onnxruntime-gpu")
_TINY: dict[str, Any] = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 32, "layers": 2, "width": 64, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 3},
}

# Ids of names to trace graphs with: no two dynamic dimensions have the same size.
_EXAMPLES = [(320, 1000, 269), (321, 269), (322, 1002, 1003, 269), (323, 269), (324, 1004, 269)]


@dataclass(frozen=True)
class Size:
    """A model and its number of layers."""

    model: str = "ViT-B-32"
    """A name of open_clip, or `tiny`."""
    layers: int | None = None
    """Layers of the text tower; None: all."""

    def config(self) -> dict[str, Any]:
        """Return open_clip's description of the architecture."""
        if self.model == "tiny":
            found: dict[str, Any] = copy.deepcopy(_TINY)
        else:
            import open_clip

            found = open_clip.get_model_config(self.model)
        if self.layers is not None:
            found["text_cfg"]["layers"] = self.layers
        return found

    @property
    def n_layers(self) -> int:
        """Layers of the text tower."""
        return int(self.config()["text_cfg"]["layers"])

    def folder(self, cache: Path, kind: str) -> Path:
        """Return the folder of `kind` in a cache."""
        digest = hashlib.sha256()
        for source in _SOURCES:
            path = ROOT / source
            for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
                digest.update(file.read_bytes())
        found = versions()
        digest.update(repr([found.get(name) for name in _PACKAGES]).encode())
        layers = f"-{self.layers}-layers" if self.layers is not None else ""
        return cache / f"{self.model}{layers}-{kind}-{digest.hexdigest()[:12]}"

    def words(self) -> list[str]:
        """Return the command-line arguments for this size."""
        return [self.model, *([] if self.layers is None else ["--layers", str(self.layers)])]


def load_random(size: Size, *, without_images: bool = False) -> LoadedClip:
    """Return the model with random weights; with `without_images` the image tower is tiny.

    The text tower's weights depend on the image tower's size.
    """
    from open_clip.constants import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD

    from export.clip import load_clip

    config = size.config()
    if without_images:
        config["vision_cfg"] = _TINY["vision_cfg"]
    preprocess = {"mean": OPENAI_DATASET_MEAN, "std": OPENAI_DATASET_STD}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / size.model
        folder.mkdir()
        described = {"model_cfg": config, "preprocess_cfg": preprocess}
        (folder / "open_clip_config.json").write_text(json.dumps(described))
        return load_clip(f"local-dir:{folder}", random_weights=0)


def full(size: Size, cache: Path, precision: str = "fp32") -> Path:
    """Return the folder of a whole bundle, exported in a separate process if missing."""
    folder = size.folder(cache, precision)
    if not folder.exists():
        _make(size, cache, precision)
    return folder


def lean(size: Size, cache: Path) -> Path:
    """Return the folder with bundles `fp32` and `int8` of only the prompt graph, and NAIVE."""
    folder = size.folder(cache, "lean")
    if folder.exists():
        return folder
    # Exporting uses one core, so export the two graphs in parallel.
    with new_folder(folder) as work:
        parts = [
            subprocess.Popen(
                _command(size, cache, kind, work / name), cwd=ROOT, stdout=subprocess.DEVNULL
            )
            for kind, name in (("naive", NAIVE), ("prompt", "fp32"))
        ]
        codes = [part.wait() for part in parts]
        if any(codes):
            sys.exit("the benchmark's models cannot be exported")
    return folder


def _command(size: Size, cache: Path, kind: str, out: Path | None = None) -> list[str]:
    words = [sys.executable, "-m", "benchmarks.towers", *size.words(), "--cache", str(cache)]
    return [*words, "--kind", kind, *([] if out is None else ["--out", str(out)])]


def _make(size: Size, cache: Path, kind: str) -> None:
    command = _command(size, cache, kind)
    if subprocess.run(command, stdout=subprocess.DEVNULL, cwd=ROOT).returncode:
        sys.exit("the benchmark's models cannot be exported")


def _export_full(size: Size, out: Path) -> None:
    from export.bundle import export_bundle

    say(f"exporting {size.model} with random weights, once")
    export_bundle(load_random(size), out)


def _quantize_full(size: Size, cache: Path, precision: str, out: Path) -> None:
    from export.quantize import quantize_bundle

    quantize_bundle(load_bundle(full(size, cache)), out, precision)


def _export_prompt(size: Size, out: Path) -> None:
    """Write the bundles `out` (fp32) and int8 (in the same folder) of only the prompt graph."""
    import numpy as np
    import torch

    from export.bundle import _PREFIX_DIMS
    from export.graphs import PrefixGraph
    from export.onnx import Input, export_onnx
    from export.quantize import _to_int8
    from export.weights import read_graph, write_graph
    from runtimes.prompts import feeds

    say(f"exporting the prompt graph of {size.model} with random weights, once")
    loaded = load_random(size, without_images=True)
    out.mkdir()
    table = loaded.tower.embedding.weight.detach().numpy()
    given = feeds(loaded.text, table, _EXAMPLES, 6)
    traced = {"contexts": np.zeros((3, 6, loaded.text.width), dtype=np.float32), **given}
    inputs = {name: Input(torch.from_numpy(traced[name]), d) for name, d in _PREFIX_DIMS.items()}
    export_onnx(PrefixGraph(loaded.tower, loaded.text.prefix_ids[0]), inputs, out / "prompt.onnx")
    np.save(out / "token_table.npy", table)
    (out / "tokenizer.json").write_text(loaded.tokenizer_json, encoding="utf-8")
    _describe(loaded, out, "fp32")
    int8 = out.with_name("int8")
    int8.mkdir()
    for name in ("token_table.npy", "tokenizer.json"):
        (int8 / name).hardlink_to(out / name)
    target = int8 / "prompt.onnx"
    write_graph(_to_int8(read_graph(out / "prompt.onnx"), target), target)
    _describe(loaded, int8, "int8")


def _describe(loaded: LoadedClip, folder: Path, precision: Precision) -> None:
    model: Any = loaded.model
    manifest = Manifest(
        model_id="random weights",
        source=loaded.source,
        image=loaded.image,
        text=loaded.text,
        embed_dim=int(str(loaded.config["embed_dim"])),
        logit_scale=float(model.logit_scale.exp()),
        logit_bias=0.0,
        precision=precision,
        parity={},
        files=list_files(folder),
    )
    write_json(folder / MANIFEST, {"format": FORMAT, "version": VERSION, **plain(manifest)})


def _export_naive(size: Size, out: Path) -> None:
    """Write the naive graph: whole sequences of dynamic length, any number of classes."""
    import torch
    from torch import Tensor, nn
    from torch.nn import functional

    from export.onnx import Input, export_onnx
    from runtimes.prompts import feeds

    loaded = load_random(size, without_images=True)
    model: Any = loaded.model
    parts: Any = loaded.tower.parts

    class Naive(nn.Module):  # type: ignore[misc]
        """The text forward of published code, for sequences of the input's length."""

        def __init__(self) -> None:
            super().__init__()
            self.transformer = getattr(model, "text", model).transformer
            self.ln_final = parts.ln_final
            self.projection = parts.projection
            self.register_buffer("positions", parts.positions)

        def forward(
            self, contexts: Tensor, name_embeddings: Tensor, sequence_index: Tensor, tokens: Tensor
        ) -> Tensor:
            n_candidates, (n_classes, length) = contexts.shape[0], tokens.shape
            table = torch.cat([contexts, name_embeddings.expand(n_candidates, -1, -1)], 1)
            steps = torch.arange(length)
            x = table.index_select(1, sequence_index.reshape(-1))
            x = x.reshape(n_candidates * n_classes, length, -1)
            x = x + self.positions.index_select(0, steps)
            mask = torch.where(steps <= steps.unsqueeze(1), 0.0, float("-inf"))
            x = self.transformer(x, attn_mask=mask)
            # The end-of-text token has the largest id.
            starts = length * torch.arange(n_candidates * n_classes).reshape(n_candidates, -1)
            ends = (starts + tokens.argmax(-1)).reshape(-1)
            x = x.reshape(-1, x.shape[-1]).index_select(0, ends)
            x = x.reshape(n_candidates, n_classes, -1)
            return functional.normalize(self.ln_final(x) @ self.projection, dim=-1)

    spec = replace(loaded.text, graph="sequence")
    table = loaded.tower.embedding.weight.detach().numpy()
    given = {
        # Shorter than the model's 77 tokens, so that the length stays dynamic.
        name: torch.from_numpy(value[:, :13] if name != "name_embeddings" else value)
        for name, value in feeds(spec, table, _EXAMPLES, 6).items()
    }
    inputs = {
        "contexts": Input(torch.zeros(3, 6, spec.width), {0: "P", 1: "m"}),
        "name_embeddings": Input(given["name_embeddings"], {0: "R"}),
        "sequence_index": Input(given["sequence_index"], {0: "C", 1: "L"}),
        "tokens": Input(given["tokens"], {0: "C", 1: "L"}),
    }
    export_onnx(Naive(), inputs, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "benchmarks")
    kinds = ("lean", "naive", "prompt", "fp32", "int8", "fp16")
    parser.add_argument("--kind", choices=kinds, default="lean")
    parser.add_argument("--out", type=Path, help="for the kinds naive and prompt")
    arguments = parser.parse_args()
    size, cache = Size(arguments.model, arguments.layers), arguments.cache
    out = arguments.out or size.folder(cache, arguments.kind)
    if arguments.kind == "lean":
        lean(size, cache)
    elif arguments.kind == "naive":
        _export_naive(size, out)
    elif arguments.kind == "prompt":
        _export_prompt(size, out)
    elif not out.exists():
        if arguments.kind == "fp32":
            _export_full(size, out)
        else:
            _quantize_full(size, cache, arguments.kind, out)
    print(out)


if __name__ == "__main__":
    main()
