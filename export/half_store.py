"""Store weights in half precision: round a model's matrices to fp16, and say what that changes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from ztune.errors import ConfigError
from ztune.types import F32


@contextlib.contextmanager
def rounded_to_half(model: nn.Module) -> Iterator[None]:
    """Round the matrices and kernels of a model to fp16, in fp32, until the end.

    Vectors (biases, gains) keep their precision: they take no space.

    Raises: ConfigError for a weight above fp16's maximum.
    """
    kept = {
        name: (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and parameter.dtype == torch.float32 and parameter.numel()
    }
    for name, (_, values) in kept.items():
        most = float(values.abs().max())
        if most > torch.finfo(torch.float16).max:
            raise ConfigError(
                f"weight {name} has values up to {most:.3g}, above the fp16 maximum of 65504 "
                "(leave out `store=fp16`)"
            )
    try:
        for parameter, values in kept.values():
            # In place, since other tensors share the memory.
            parameter.data.copy_(values.half())
        yield
    finally:
        for parameter, values in kept.values():
            parameter.data.copy_(values)


def to_exact_half(values: F32) -> NDArray[np.float16] | None:
    """Return values in fp16, or None if that changes one."""
    with np.errstate(over="ignore"):
        rounded = values.astype(np.float16)
    return rounded if np.array_equal(rounded.astype(np.float32), values) else None


def worst_cosine(features: F32, exact: F32) -> float:
    """Return the smallest cosine between features [..., e] and those of the exact weights."""
    one, other = features.astype(np.float64), exact.astype(np.float64)
    norms = np.linalg.norm(one, axis=-1) * np.linalg.norm(other, axis=-1)
    return float(((one * other).sum(-1) / norms).min())
