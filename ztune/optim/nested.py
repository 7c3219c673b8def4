"""The state of a nested optimizer: arrays as `name.array`, values as one value `name`."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from ztune.types import Json, State


def put_state(name: str, state: State) -> tuple[dict[str, NDArray[Any]], dict[str, Json]]:
    """Return the arrays and values to add to the outer state."""
    arrays, values = state
    return {f"{name}.{key}": array for key, array in arrays.items()}, {name: dict(values)}
