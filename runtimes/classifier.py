"""Open a packed `classifier.onnx` and run it on images."""

from __future__ import annotations

import hashlib
import itertools
import mmap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from msgspec import Meta
from numpy.typing import NDArray
from PIL import Image

from runtimes.bundle import ImageSpec, Precision, reading
from runtimes.conversions import count_conversions, report_conversions
from runtimes.graph_check import check_graph
from runtimes.preprocess import ImageLike, crop, with_image
from runtimes.providers import Execution, check_precision, open_session, run_graph
from ztune.errors import DataError, FormatError, ImageSizeError, ProviderError
from ztune.io.files import open_regular, sha256
from ztune.io.kinds import kind_of, wrong_kind
from ztune.io.pixel_limit import ROOM
from ztune.io.schema import Count, Record, convert, current, decoded
from ztune.printing import broken_images, first_few
from ztune.progress import SILENCE, Progress, warn
from ztune.types import F32, U8, Json

FORMAT = "ztune-classifier"
VERSION = 4
# A file ends with the metadata entry `sha256`, in protobuf: 64 digits, of all bytes before it.
_SEAL = b"\x72\x4a\x0a\x06sha256\x12\x40"
_SEALED_SINCE = 3
DATA_SHA256 = "data_sha256"
"""Metadata entry with the SHA-256 of the file with external weights."""
INLIER_SCORE = "inlier_score"
"""The optional third output."""
_BATCH = 32  # images of one call


class ClassifierMetadata(Record, frozen=True):
    """A classifier's ONNX metadata."""

    classes: tuple[str, ...]
    image: ImageSpec
    resize: bool
    model_id: str
    bundle_digest: str
    precision: Precision
    source: Mapping[str, str]
    method: str
    config: Mapping[str, Json]
    seed: Count
    queries: Count
    tuning_images: tuple[Annotated[str, Meta(pattern=r"^[0-9a-f]{16}\Z")], ...]
    """First 8 bytes of the SHA-256 of every image used for tuning, in hexadecimal."""
    temperature: Annotated[float, Meta(gt=0)] | None = None
    """By which `probabilities` are calibrated; None: not fitted."""
    reject: Annotated[float, Meta(gt=0, lt=1)] | None = None
    """The share of images of the classes that `inlier_score` was set to refuse; None: no output."""


class Outputs(NamedTuple):
    """What a classifier returns for N images."""

    logits: F32
    """f32[N, C]"""
    probabilities: F32
    """f32[N, C]"""
    inlier_scores: F32 | None
    """f32[N], below 0 for an image of none of the classes; None if it cannot tell."""

    @property
    def unknown(self) -> NDArray[np.bool_]:
        """Which images are of none of the classes, bool[N]; without scores none is."""
        if self.inlier_scores is None:
            return np.zeros(len(self.logits), dtype=np.bool_)
        return np.asarray(self.inlier_scores < 0)


@dataclass(frozen=True)
class Classifier:
    """An open classifier and its metadata."""

    path: Path
    classes: tuple[str, ...]
    image: ImageSpec
    resize: bool
    """Whether the graph resizes images itself."""
    method: str
    precision: str
    temperature: float | None
    """Of `probabilities`; None if it was not fitted."""
    reject: float | None
    """The share of images of the classes that it refuses; None: it cannot refuse."""
    tuning_images: tuple[int, ...]
    """First 8 bytes of the SHA-256 of every image used for tuning."""
    session: Any

    @property
    def takes_batches(self) -> bool:
        """Whether a call may have several images.

        Not if the graph resizes, since sizes differ, nor for int8, which scales activations over a
        whole call.
        """
        return not self.resize and self.precision != "int8"

    def read(self, image: ImageLike, name: str = "image") -> U8:
        """Return an image as the graph's input: u8[S, S, 3], or u8[H, W, 3] with `resize`.

        `name` is used in errors for images in memory.

        Raises: DataError for an image that cannot be read.
        """

        def as_input(decoded: Image.Image) -> U8:
            return np.asarray(decoded, dtype=np.uint8) if self.resize else crop(decoded, self.image)

        return with_image(image, name, as_input)

    def classify(self, pixels: U8) -> Outputs:
        """Return the outputs of pixels u8[N, H, W, 3]."""
        names = ["logits", "probabilities", *([INLIER_SCORE] if self.reject else [])]
        # A graph that resizes holds its input in 32 bits.
        with ROOM.taken(pixels.size // 3 if self.resize else 0):
            found = run_graph(self.session, self.path, names, {"pixels": pixels})
        return Outputs(found[0], found[1], found[2] if self.reject else None)


def open_classifier(path: Path, execution: Execution) -> Classifier:
    """Open and check a classifier.

    Warns once about a file of an older ztune, which has no digest.

    Raises: FormatError when the file is missing, damaged or not packed by ztune, or when its
        metadata do not match its graph.
    """
    where = f'classifier "{path}"'
    weights = Path(f"{path}.data")
    with reading(where):
        if not path.is_file() or kind_of(path) == "artifact":
            raise wrong_kind(path, "classifier")
        check_graph(path, weights.name if weights.is_file() else None)
        sealed = _check_seal(path, where)
        _check_precision(path, execution.provider)
    try:
        session = open_session(path, execution)
    except ProviderError as error:
        raise FormatError(
            f"{where} cannot be opened (corrupted, or not an ONNX file?): {error}"
        ) from None
    entries = session.get_modelmeta().custom_metadata_map
    if "ztune" not in entries:
        raise FormatError(f"{where} was not packed by ztune (make one with: ztune pack)")
    document = decoded(entries["ztune"], where)
    metadata = convert(current(document, FORMAT, VERSION, where), ClassifierMetadata, where)
    if not sealed:
        if document["version"] not in range(1, _SEALED_SINCE):
            raise _changed(where)
        warn(f"{where} has no digest, so damage is not found (pack again with this ztune)")
    if DATA_SHA256 in entries:
        with reading(where):
            if sha256(weights) != entries[DATA_SHA256]:
                raise _changed(f"{where}: {weights.name}")
    _check_graph(session, metadata, where)
    return Classifier(
        path=path,
        classes=metadata.classes,
        image=metadata.image,
        resize=metadata.resize,
        method=metadata.method,
        precision=metadata.precision,
        temperature=metadata.temperature,
        reject=metadata.reject,
        tuning_images=tuple(int(digits, 16) for digits in metadata.tuning_images),
        session=session,
    )


def seal(path: Path) -> None:
    """Append the entry with a file's digest, which `open_classifier` checks."""
    digest = sha256(path).encode()
    with path.open("ab") as file:
        file.write(_SEAL + digest)


def _check_seal(path: Path, where: str) -> bool:
    """Return whether a file ends with its digest.

    Raises: FormatError when it ends with another one.
    """
    size = path.stat().st_size - len(_SEAL) - 64
    digest = hashlib.sha256()
    with open_regular(path) as file:
        file.seek(max(size, 0))
        end = file.read()
        if not end.startswith(_SEAL):
            return False
        file.seek(0)
        while block := file.read(min(1 << 20, size - file.tell())):
            digest.update(block)
    if end != _SEAL + digest.hexdigest().encode():
        raise _changed(where)
    return True


def _changed(what: str) -> FormatError:
    return FormatError(
        f"{what} differs from its SHA-256 (corrupted, or changed after packing; pack again)"
    )


def _check_precision(path: Path, provider: str) -> None:
    """Refuse a precision that the provider cannot run before opening, which could crash.

    The file contains the metadata as compact, uncompressed JSON.
    """
    with (
        open_regular(path) as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        for precision in ("fp16", "int8"):
            if content.find(f'"precision":"{precision}"'.encode()) >= 0:
                check_precision(precision, provider)


def _check_graph(session: Any, metadata: ClassifierMetadata, where: str) -> None:
    classes, n = metadata.classes, len(metadata.classes)
    if len(set(classes)) < max(n, 2):
        raise FormatError(f"{where}: expected at least two different classes (pack again)")
    inputs = {value.name: value.type for value in session.get_inputs()}
    outputs = {value.name: value.shape[1:] for value in session.get_outputs()}
    expected: dict[str, list[int]] = {"logits": [n], "probabilities": [n]}
    if metadata.reject is not None:
        expected[INLIER_SCORE] = []
    if inputs != {"pixels": "tensor(uint8)"} or outputs != expected:
        raise FormatError(
            f"{where}: inputs or outputs do not match the metadata, expected pixels u8, and "
            f"{' and '.join(expected)} of {n} classes (changed after packing; pack again)"
        )


def classify(
    classifier: Classifier,
    paths: Sequence[Path],
    skip_broken: bool,
    progress: Progress = SILENCE,
) -> tuple[Outputs, NDArray[np.bool_]]:
    """Return the outputs of the readable images, and which those are, bool[N].

    Raises: DataError naming all broken images; with `skip_broken` only when all are broken.
    """
    kept = np.ones(len(paths), dtype=np.bool_)
    reasons: list[str] = []

    def readable() -> Iterator[U8]:
        for number, path in enumerate(paths):
            ticker.update(number + 1)
            try:
                pixels = classifier.read(path)
            except DataError as error:
                if isinstance(error, ImageSizeError) and not skip_broken:
                    raise
                reasons.append(str(error))
                kept[number] = False
            else:
                if skip_broken or not reasons:  # else only the names of the others are wanted
                    yield pixels

    with progress.activity("classifying", len(paths)) as ticker:
        outputs = classify_pixels(classifier, readable())
    broken = [str(path) for path, keep in zip(paths, kept, strict=True) if not keep]
    if broken and not skip_broken:
        raise DataError(broken_images(reasons[0], broken))
    if not kept.any():
        raise DataError(f"none of {len(paths)} image(s) can be read")
    if not kept.all():
        warn(f"{len(broken)} broken images left out: {first_few(broken)}")
    readable_paths = [path for path, keep in zip(paths, kept, strict=True) if keep]
    report_conversions(count_conversions(readable_paths), "images", progress)
    return outputs, kept


def classify_pixels(classifier: Classifier, pixels: Iterable[U8]) -> Outputs:
    """Return the outputs of images from `Classifier.read`."""
    waiting, size = iter(pixels), _BATCH if classifier.takes_batches else 1
    nothing: F32 = np.zeros((0, len(classifier.classes)), dtype=np.float32)
    results = [Outputs(nothing, nothing, nothing[:, 0] if classifier.reject else None)]
    while batch := list(itertools.islice(waiting, size)):
        results.append(classifier.classify(np.stack(batch)))
    logits, probabilities = (np.concatenate([one[k] for one in results]) for k in range(2))
    scores = [one.inlier_scores for one in results if one.inlier_scores is not None]
    return Outputs(logits, probabilities, np.concatenate(scores) if scores else None)
