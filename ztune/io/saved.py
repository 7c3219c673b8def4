"""The saved state of an optimizer or sampler, checked as it is read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ztune.errors import FormatError
from ztune.io.generator import generator_from_json
from ztune.types import F32, F64, I64, Json, State

_DAMAGED = "file damaged, or of another version"


class Saved:
    """Arrays by shape and values by range; all arrays are copies.

    >>> saved = Saved(({"point": np.zeros(3)}, {"step": 2}))
    >>> saved.f64("point", 3).shape, saved.count("step")
    ((3,), 2)
    """

    def __init__(self, state: State):
        self._arrays, self._values = state

    def __contains__(self, name: str) -> bool:
        """Return whether there is an array of this name."""
        return name in self._arrays

    def f64(self, name: str, *shape: int | None) -> F64:
        """Return finite f64 of a shape, where None is any size."""
        return self._array(name, np.float64, shape)

    def f32(self, name: str, *shape: int | None) -> F32:
        """Return finite f32 of a shape, where None is any size."""
        return self._array(name, np.float32, shape)

    def indices(self, name: str, below: int, *shape: int | None) -> I64:
        """Return i64 in 0…below - 1 of a shape, where None is any size."""
        array: I64 = self._array(name, np.int64, shape)
        self.require(bool(((array >= 0) & (array < below)).all()), name, f"indices below {below}")
        return array

    def number(self, name: str, least: float = -math.inf, most: float = math.inf) -> float:
        """Return a finite number in least…most."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._wrong(name, f"{type(value).__name__}, expected a number")
        with_limits = f"a finite number in {least:g}…{most:g}"
        self.require(
            abs(value) <= np.finfo(np.float64).max and least <= value <= most, name, with_limits
        )
        return float(value)

    def count(self, name: str, least: int = 0, most: int = 2**62) -> int:
        """Return an integer in least…most."""
        value = self._value(name)
        if isinstance(value, bool) or not isinstance(value, int):
            raise self._wrong(name, f"{type(value).__name__}, expected an integer")
        self.require(least <= value <= most, name, f"an integer in {least}…{most}")
        return value

    def choice(self, name: str, options: Sequence[str]) -> str:
        """Return one of several words."""
        value = self._value(name)
        self.require(value in options, name, f"one of {', '.join(options)}")
        return str(value)

    def is_null(self, name: str) -> bool:
        """Return whether a value is null."""
        return self._value(name) is None

    def generator(self) -> np.random.Generator:
        return generator_from_json(self._value("generator"))

    def inner(self, name: str) -> Saved:
        """Return a nested state, as of `put_state`."""
        values, start = self._value(name), f"{name}."
        if not isinstance(values, dict):
            raise self._wrong(name, f"{type(values).__name__}, expected an object")
        arrays = {
            key[len(start) :]: array for key, array in self._arrays.items() if key.startswith(start)
        }
        return Saved((arrays, values))

    def has_inner(self, name: str) -> bool:
        """Return whether there is a nested state, or a part of it."""
        return name in self._values or any(key.startswith(f"{name}.") for key in self._arrays)

    @property
    def state(self) -> State:
        return self._arrays, self._values

    def require(self, holds: bool, name: str, expected: str) -> None:
        """Raise a FormatError that names an array or value unless it `holds`."""
        if not holds:
            raise self._wrong(name, f"invalid, expected {expected}")

    def _array(self, name: str, dtype: type[Any], shape: tuple[int | None, ...]) -> NDArray[Any]:
        if name not in self._arrays:
            raise self._wrong(name, "missing")
        array = self._arrays[name]
        fits = len(shape) == array.ndim and all(
            size in (None, found) for size, found in zip(shape, array.shape, strict=True)
        )
        if array.dtype != dtype or not fits:
            sizes = ", ".join("*" if size is None else str(size) for size in shape)
            raise self._wrong(
                name,
                f"{array.dtype}{list(array.shape)}, expected {np.dtype(dtype)}[{sizes}]",
            )
        self.require(bool(np.isfinite(array).all()), name, "finite values (the run diverged?)")
        return np.array(array)

    def _value(self, name: str) -> Json:
        if name not in self._values:
            raise self._wrong(name, "missing")
        return self._values[name]

    def _wrong(self, name: str, found: str) -> FormatError:
        return FormatError(f'"{name}" is {found} ({_DAMAGED})')
