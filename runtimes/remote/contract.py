"""What the models of one bundle on a server take and give; docs/serving.md specifies it.

A server says what it offers in each model's metadata; this checks it against the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.bundle import CLIENT_FILES, Bundle
from runtimes.remote.transport import NUMPY_TYPES
from ztune.errors import ServerError
from ztune.types import Json

IMAGE, TEXT, PROMPT, SCORE, CLIENT = "image", "text", "prompt", "score", "client"
BATCH = 8
"""Images, or texts, of a request. A server puts no more into a call than a client asks for at
once, and so never others' beside them: sums of another shape may round differently."""
PARTS = (IMAGE, TEXT, PROMPT, SCORE, CLIENT)


@dataclass(frozen=True)
class Tensor:
    """An input or output: its datatype and its dimensions, -1 where they vary."""

    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        return NUMPY_TYPES[self.datatype]


Tensors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Offer:
    """What a server says of one model."""

    inputs: Tensors
    outputs: Tensors

    @property
    def tells_digest(self) -> bool:
        """Whether each answer says which bundle's it is."""
        return "digest" in self.outputs


def offer_of(metadata: Mapping[str, Json], where: str) -> Offer:
    """Return what a model's metadata says.

    Raises: ServerError when it is none.
    """

    def tensors(key: str) -> Tensors:
        listed = metadata.get(key, [])
        found = {}
        for entry in listed if isinstance(listed, list) else [None]:
            try:
                assert isinstance(entry, dict)
                shape = entry.get("shape", [])
                assert isinstance(shape, list)
                found[str(entry["name"])] = Tensor(
                    str(entry["datatype"]), tuple(int(str(size)) for size in shape)
                )
            except (AssertionError, KeyError, ValueError):
                raise ServerError(f"{where}: metadata of {key} cannot be read") from None
        return found

    return Offer(tensors("inputs"), tensors("outputs"))


def needed(part: str, bundle: Bundle) -> tuple[Tensors, Tensors]:
    """Return the inputs and outputs that a model must have for this bundle."""
    d, e, S = bundle.text.width, bundle.embed_dim, bundle.image.size
    texts = {"contexts": Tensor("FP32", (-1, -1, d)), "tokens": Tensor("INT64", (-1, -1))}
    features = {"features": Tensor("FP32", (-1, e))}
    if part == IMAGE:
        return {"pixels": Tensor("FP32", (-1, 3, S, S))}, features
    if part == TEXT:
        return {"tokens": Tensor("INT64", (-1, bundle.text.context_length))}, features
    if part == PROMPT:
        return texts, {"features": Tensor("FP32", (-1, -1, e))}
    if part == SCORE:
        return (
            {**texts, **features, "labels": Tensor("INT64", (-1,))},
            {"losses": Tensor("FP64", (-1,)), "correct": Tensor("INT64", (-1,))},
        )
    return (
        {"slice": Tensor("INT64", (2,))},
        {"bytes": Tensor("UINT8", (-1,)), "sizes": Tensor("INT64", (len(CLIENT_FILES),))},
    )


def check_offer(part: str, offer: Offer, bundle: Bundle, where: str) -> None:
    """See that a model takes and gives what this bundle's would.

    Raises: ServerError naming the first tensor that is missing or another.
    """
    inputs, outputs = needed(part, bundle)
    for kind, wanted, found in (
        ("input", inputs, offer.inputs),
        ("output", outputs, offer.outputs),
    ):
        for name, tensor in wanted.items():
            if name not in found:
                raise ServerError(
                    f'{where} has no {kind} "{name}" (models of another program? make them with: '
                    "ztune export-triton)"
                )
            got = found[name]
            if got.datatype != tensor.datatype or not _fits(got.shape, tensor.shape):
                raise ServerError(
                    f'{where}: {kind} "{name}" is {got.datatype}{list(got.shape)}, expected '
                    f"{tensor.datatype}{list(tensor.shape)} (another model than the client half's)"
                )


def _fits(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if not got:  # a server need not know shapes
        return True
    return len(got) == len(wanted) and all(
        g == w or -1 in (g, w) for g, w in zip(got, wanted, strict=True)
    )
