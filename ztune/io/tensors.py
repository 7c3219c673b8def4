"""Named arrays and one JSON document in a safetensors file, the same bytes for the same content."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from ztune.errors import FormatError
from ztune.io.files import write_bytes
from ztune.io.schema import decoded
from ztune.types import Json

# safetensors writes the keys of its metadata in an order that changes from process to process;
# one key holding a whole document with sorted keys keeps the bytes equal.
_KEY = "ztune"


def write_tensors(
    path: Path, arrays: Mapping[str, NDArray[Any]], document: Mapping[str, Json]
) -> None:
    """Write arrays and a document to `path`, whole or not at all."""
    write_bytes(path, tensor_bytes(arrays, document))


def tensor_bytes(arrays: Mapping[str, NDArray[Any]], document: Mapping[str, Json]) -> bytes:
    """Return what `write_tensors` writes."""
    text = json.dumps(document, sort_keys=True, ensure_ascii=False, allow_nan=False)
    contiguous = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    return bytes(save(contiguous, metadata={_KEY: text}))


def read_tensors(path: Path, what: str) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    """Read what `write_tensors` wrote.

    Raises: FormatError naming `what` when the file is absent, damaged, or not one of ours.
    """
    if not path.is_file():
        raise FormatError(f"{what}: {path} does not exist")
    try:
        with safe_open(str(path), framework="numpy") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text = metadata[_KEY]
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise FormatError(
            f"{what}: {path} is damaged or no file of ztune's ({type(error).__name__}: {error})"
        ) from None
    return arrays, decoded(text, f"{what}: {path}: {_KEY} metadata")
