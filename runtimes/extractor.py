"""Encode images with a separate feature extractor: any image encoder in one ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from runtimes.bundle import Bundle, reading
from runtimes.graph_check import check_graph
from runtimes.ort import encoder_identity
from runtimes.preprocess import normalise, read_view
from runtimes.providers import Execution, open_session, run_graph
from ztune.errors import ConfigError
from ztune.io.files import sha256
from ztune.types import F32, U8, RandomView


class OrtExtractor:
    """A frozen feature extractor (an ImageEncoder whose features need not have unit length).

    The file has one input f32[N, 3, S, S], preprocessed as for the bundle's image tower, and one
    output f32[N, k].
    """

    def __init__(self, path: Path, bundle: Bundle, execution: Execution):
        self._path = path
        self._spec = bundle.image
        self._execution = execution
        self._open: Any = None
        with reading(f'extractor "{path}"'):
            if not path.is_file():
                raise ConfigError(f'extractor "{path}" does not exist')
            check_graph(path, None)
            digest = sha256(path)
        self._identity = encoder_identity(digest, bundle.image, execution)

    @property
    def identity(self) -> str:
        return self._identity

    @property
    def _session(self) -> Any:
        if self._open is None:
            self._open = open_session(self._path, self._execution)
        return self._open

    def width(self) -> int:
        """Return k.

        Raises: ConfigError when the file does not map any number of f32 images to one f32 vector of
            fixed length each.
        """
        inputs, outputs = self._session.get_inputs(), self._session.get_outputs()
        shape = inputs[0].shape if len(inputs) == 1 else []
        side = self._spec.size
        fits = len(shape) == 4 and shape[1] in (3, "3") and set(shape[2:]) <= {side, *_free(shape)}
        fits = fits and not isinstance(shape[0], int)
        vector = len(outputs) == 1 and len(outputs[0].shape) == 2
        wide = {value.type for value in (*inputs, *outputs)} == {"tensor(float)"}
        if not fits or not wide or not vector or not isinstance(outputs[0].shape[1], int):
            taken, given = ([f"{v.type} {v.shape}" for v in vs] for vs in (inputs, outputs))
            raise ConfigError(
                f'extractor "{self._path}" has inputs {taken} and outputs {given}, expected one '
                f"input f32[N, 3, {side}, {side}] for any N and one output f32[N, k]"
            )
        return int(outputs[0].shape[1])

    def read(self, path: Path, view: RandomView | None) -> U8:
        return read_view(path, self._spec, view)

    def encode(self, pixels: U8) -> F32:
        self.width()
        ready = {self._session.get_inputs()[0].name: normalise(pixels, self._spec)}
        name = self._session.get_outputs()[0].name
        features = run_graph(self._session, self._path, [name], ready)[0]
        return np.asarray(features, dtype=np.float32)


def _free(shape: list[Any]) -> set[str | None]:
    """Return the dynamic dimensions: names, or None."""
    return {size for size in shape if not isinstance(size, int)}
