"""Mutations of documents, arrays and files, drawn by hypothesis."""

import json
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from hypothesis import strategies as st
from numpy.typing import NDArray

Array = NDArray[Any]
_SIMPLE: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, -1, 2, 3, 2**31, 2**63, -(2**64), 1e308, -0.5, 0.5, 1e-320, "", "x",
     "0", "nan", "\x00", "é" * 300, [], {}, [1], {"a": None}, [[[[{}]]]]]
)  # fmt: skip
JSON = _SIMPLE | st.integers(-(2**70), 2**70) | st.floats(-1e9, 1e9) | st.text(max_size=3)
PLACE = st.integers(0, 2**30)


def _with(array: Array, place: int, value: float) -> Array:
    if array.size:
        array.flat[place % array.size] = np.asarray(value).astype(array.dtype)
    return array


def _float_with(array: Array, place: int, value: float) -> Array:
    return _with(array.astype(np.result_type(array, np.float32)), place, value)


DAMAGES: dict[str, Callable[[Array, int], Array | None]] = {
    "missing": lambda array, place: None,
    "NaN": lambda array, place: _float_with(array, place, np.nan),
    "infinity": lambda array, place: _float_with(array, place, -np.inf),
    "negative": lambda array, place: _with(array, place, -7),
    "large": lambda array, place: _with(array, place, 1e9),
    "flat": lambda array, place: array.reshape(-1),
    "another axis": lambda array, place: array[None],
    "transposed": lambda array, place: np.ascontiguousarray(array.T),
    "shorter": lambda array, place: array[:-1],
    "empty": lambda array, place: array[:0],
    "longer": lambda array, place: np.concatenate([array, array]),
    "narrower": lambda array, place: np.ascontiguousarray(array[..., :-1]),
    "single": lambda array, place: array.astype(np.float32),
    "double": lambda array, place: array.astype(np.float64),
    "half": lambda array, place: array.astype(np.float16),
    "integers": lambda array, place: array.astype(np.int64),
    "bytes": lambda array, place: array.astype(np.uint8),
    "truth": lambda array, place: array.astype(np.bool_),
}
"""By name: what becomes of an array, None if it is left out; `place` chooses an element."""


def damage(arrays: Mapping[str, Array], kind: str, place: int) -> dict[str, Array]:
    """Return arrays of which the one chosen by `place` is damaged."""
    changed = {name: array.copy() for name, array in arrays.items()}
    if changed:
        name = sorted(changed)[place % len(changed)]
        with np.errstate(all="ignore"):
            array = DAMAGES[kind](changed.pop(name), place // len(arrays))
        if array is not None:
            changed[name] = array
    return changed


MISSING = "\x00 missing"
"""The value that removes a part."""


def mutate(document: Any, place: int, value: Any) -> Any:
    """Return a JSON document with the part chosen by `place` replaced by a value, or removed."""
    part = changed = json.loads(json.dumps(document))
    while part:
        keys: Any = list(part) if isinstance(part, dict) else range(len(part))
        key, place = keys[place % len(keys)], place // len(keys)
        if isinstance(part[key], dict | list) and part[key] and place % 4:
            part, place = part[key], place // 4
        elif value == MISSING:
            del part[key]
            return changed
        else:
            part[key] = value
            return changed
    return value


VALUES = st.just(MISSING) | JSON

Edit = tuple[str, int, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "cut", "remove", "repeat"]),
        PLACE,
        st.binary(min_size=1, max_size=8)
        | st.sampled_from([b"\n", b"\0", b"\xff\xfe", b"{", b'"', b",", b"-1", b"1e999", b"NaN"]),
    ),
    min_size=1,
    max_size=3,
)
"""Edits of a file's bytes."""


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Return a file's content after some edits."""
    for kind, place, new in edits:
        at = place % (len(content) + 1)
        if kind == "replace":
            content = content[:at] + new + content[at + len(new) :]
        elif kind == "insert":
            content = content[:at] + new + content[at:]
        elif kind == "cut":
            content = content[:at]
        elif kind == "remove":
            content = content[:at] + content[at + len(new) :]
        else:
            content = content[:at] + content[at // 2 : at] + content[at:]
    return content
