"""Read and check a bundle: a folder with the graphs of one exported model and their manifest.

docs/formats.md specifies it.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, TypedDict

from msgspec import Meta, Struct

from runtimes.graph_check import check_graph
from runtimes.weights import BLOCK, TABLE, WEIGHTS, TokenTable, check_blocks
from ztune.errors import FormatError
from ztune.io.files import read_json, sha256
from ztune.io.kinds import wrong_kind
from ztune.io.schema import AtLeastOne, Count, Positive, Sha256, convert, current
from ztune.types import Json, TokenRows

FORMAT = "ztune-bundle"
VERSION = 2
MANIFEST = "bundle.json"
PARITY = "parity.safetensors"
IMAGE_PROMPTED = "image_prompted.onnx"
# In a path, where two slashes become one.
_URL = re.compile(r"(^|/)(tritons?|https?):/(.*)")
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]*")


Size = Annotated[int, Meta(ge=1, le=65536)]
"""A width or length; bounded, so that allocations stay small."""
Channels = Annotated[tuple[float, ...], Meta(min_length=3, max_length=3)]
Precision = Literal["fp32", "fp16", "int8"]
Store = Literal["fp32", "fp16"]


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
    store: Store = "fp32"
    """Precision of stored weights, which graphs of an fp32 bundle widen when they are opened."""
    rounding: Mapping[str, float] = {}
    """By graph: the worst cosine at export between features with stored and original weights."""
    visual: VisualSpec | None = None
    """None where the bundle has no `image_prompted.onnx`."""
    token_table: TokenTable | None = None
    """None in version 1, where it is the file `token_table.npy`."""
    weight_blocks: tuple[Sha256, ...] = ()
    """SHA-256 of every 2 MiB of `weights.bin`; in version 1 each graph has its own weights."""
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

    @property
    def client_files(self) -> tuple[str, ...]:
        """The client half: the files of a served bundle that its client needs, without graphs."""
        table = "token_table.npy" if self.token_table is None else TABLE
        return (MANIFEST, "tokenizer.json", table, PARITY)

    def file(self, name: str) -> Path:
        """Return the path of a file after checking size, digest and graph.

        Raises: FormatError when the file is missing, damaged or replaced, or as `check_graph`.
        """
        if name not in self.files:
            raise FormatError(f'bundle "{self.path}" has no {name} (export the model again)')
        with reading(f'bundle "{self.path}": {name}'):
            own = f"{name}.data"
            for part in (name, own):
                if part in self.files:
                    self._check(part, self.files[part])
            if name.endswith(".onnx"):
                self._check_graph(name, own)
        return self.path / name

    def map_table(self) -> TokenRows | None:
        """Return the token table of `weights.bin` or a client half, memory-mapped.

        None in version 1, where it is a file of its own.

        Raises: FormatError when it is missing, damaged or replaced.
        """
        table = self.token_table
        if table is None:
            return None
        with reading(f'bundle "{self.path}": token table'):
            if not (self.path / WEIGHTS).is_file():
                _, length = table.span
                self._check(TABLE, BundleFile(table.sha256, length))
                return table.map(self.path / TABLE, 0)
            self._check_weights([table.span])
            return table.map(self.path / WEIGHTS, table.offset)

    def check_client_files(self) -> None:
        """Check the files of the client half.

        Raises: FormatError as `file`.
        """
        self.map_table()
        for name in self.client_files[1:]:
            if name != TABLE:
                self.file(name)

    def _check_graph(self, name: str, own: str) -> None:
        if own in self.files or WEIGHTS not in self.files:
            check_graph(self.path / name, own if own in self.files else None)
        else:
            self._check_size(WEIGHTS, self.files[WEIGHTS])
            self._check_weights(check_graph(self.path / name, WEIGHTS))

    def _check_weights(self, spans: Iterable[tuple[int, int]]) -> None:
        self._check_size(WEIGHTS, self.files[WEIGHTS])
        where = f'bundle "{self.path}": {WEIGHTS}'
        check_blocks(self.path / WEIGHTS, self.weight_blocks, spans, where)

    def _check(self, name: str, listed: BundleFile) -> None:
        self._check_size(name, listed)
        if sha256(self.path / name) != listed.sha256:
            raise FormatError(
                f'bundle "{self.path}": {name}: SHA-256 differs from bundle.json (corrupted or '
                "replaced; export again)"
            )

    def _check_size(self, name: str, listed: BundleFile) -> None:
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
    _check_layout(manifest, where)
    fields = {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    return Bundle(path=path, digest=sha256(path / MANIFEST), manifest=raw, **fields)


def _check_layout(manifest: Manifest, where: str) -> None:
    """Check that what a manifest says of `weights.bin` and its parts fits together.

    Raises: FormatError.
    """
    weights, table = manifest.files.get(WEIGHTS), manifest.token_table
    if weights is None and table is None and not manifest.weight_blocks:
        return
    if weights is None or table is None:
        raise FormatError(
            f'{where}: only one of "token_table" and {WEIGHTS} is present, expected both or '
            "neither (export again)"
        )
    n_blocks = -(-weights.bytes // BLOCK)
    if len(manifest.weight_blocks) != n_blocks:
        raise FormatError(
            f"{where}: $.weight_blocks: expected {n_blocks} digests for {weights.bytes} bytes, got "
            f"{len(manifest.weight_blocks)} (export again)"
        )
    if sum(table.span) > weights.bytes or table.shape[1] != manifest.text.width:
        raise FormatError(
            f"{where}: $.token_table: {list(table.shape)} at offset {table.offset}, expected "
            f"[*, {manifest.text.width}] within the {weights.bytes} bytes of {WEIGHTS} (export "
            "again)"
        )


def compact_json(value: Mapping[str, Json]) -> str:
    """Return compact JSON with sorted keys: the same bytes for the same content."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
