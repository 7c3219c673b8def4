"""Named arrays and a JSON document in a safetensors file; equal content gives equal bytes."""

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

# safetensors writes metadata keys in an order that varies between processes; a single key with a
# sorted document keeps the bytes equal.
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

    Raises: FormatError naming `what` if the file is missing, damaged or foreign.
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
            f"{what}: {path} is damaged or not written by ztune ({type(error).__name__}: {error})"
        ) from None
    return arrays, decoded(text, f"{what}: {path}: {_KEY} metadata")
