"""The state of a nested optimizer: arrays as `name.array`, values as one value `name`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ztune.errors import FormatError
from ztune.types import Json, State


def put_state(name: str, state: State) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    """Return the arrays and values to add to the outer state."""
    arrays, values = state
    return {f"{name}.{key}": array for key, array in arrays.items()}, {name: dict(values)}


def get_state(name: str, state: State) -> State:
    """Return the inner state.

    Raises: FormatError if the value `name` is missing or invalid.
    """
    arrays, values = state
    inner = values[name]
    if not isinstance(inner, dict):
        raise FormatError(f'saved optimizer: invalid state "{name}" (file damaged)')
    start = f"{name}."
    own = {key[len(start) :]: value for key, value in arrays.items() if key.startswith(start)}
    return own, inner
