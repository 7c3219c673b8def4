"""Read and check a bundle: a folder with the graphs of one exported model and their manifest.

docs/formats.md specifies it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct

from runtimes.graph_check import check_graph
from ztune.errors import FormatError
from ztune.io.files import read_json, sha256
from ztune.io.kinds import wrong_kind
from ztune.io.schema import AtLeastOne, Count, Positive, convert, current
from ztune.types import Json

FORMAT = "ztune-bundle"
VERSION = 1
MANIFEST = "bundle.json"
PARITY = "parity.safetensors"
IMAGE_PROMPTED = "image_prompted.onnx"
CLIENT_FILES = (MANIFEST, "tokenizer.json", "token_table.npy", PARITY)
"""The client half: the files of a served bundle that its client needs, without graphs."""
# Bytes of weights above which they are external data: ONNX Runtime maps that file, but holds a
# graph's own bytes twice while opening. A ViT-B/32 image pass peaks at 545 MB instead of 770.
EXTERNAL_THRESHOLD = 16_000_000
# In a path, where two slashes become one.
_URL = re.compile(r"(^|/)(tritons?|https?):/(.*)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


Size = Annotated[int, Meta(ge=1, le=65536)]
"""A width or length; bounded, so that allocations stay small."""
Channels = Annotated[tuple[float, ...], Meta(min_length=3, max_length=3)]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the image tower's input: open_clip's evaluation transform."""

    size: Annotated[int, Meta(ge=1, le=4096)]
    """Side of the square input in pixels."""
    mean: Channels
    """Per channel, for values in 0…1."""
    std: Annotated[tuple[Positive, ...], Meta(min_length=3, max_length=3)]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "longest", "squash"]
    """shortest (then centre crop), longest (then pad), or squash."""
    fill_color: Annotated[int, Meta(ge=0, le=255)]
    """Grey level of the padding where resize_mode is longest."""


@dataclass(frozen=True)
class TextSpec:
    """How class names and contexts become the text tower's input."""

    width: Size
    """Size d of a token embedding."""
    context_length: Annotated[int, Meta(ge=2, le=65536)]
    """Tokens of a whole sequence."""
    prefix_ids: tuple[Count, ...]
    """Before the text: usually [SOS]; empty for SigLIP."""
    suffix_ids: tuple[Count, ...]
    """After the text: [EOT]."""
    pad_id: Count
    cleaning: Literal["lower", "whitespace", "canonicalize", "none"]
    """Applied to a text before tokenization."""
    causal: bool
    pooling: Literal["argmax", "eos", "last", "first", "class"]
    """The position of the feature."""
    graph: Literal["prefix", "sequence"]
    """Whether `prompt.onnx` shares the context's states between classes (prefix) or not."""


@dataclass(frozen=True)
class VisualSpec:
    """The tokens that `image_prompted.onnx` takes, and the weights that embed its patches."""

    width: Size
    """Size w of a token."""
    patch_values: AtLeastOne
    """Values per image patch."""
    patch_mean: float
    """Mean of the patch embedding's weights."""
    patch_std: Positive


@dataclass(frozen=True)
class BundleFile:
    """A file's entry in the manifest."""

    sha256: str
    bytes: Count


class Parity(TypedDict):
    """The largest difference of a graph from torch, measured at export."""

    cosine: float
    max_abs: float


class Manifest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`bundle.json`; unknown keys are ignored."""

    model_id: str
    """Digest of weights, architecture, tokenizer and preprocessing; equal across precisions."""
    source: Mapping[str, str]
    """model, pretrained and licence of the weights, if known."""
    image: ImageSpec
    text: TextSpec
    embed_dim: Size
    logit_scale: Positive
    """Already exponentiated."""
    logit_bias: float
    precision: Precision
    visual: VisualSpec | None = None
    """None where the bundle has no `image_prompted.onnx`."""
    parity: Mapping[str, Parity]
    """By graph."""
    files: Mapping[str, BundleFile]


class Bundle(Manifest, frozen=True, kw_only=True):
    """A checked manifest and its folder."""

    path: Path
    digest: str
    """SHA-256 of bundle.json, which identifies the export."""
    manifest: Mapping[str, Json]
    """The whole of bundle.json."""

    @property
    def is_client_half(self) -> bool:
        """Whether all graphs of the manifest are absent."""
        return not any((self.path / name).is_file() for name in self.files if ".onnx" in name)

    def file(self, name: str) -> Path:
        """Return the path of a file after checking size, digest and graph.

        Raises: FormatError when the file is missing, damaged or replaced, or as `check_graph`.
        """
        if name not in self.files:
            raise FormatError(f'bundle "{self.path}" has no {name} (export the model again)')
        with reading(f'bundle "{self.path}": {name}'):
            for part in (name, f"{name}.data"):
                if part in self.files:
                    self._check(part)
            if name.endswith(".onnx"):
                check_graph(
                    self.path / name, f"{name}.data" if f"{name}.data" in self.files else None
                )
        return self.path / name

    def _check(self, name: str) -> None:
        listed = self.files[name]
        path = self.path / name
        where = f'bundle "{self.path}": {name}'
        if not path.is_file():
            if ".onnx" in name and self.is_client_half:
                raise FormatError(
                    f"{where} is missing: this is the client half of a bundle, without graphs (use "
                    "its server, or the whole bundle)"
                )
            raise FormatError(f"{where} is missing (export again)")
        found = path.stat().st_size
        if found != listed.bytes:
            raise FormatError(
                f"{where} has {found} bytes, expected {listed.bytes} "
                "(corrupted or replaced; export again)"
            )
        if sha256(path) != listed.sha256:
            raise FormatError(
                f"{where}: SHA-256 differs from bundle.json (corrupted or replaced; export again)"
            )


def list_files(folder: Path) -> dict[str, BundleFile]:
    """Return the manifest entries of a folder's files, by name."""
    return {
        file.name: BundleFile(sha256(file), file.stat().st_size)
        for file in sorted(folder.iterdir())
    }


def load_bundle(path: Path) -> Bundle:
    """Read and check the manifest in folder `path`; files are checked when used.

    Raises: FormatError when it is not a bundle, has a newer format, or cannot be read.
    """
    with reading(f'bundle "{path}"'):
        return _load(path)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert an OSError to a FormatError that names `what`."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{what} cannot be read: {error.strerror or error}") from None


def _load(path: Path) -> Bundle:
    if (url := _URL.search(str(path))) and not path.exists():
        raise FormatError(
            f'"{url[2]}://{url[3]}" is a server, expected the folder of a bundle (ztune tune, eval '
            "and doctor accept servers)"
        )
    if not (path / MANIFEST).is_file():
        raise wrong_kind(path, "bundle")
    where = f'bundle "{path}": {MANIFEST}'
    raw = read_json(path / MANIFEST, f'bundle "{path}"')
    manifest = convert(current(raw, FORMAT, VERSION, where), Manifest, where)
    for name in manifest.files:
        if not _PLAIN_NAME.fullmatch(name):
            raise FormatError(f"{where}: file name {name!r} is not a plain name")
    if (IMAGE_PROMPTED in manifest.files) != (manifest.visual is not None):
        raise FormatError(
            f'{where}: only one of "visual" and {IMAGE_PROMPTED} is present, expected both or '
            "neither (export again)"
        )
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return Bundle(path=path, digest=sha256(path / MANIFEST), manifest=raw, **fields)


def compact_json(value: Mapping[str, Json]) -> str:
    """Return compact JSON with sorted keys: the same bytes for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
