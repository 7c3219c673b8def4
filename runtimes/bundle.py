"""The bundle's manifest, `bundle.json`: its one definition, read and checked here.

A bundle is a folder with the graphs of one exported model and all that a device needs to use them.
docs/formats.md specifies it.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztune.errors import FormatError
from ztune.io.fields import Fields
from ztune.io.files import open_regular, read_json, sha256
from ztune.io.kinds import wrong_kind
from ztune.types import Json

FORMAT = "ztune-bundle"
VERSION = 1
MANIFEST = "bundle.json"
PARITY = "parity.safetensors"
IMAGE_PROMPTED = "image_prompted.onnx"
CLIENT_FILES = (MANIFEST, "tokenizer.json", "token_table.npy", PARITY)
"""What a client of a server needs of the bundle that is served: its light half, without graphs."""
# Bytes of weights above which they go beside a graph: ONNX Runtime maps such a file, while it holds
# a graph's own bytes twice as it opens. A ViT-B/32 image pass peaks at 545 MB instead of 770.
EXTERNAL_THRESHOLD = 16_000_000
# Of a width or a length in the manifest: what is allocated by it stays small.
_LARGEST = 65536
# As a path, in which two slashes are one.
_URL = re.compile(r"(^|/)(tritons?|https?):/(.*)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the image tower's input: open_clip's evaluation transform."""

    size: int
    """Side of the square input in pixels."""
    mean: tuple[float, ...]
    """Per channel, of values in 0…1."""
    std: tuple[float, ...]
    interpolation: str
    """bicubic or bilinear."""
    resize_mode: str
    """shortest (then centre crop), longest (then pad), or squash."""
    fill_color: int
    """Grey level of the padding where resize_mode is longest."""


@dataclass(frozen=True)
class TextSpec:
    """How class names and contexts become the text tower's input."""

    width: int
    """Size d of a token embedding."""
    context_length: int
    """Tokens of a whole sequence."""
    prefix_ids: tuple[int, ...]
    """Before the text, [SOS] for most; empty for SigLIP."""
    suffix_ids: tuple[int, ...]
    """After the text: [EOT]."""
    pad_id: int
    cleaning: str
    """lower, whitespace, canonicalize or none: what is done to a text before its tokenizer."""
    causal: bool
    pooling: str
    """Where the tower reads its feature: argmax, eos, last, first or class."""
    graph: str
    """prefix: `prompt.onnx` shares the context's states between classes; sequence: it does not."""


@dataclass(frozen=True)
class VisualSpec:
    """The tokens that `image_prompted.onnx` takes, and the weights that embed its patches."""

    width: int
    """Size w of a token."""
    patch_values: int
    """How many values of an image make a patch."""
    patch_mean: float
    """Of the weights from a patch to its token."""
    patch_std: float


@dataclass(frozen=True)
class Bundle:
    """A checked manifest and the folder that it describes."""

    path: Path
    model_id: str
    """Digest of weights, architecture, tokenizer and preprocessing; equal across precisions."""
    digest: str
    """SHA-256 of bundle.json itself: this very export."""
    source: Mapping[str, str]
    """model, pretrained and licence of the weights, as far as known."""
    image: ImageSpec
    text: TextSpec
    embed_dim: int
    logit_scale: float
    """Already exponentiated."""
    logit_bias: float
    precision: str
    files: Mapping[str, tuple[str, int]]
    """SHA-256 and size in bytes by file name."""
    parity: Mapping[str, Mapping[str, float]]
    """Cosine and max_abs against torch by graph, as measured at export."""
    manifest: Mapping[str, Json]
    """The whole of bundle.json."""
    visual: VisualSpec | None = None
    """None where the bundle has no `image_prompted.onnx`."""

    @property
    def is_client_half(self) -> bool:
        """Whether none of the graphs is here that the manifest lists."""
        return not any((self.path / name).is_file() for name in self.files if ".onnx" in name)

    def file(self, name: str) -> Path:
        """Return the path of one file after checking size, digest and where it keeps its tensors.

        Raises: FormatError when the bundle has no such file, or it was damaged or replaced.
        """
        if name not in self.files:
            raise FormatError(f'bundle "{self.path}" has no {name} (export the model again)')
        with reading(f'bundle "{self.path}": {name}'):
            for part in (name, f"{name}.data"):
                if part in self.files:
                    self._check(part)
            if name.endswith(".onnx"):
                check_external_data(
                    self.path / name, f"{name}.data" if f"{name}.data" in self.files else None
                )
        return self.path / name

    def _check(self, name: str) -> None:
        digest, size = self.files[name]
        path = self.path / name
        where = f'bundle "{self.path}": {name}'
        if not path.is_file():
            if ".onnx" in name and self.is_client_half:
                raise FormatError(
                    f"{where} is not here: this is the client half of a bundle, which tunes only "
                    "against the server that has the graphs (name that server, or the whole bundle)"
                )
            raise FormatError(f"{where} is missing (export again)")
        found = path.stat().st_size
        if found != size:
            raise FormatError(
                f"{where} has {found} bytes, bundle.json says {size} "
                "(file damaged or replaced; export again)"
            )
        if sha256(path) != digest:
            raise FormatError(
                f"{where}: SHA-256 differs from bundle.json "
                "(file damaged or replaced; export again)"
            )


def load_bundle(path: Path) -> Bundle:
    """Read and check the manifest in folder `path`; the files are checked when they are used.

    Raises: FormatError when it is no bundle, one of a newer format, or cannot be read.
    """
    with reading(f'bundle "{path}"'):
        return _load(path)


@contextlib.contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn the system's errors on reading into a FormatError that names `what`."""
    try:
        yield
    except OSError as error:
        raise FormatError(f"{what} cannot be read: {error.strerror or error}") from None


def _load(path: Path) -> Bundle:
    if (url := _URL.search(str(path))) and not path.exists():
        raise FormatError(
            f'"{url[2]}://{url[3]}" is a server, expected the folder of a bundle (ztune tune, eval '
            "and doctor take servers)"
        )
    if not (path / MANIFEST).is_file():
        raise wrong_kind(path, "bundle")
    where = f'bundle "{path}": {MANIFEST}'
    raw = read_json(path / MANIFEST, where)
    top = Fields(raw, where)
    if raw.get("format") != FORMAT:
        raise FormatError(f'{where}: "format" is {raw.get("format")!r}, expected "{FORMAT}"')
    top.version(VERSION)
    files = {}
    listed = top.object("files")
    for name in listed.values:
        if not _PLAIN_NAME.fullmatch(name):
            raise FormatError(f"{where}: file name {name!r} is not a plain name")
        entry = listed.object(name)
        files[name] = (entry.text("sha256"), entry.integer("bytes"))
    parity_field = top.object("parity")
    parity = {}
    for graph in parity_field.values:
        figures = parity_field.object(graph)
        parity[graph] = {key: figures.number(key) for key in ("cosine", "max_abs")}
    source = top.object("source")
    scale = top.number("logit_scale")
    if scale <= 0:
        raise FormatError(f'{where}: "logit_scale" is {scale}, expected a positive number')
    return Bundle(
        path=path,
        model_id=top.text("model_id"),
        digest=sha256(path / MANIFEST),
        source={key: source.text(key) for key in source.values},
        image=image_spec(top.object("image")),
        text=_text_spec(top.object("text")),
        embed_dim=_size(top, "embed_dim"),
        logit_scale=scale,
        logit_bias=top.number("logit_bias"),
        precision=top.text("precision", among=("fp32", "fp16", "int8")),
        files=files,
        parity=parity,
        manifest=raw,
        visual=_visual_spec(top, IMAGE_PROMPTED in files),
    )


def _visual_spec(top: Fields, has_graph: bool) -> VisualSpec | None:
    if has_graph != ("visual" in top.values):
        raise FormatError(
            f'{top.where}: "visual" and {IMAGE_PROMPTED} belong together, one of them is missing '
            "(export again)"
        )
    if not has_graph:
        return None
    visual = top.object("visual")
    spec = VisualSpec(
        width=_size(visual, "width"),
        patch_values=visual.integer("patch_values", least=1),
        patch_mean=visual.number("patch_mean"),
        patch_std=visual.number("patch_std"),
    )
    if spec.patch_std <= 0:
        raise FormatError(f'{visual.where}: "patch_std" is not positive')
    return spec


def image_spec(image: Fields) -> ImageSpec:
    """Check the preprocessing part of a manifest; a classifier carries the same one."""
    spec = ImageSpec(
        size=image.integer("size", least=1),
        mean=image.numbers("mean", 3),
        std=image.numbers("std", 3),
        interpolation=image.text("interpolation", among=("bicubic", "bilinear")),
        resize_mode=image.text("resize_mode", among=("shortest", "longest", "squash")),
        fill_color=image.integer("fill_color"),
    )
    if min(spec.std) <= 0 or spec.fill_color > 255 or spec.size > 4096:
        raise FormatError(f"{image.where}: size, std or fill_color out of range")
    return spec


def _size(fields: Fields, key: str, least: int = 1) -> int:
    value = fields.integer(key, least)
    if value > _LARGEST:
        raise FormatError(f'{fields.where}: "{key}" is {value}, expected at most {_LARGEST}')
    return value


def _text_spec(text: Fields) -> TextSpec:
    return TextSpec(
        width=_size(text, "width"),
        context_length=_size(text, "context_length", least=2),
        prefix_ids=text.integers("prefix_ids"),
        suffix_ids=text.integers("suffix_ids"),
        pad_id=text.integer("pad_id"),
        cleaning=text.text("cleaning", among=("lower", "whitespace", "canonicalize", "none")),
        causal=text.flag("causal"),
        pooling=text.text("pooling", among=("argmax", "eos", "last", "first", "class")),
        graph=text.text("graph", among=("prefix", "sequence")),
    )


def check_external_data(graph: Path, allowed: str | None) -> None:
    """Refuse a graph that keeps tensors in any file but `allowed`, before ONNX Runtime sees it.

    Raises: FormatError naming the location, or when the file is no ONNX graph.
    """
    if graph.stat().st_size == 0:
        raise FormatError(f"{graph} is empty")
    # A tensor outside its file says so with the key "location". A file without this word has none,
    # and need not be parsed, which would take its whole size in memory.
    with (
        open_regular(graph) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        if content.find(b"location") < 0:
            return
    for location in _external_locations(graph):
        if location != allowed:
            raise FormatError(
                f"{graph} keeps tensors in {location!r}, "
                f"expected {allowed or 'all in one file'} (export again)"
            )


def _external_locations(graph: Path) -> Iterator[str]:
    """Yield where each tensor outside the file is, wherever in the graph it stands."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(graph), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise FormatError(f"{graph} is no ONNX graph ({error})") from None

    def tensors(message: Any) -> Iterator[Any]:
        if isinstance(message, onnx.TensorProto):
            yield message
        for field, value in message.ListFields():
            if field.message_type is not None:
                for part in [value] if hasattr(value, "ListFields") else value:
                    yield from tensors(part)

    for tensor in tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                yield entry.value


def describe(value: Mapping[str, Json]) -> str:
    """Return compact JSON with sorted keys: the same bytes for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
