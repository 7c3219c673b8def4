"""Read and check a bundle: a folder with the graphs of one exported model and their manifest.

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
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct

from ztune.errors import FormatError
from ztune.io.files import open_regular, read_json, sha256
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
# Untrusted graphs must terminate and read no other file; ztune uses only standard operators.
_STANDARD = ("", "ai.onnx")
"""Allowed operator domains; others have loops without a subgraph, or load files."""
_BYTES = 2  # the wire type of messages, strings and bytes
_FIXED = {1: 8, 5: 4}
_LONGEST_NUMBER = 10  # bytes
# Field numbers of onnx.proto.
_MODEL_GRAPH, _MODEL_TRAINING, _MODEL_FUNCTIONS = 7, 20, 25
_GRAPH_NODE, _GRAPH_WEIGHT, _GRAPH_SPARSE = 1, 5, 15
_NODE_OPERATOR, _NODE_ATTRIBUTE, _NODE_DOMAIN = 4, 5, 7
_ATTRIBUTE_TENSORS, _ATTRIBUTE_GRAPHS, _ATTRIBUTE_SPARSE = (5, 10), (6, 11), (22, 23)
_SPARSE_TENSORS = (1, 2)
_TENSOR_EXTERNAL = 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2


Size = Annotated[int, Meta(ge=1, le=65536)]
"""A width or length; bounded, so that allocations stay small."""
Channels = Annotated[tuple[float, ...], Meta(min_length=3, max_length=3)]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class ImageSpec:
    """How an image becomes the image tower's input, in open_clip's or transformers' evaluation."""

    size: Annotated[int, Meta(ge=1, le=4096)]
    """Side of the square input in pixels."""
    mean: Channels
    """Per channel, for values in 0…1."""
    std: Annotated[tuple[Positive, ...], Meta(min_length=3, max_length=3)]
    interpolation: Literal["bicubic", "bilinear"]
    resize_mode: Literal["shortest", "shortest_floor", "longest", "squash"]
    """shortest (then centre crop), longest (then pad), or squash; with shortest_floor the crop
    starts at a position rounded down."""
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
    cleaning: Literal["lower", "whitespace", "canonicalize", "siglip", "none"]
    """Applied to a text before tokenization; siglip is that of transformers' SiglipTokenizer."""
    causal: bool
    pooling: Literal["argmax", "eos", "last", "first", "class", "mean"]
    """The position of the feature, or the mean of all that are not padding."""
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


def check_graph(graph: Path, allowed: str | None) -> None:
    """Refuse a graph that may not terminate, or with external data in a file other than `allowed`.

    Raises: FormatError for control flow (a subgraph), a function, an operator of another domain
        than ONNX's, external data elsewhere, or a file that is not an ONNX graph; OSError.
    """
    with open_regular(graph) as file:
        if graph.stat().st_size == 0:
            raise FormatError(f"{graph} is empty")
        with (
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
            memoryview(content) as view,
        ):
            _Walk(view, graph, allowed).model()


class _Walk:
    """One pass over a graph in protobuf's wire format, where a span is a message's start and end.

    It skips weights, which a parser would hold in memory.
    """

    def __init__(self, content: memoryview, path: Path, allowed: str | None):
        self._content, self._path, self._allowed = content, path, allowed

    def model(self) -> None:
        found = False
        for number, span in self._fields((0, len(self._content))):
            if number in (_MODEL_FUNCTIONS, _MODEL_TRAINING):
                raise self._refusal("has functions")
            if number == _MODEL_GRAPH:
                self._graph(span)
                found = True
        if not found:
            raise self._damaged()

    def _graph(self, graph: tuple[int, int]) -> None:
        for number, span in self._fields(graph):
            if number == _GRAPH_NODE:
                self._node(span)
            elif number == _GRAPH_WEIGHT:
                self._tensor(span)
            elif number == _GRAPH_SPARSE:
                self._sparse(span)

    def _node(self, node: tuple[int, int]) -> None:
        operator = ""
        for number, span in self._fields(node):
            if number == _NODE_OPERATOR:
                operator = self._text(span)
            elif number == _NODE_DOMAIN and (domain := self._text(span)) not in _STANDARD:
                raise self._refusal(f"has an operator of the domain {domain!r}")
            elif number == _NODE_ATTRIBUTE:
                self._attribute(span, operator)

    def _attribute(self, attribute: tuple[int, int], operator: str) -> None:
        for number, span in self._fields(attribute):
            if number in _ATTRIBUTE_GRAPHS:
                raise self._refusal(f"has control flow (operator {operator or 'unknown'!r})")
            if number in _ATTRIBUTE_TENSORS:
                self._tensor(span)
            elif number in _ATTRIBUTE_SPARSE:
                self._sparse(span)

    def _sparse(self, sparse: tuple[int, int]) -> None:
        for number, span in self._fields(sparse):
            if number in _SPARSE_TENSORS:
                self._tensor(span)

    def _tensor(self, tensor: tuple[int, int]) -> None:
        for number, span in self._fields(tensor):
            if number == _TENSOR_EXTERNAL:
                entry = [(part, self._text(text)) for part, text in self._fields(span)]
                if (_ENTRY_KEY, "location") not in entry:
                    continue
                for location in (text for part, text in entry if part == _ENTRY_VALUE):
                    if location != self._allowed:
                        raise FormatError(
                            f"{self._path} stores tensors in {location!r}, "
                            f"expected {self._allowed or 'all in one file'} (export again)"
                        )

    def _fields(self, message: tuple[int, int]) -> Iterator[tuple[int, tuple[int, int]]]:
        """Yield number and span of a message's fields that hold bytes."""
        place, end = message
        while place < end:
            tag, place = self._number(place, end)
            kind, start = tag & 7, place
            if kind == _BYTES:
                length, start = self._number(place, end)
                place = start + length
            elif kind == 0:
                _, place = self._number(place, end)
            elif kind in _FIXED:
                place += _FIXED[kind]
            else:  # groups, which ONNX does not have
                raise self._damaged()
            if place > end or not 8 <= tag < 1 << 32:  # protobuf would cut off the bits above
                raise self._damaged()
            if kind == _BYTES:
                yield tag >> 3, (start, place)

    def _number(self, place: int, end: int) -> tuple[int, int]:
        """Return a varint and the place after it."""
        value = 0
        for position in range(min(_LONGEST_NUMBER, end - place)):
            byte = self._content[place + position]
            value |= (byte & 0x7F) << 7 * position
            if byte < 0x80:
                return value, place + position + 1
        raise self._damaged()

    def _text(self, span: tuple[int, int]) -> str:
        return bytes(self._content[slice(*span)]).decode(errors="backslashreplace")

    def _refusal(self, what: str) -> FormatError:
        return FormatError(
            f"{self._path} {what}, expected a graph of standard ONNX operators without control "
            "flow, which always terminates (export again)"
        )

    def _damaged(self) -> FormatError:
        return FormatError(
            f"{self._path} cannot be opened: it is not an ONNX graph (corrupted or replaced)"
        )


def compact_json(value: Mapping[str, Json]) -> str:
    """Return compact JSON with sorted keys: the same bytes for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
