"""A numpy generator's state as JSON, so that a resumed run draws the same numbers."""

from __future__ import annotations

import numpy as np

from ztune.errors import FormatError
from ztune.types import Json


def generator_to_json(rng: np.random.Generator) -> Json:
    """Return the PCG64 state, with 128-bit integers as strings."""
    state = rng.bit_generator.state
    return {
        "kind": state["bit_generator"],
        "state": str(state["state"]["state"]),
        "inc": str(state["state"]["inc"]),
        "has_uint32": state["has_uint32"],
        "uinteger": state["uinteger"],
    }


def generator_from_json(value: Json) -> np.random.Generator:
    """Return a generator in a saved state.

    Raises: FormatError for an invalid PCG64 state.
    """
    if not isinstance(value, dict) or value.get("kind") != "PCG64":
        raise FormatError("saved generator: not a PCG64 state (file damaged)")
    try:
        if int(str(value["inc"])) % 2 == 0 or int(str(value["has_uint32"])) not in (0, 1):
            raise ValueError("not one that NumPy makes")
        bits = np.random.PCG64()
        bits.state = {
            "bit_generator": "PCG64",
            "state": {"state": int(str(value["state"])), "inc": int(str(value["inc"]))},
            "has_uint32": int(str(value["has_uint32"])),
            "uinteger": int(str(value["uinteger"])),
        }
    except (KeyError, ValueError, OverflowError) as error:
        raise FormatError(f"saved generator: invalid state ({error})") from None
    return np.random.Generator(bits)
