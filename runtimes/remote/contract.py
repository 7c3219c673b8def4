"""Inputs and outputs of a bundle's models on a server, as docs/serving.md specifies them.

A server lists them in each model's metadata; they are checked against the bundle.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from runtimes.bundle import Bundle
from runtimes.remote.transport import NUMPY_TYPES
from ztune.errors import ServerError
from ztune.types import Json

IMAGE, TEXT, PROMPT, SCORE, CLIENT = "image", "text", "prompt", "score", "client"
BATCH = 8
"""Images or texts per request, and the largest batch of a server: a full request is never batched
with another client's, which could change rounding."""
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
    """Inputs and outputs of one model, as the server reports them."""

    inputs: Tensors
    outputs: Tensors

    @property
    def reports_digest(self) -> bool:
        """Whether each answer contains the bundle's digest."""
        return "digest" in self.outputs


def parse_offer(metadata: Mapping[str, Json], where: str) -> Offer:
    """Parse a model's metadata.

    Raises: ServerError when it is invalid.
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
                raise ServerError(f"{where}: invalid {key} in its metadata") from None
        return found

    return Offer(tensors("inputs"), tensors("outputs"))


def required_tensors(part: str, bundle: Bundle) -> tuple[Tensors, Tensors]:
    """Return the inputs and outputs that a model of this bundle must have."""
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
        {"bytes": Tensor("UINT8", (-1,)), "sizes": Tensor("INT64", (len(bundle.client_files),))},
    )


def check_offer(part: str, offer: Offer, bundle: Bundle, where: str) -> None:
    """Check a model's inputs and outputs against the bundle.

    Raises: ServerError naming the first tensor that is missing or different.
    """
    inputs, outputs = required_tensors(part, bundle)
    for kind, wanted, found in (
        ("input", inputs, offer.inputs),
        ("output", outputs, offer.outputs),
    ):
        for name, tensor in wanted.items():
            if name not in found:
                raise ServerError(
                    f'{where} has no {kind} "{name}" (make the models with: ztune export-triton)'
                )
            got = found[name]
            if got.datatype != tensor.datatype or not _fits(got.shape, tensor.shape):
                raise ServerError(
                    f'{where}: {kind} "{name}" is {got.datatype}{list(got.shape)}, expected '
                    f"{tensor.datatype}{list(tensor.shape)} (the client half is of another model)"
                )


def _fits(got: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    if not got:  # a server may omit shapes
        return True
    return len(got) == len(wanted) and all(
        g == w or -1 in (g, w) for g, w in zip(got, wanted, strict=True)
    )
