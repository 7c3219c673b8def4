"""Data sets in the Hugging Face hub's parquet format, from local files.

Images are in a column of structs {bytes, path}, labels are integers in another; the file's metadata
name both columns and the classes. The images are extracted once, to a folder next to the files,
which is then used like any other:

    images/train/00000000.png ...
    manifest.jsonl        as `data` takes it
    split.json            the same as lists with labels (coop.py), in the order of the rows
    source.json           which files it was made from

The image names in the data are not used: a data set must not choose where files are written.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ztune.data.coop import SPLITS, CoopSplit, Item, read_split, write_split
from ztune.data.manifests import SplitName, split_name
from ztune.data.parquet_pages import page_sizes
from ztune.errors import DataError, FormatError, how_to_install
from ztune.io.files import new_folder, open_regular, read_json, write_bytes, write_json
from ztune.io.image_formats import HEAD, format_of
from ztune.io.old_formats import PARQUET_FOLDER
from ztune.io.pixel_limit import max_pixels
from ztune.printing import reason_of

EXTRACTED = ("parquet-images", PARQUET_FOLDER)
"""Folders of images that were extracted, the one that is made now first."""
MANIFEST, SPLIT, SOURCE = "manifest.jsonl", "split.json", "source.json"
_PART = re.compile(r"(?:.*[-_.])?([A-Za-z]+)(?:-\d+-of-\d+.*)?")
_BYTES_PER_PIXEL = 4  # of an uncompressed image
_MOST_UNPACKED = 100
"""Bytes of images that one byte of a file may contain, above the bytes of one image."""


@dataclass(frozen=True)
class _Columns:
    """The columns of images and labels, and the class names."""

    image: str
    label: str
    names: tuple[str, ...]


def parquet_files(folder: Path) -> list[Path]:
    """Return the parquet files of a data set, in its folder or in `data/`."""
    for place in (folder, folder / "data"):
        if found := sorted(path for path in place.glob("*.parquet") if path.is_file()):
            return found
    return []


def extracted_below(folder: Path) -> Path:
    """Return the folder for the images of a data set's parquet files, an older one if it exists."""
    new, old = (folder / name for name in EXTRACTED)
    return old if old.is_dir() else new


def extract(files: Sequence[Path], out: Path) -> Path:
    """Write the images of these files to the folder `out`, all or nothing, and return it.

    An `out` made from the same files (names and sizes) is kept. Rows with the label -1 (an
    unlabelled test set) are left out.

    Raises: DataError without pyarrow, if `out` was made from other files, or for a file that is not
        parquet or has no labelled images.
    """
    source = {path.name: path.stat().st_size for path in files}
    if out.exists():
        if _source(out) != source:
            raise DataError(
                f'folder "{out}" was not made from {", ".join(source)} as they are now (remove it)'
            )
        return out
    if not source:
        raise DataError(f'parquet: no files to make "{out}" from')
    parquet = _parquet()
    lists: dict[SplitName, list[Item]] = {role: [] for role in SPLITS}
    known: _Columns | None = None
    divided = all(_role(path) for path in files)
    with new_folder(out) as work:
        for path in files:
            where = f'parquet "{path}"'
            with _reading(where):
                opened = parquet.ParquetFile(path)
                schema = opened.schema_arrow
            columns = _columns(schema, where)
            _check_types(schema, columns, where)
            if known is not None and columns != known:
                raise DataError(f"{where}: columns or classes differ from {files[0].name}")
            known = columns
            role = (_role(path) if divided else None) or "train"
            allowance = _Allowance(path, where)
            with _reading(where):
                allowance.check_columns(path, opened.metadata)
            for content, label in _rows(opened, columns, where):
                allowance.take(content)
                name = f"images/{role}/{len(lists[role]):08d}{_suffix(content, where)}"
                (work / name).parent.mkdir(parents=True, exist_ok=True)
                (work / name).write_bytes(content)
                lists[role].append(Item(name, label, columns.names[label]))
        split = CoopSplit(*(tuple(lists[role]) for role in SPLITS))
        if not any(split.counts.values()):
            raise DataError(f"parquet: no labelled images in {', '.join(source)}")
        rows = (
            {"path": item.path, "label": item.name, **({"split": role} if divided else {})}
            for role, item in split
        )
        write_bytes(work / MANIFEST, "".join(json.dumps(row) + "\n" for row in rows).encode())
        write_split(work / SPLIT, split)
        write_json(work / SOURCE, {"files": {**source}})
    return out


def read_extracted(folder: Path) -> CoopSplit:
    """Return the lists of an extracted data set, in the order of the rows."""
    return read_split(folder / SPLIT)


def _source(folder: Path) -> object:
    try:
        return read_json(folder / SOURCE, "parquet").get("files")
    except FormatError:
        return None


def _parquet() -> Any:
    """Import pyarrow's parquet module, an optional dependency."""
    try:
        return importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(
            "parquet files need pyarrow, which is not installed (install it with: "
            f"{how_to_install('parquet')}; or extract the images on another machine and copy the "
            "folder)"
        ) from None


@contextlib.contextmanager
def _reading(where: str) -> Iterator[None]:
    """Re-raise what pyarrow raises for a damaged file, which may be anything, as a DataError."""
    try:
        yield
    except DataError:
        raise
    except MemoryError:
        raise DataError(f"{where}: an image does not fit into memory") from None
    except Exception as error:
        raise DataError(f"{where}: not a parquet file, or damaged ({reason_of(error)})") from None


def _role(path: Path) -> SplitName | None:
    """Return the role in a file name such as train-00000-of-00002.parquet."""
    match = _PART.fullmatch(path.name.removesuffix(".parquet"))
    return split_name(match[1]) if match else None


def _columns(schema: Any, where: str) -> _Columns:
    """Read the features that the Hugging Face library writes to a file's metadata."""
    try:
        info = json.loads((schema.metadata or {}).get(b"huggingface", b"null"))
        features = info["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
        image = next((name for name, kind in kinds.items() if kind == "Image"), None)
        label = next((name for name, kind in kinds.items() if kind == "ClassLabel"), None)
        names = features[label]["names"] if label is not None else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise DataError(
            f"{where}: no `features` metadata of the Hugging Face library found"
        ) from None
    if image is None or label is None or not {image, label} <= set(schema.names):
        raise DataError(f"{where}: expected one column of images and one of class labels")
    if not isinstance(names, list) or not all(isinstance(n, str) and n.strip() for n in names):
        raise DataError(f'{where}: no class names of "{label}" in the metadata')
    return _Columns(image, label, tuple(names))


def _check_types(schema: Any, columns: _Columns, where: str) -> None:
    """Refuse lists, in which a few bytes of a row can stand for any number of values.

    Raises: DataError.
    """
    types = importlib.import_module("pyarrow.types")
    image, label = (schema.field(name).type for name in (columns.image, columns.label))
    parts = [field.type for field in image] if types.is_struct(image) else [image]
    if any(map(types.is_nested, [*parts, label])):
        raise DataError(
            f"{where}: columns of {image} and {label}, expected a struct of bytes and path, and an "
            "integer"
        )


def _rows(opened: Any, columns: _Columns, where: str) -> Iterator[tuple[bytes, int]]:
    with _reading(where):
        for place, row in enumerate(_read(opened, columns)):
            image, label = row[columns.image], row[columns.label]
            if label == -1:
                continue
            content = image.get("bytes") if isinstance(image, dict) else None
            if not isinstance(content, bytes):
                raise DataError(f"{where}, row {place}: no image, or only a path to one")
            if not isinstance(label, int) or not 0 <= label < len(columns.names):
                raise DataError(
                    f"{where}, row {place}: label is {label!r}, expected 0 to "
                    f"{len(columns.names) - 1}"
                )
            yield content, label


def _read(opened: Any, columns: _Columns) -> Iterator[dict[str, Any]]:
    # One row at a time: a few bytes of a dictionary can stand for a large image in every row.
    for batch in opened.iter_batches(1, columns=[columns.image, columns.label]):
        yield from batch.to_pylist()


class _Allowance:
    """Limits the bytes that are unpacked from one file: compressed zeros fill memory and disk."""

    def __init__(self, path: Path, where: str):
        self._image = _BYTES_PER_PIXEL * max_pixels()
        self._most = self._image + _MOST_UNPACKED * path.stat().st_size
        self._where, self._taken = where, 0

    def check_columns(self, path: Path, metadata: Any) -> None:
        groups = map(metadata.row_group, range(metadata.num_row_groups))
        columns = [group.column(n) for group in groups for n in range(group.num_columns)]
        with (
            open_regular(path) as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content,
        ):
            for column in columns:
                if column.num_values == 0:  # its pages are not read, and may not exist
                    continue
                start, unpacked = column.data_page_offset, 0
                if 0 < (column.dictionary_page_offset or 0) < start:
                    start = column.dictionary_page_offset
                for n_bytes in page_sizes(content, start, start + column.total_compressed_size):
                    unpacked += n_bytes
                    self._check(unpacked, self._most, "a column")

    def take(self, image: bytes) -> None:
        self._check(len(image), self._image, "an image")
        self._taken += len(image)
        self._check(self._taken, self._most, "the images")

    def _check(self, found: int, most: int, what: str) -> None:
        if found > most:
            raise DataError(
                f"{self._where}: {what} of {found} bytes, expected at most {most} (extract the "
                "images yourself, or allow more: `max_pixels`)"
            )


def _suffix(content: bytes, where: str) -> str:
    """Return the file suffix of an image by its first bytes."""
    if (found := format_of(content[:HEAD])) is None:
        raise DataError(f"{where}: unknown image format (it starts with {content[:8]!r})")
    return found
