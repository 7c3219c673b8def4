"""Convert an fp32 bundle to int8 for CPUs or fp16 for GPUs. Needs onnx, but not torch."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.half import to_half
from export.shared import SharedWeights
from export.weights import read_graph
from runtimes.bundle import (
    IMAGE_PROMPTED,
    MANIFEST,
    PARITY,
    VERSION,
    Bundle,
    Parity,
    list_files,
    load_bundle,
)
from runtimes.ort import parity_figures
from runtimes.prompts import token_table
from runtimes.providers import Execution, Setup, onnxruntime
from runtimes.weights import WEIGHTS
from ztune.errors import ConfigError, ZtuneError
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain
from ztune.types import Json

GRAPHS = ("image", "text", "prompt")
_OLD_TABLE = "token_table.npy"
_OF_FP32 = ("visual", "store", "rounding")
"""Entries of the manifest that do not apply to the result."""
# Measured towers keep 0.99 in int8 and 0.99999 in fp16.
_LEAST_COSINE = {"int8": 0.98, "fp16": 0.999}
PRECISIONS = tuple(_LEAST_COSINE)


def quantize_bundle(
    bundle: Bundle,
    out: Path,
    precision: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Write the bundle of the same model in `precision` to the new folder `out`.

    int8: matrix products with 8-bit weights, one scale per output channel; activations are
    quantized dynamically, one scale per tensor and call. Everything else stays in fp32.
    fp16: matrix products and the operators between them; see `export/half.py`.
    Both omit `image_prompted.onnx`: visual prompts are tuned in fp32.

    Raises: ConfigError for an unknown precision, a bundle that is not fp32, or an `out` that is not
    empty; ZtuneError when the result differs too much from torch.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f'unknown precision "{precision}" (expected {" or ".join(PRECISIONS)})')
    if bundle.precision != "fp32":
        raise ConfigError(
            f'bundle "{bundle.path}" is {bundle.precision}; only an fp32 bundle can be quantized'
        )
    with new_folder(out) as work:
        _write_files(bundle, work, precision, progress)
    return load_bundle(out)


def _write_files(
    bundle: Bundle,
    folder: Path,
    precision: str,
    progress: Callable[[str], None],
) -> None:
    parity: dict[str, Parity] = {}
    weights = SharedWeights(folder / WEIGHTS)
    for name in bundle.files:
        if not name.endswith((".onnx", ".onnx.data")) and name not in (WEIGHTS, _OLD_TABLE):
            shutil.copyfile(bundle.file(name), folder / name)
    for name in GRAPHS:
        graph = folder / f"{name}.onnx"
        progress(f"{name}.onnx: converting to {precision}")
        model = read_graph(bundle.file(f"{name}.onnx"))
        model = _to_int8(model, graph) if precision == "int8" else to_half(model)
        weights.move(model)
        graph.write_bytes(model.SerializeToString())
        # The only place where fp16 runs on a CPU, since parity is measured on any machine. `plain`
        # skips the optimisations that crash.
        setup = Setup(plain=precision == "fp16")
        figures = parity_figures(folder / PARITY, name, graph, Execution(), setup)
        progress(
            f"{name}.onnx: minimum cosine to torch {figures['cosine']:.5f}, maximum difference "
            f"{figures['max_abs']:.1e}"
        )
        if not figures["cosine"] >= _LEAST_COSINE[precision]:
            raise ZtuneError(
                f"{name}.onnx in {precision} has a cosine of {figures['cosine']:.4f} to torch "
                f"(expected at least {_LEAST_COSINE[precision]}): this model cannot be used in "
                f"{precision}"
            )
        parity[name] = figures
    if bundle.visual is not None:
        progress(f"{IMAGE_PROMPTED}: omitted, since image tokens need the fp32 bundle")
    manifest: dict[str, Json] = {
        **{key: value for key, value in bundle.manifest.items() if key not in _OF_FP32},
        **weights.finish(token_table(bundle)),
        "version": VERSION,
        "precision": precision,
        "parity": plain(parity),
        "files": plain(list_files(folder)),
        "derived_from": bundle.digest,
    }
    write_json(folder / MANIFEST, manifest)


def _to_int8(model: Any, target: Path) -> Any:
    """Return the graph with 8-bit weights; temporary files go into the folder of `target`."""
    onnxruntime()  # disables telemetry
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
    try:
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            result = Path(folder) / target.name
            quantize_dynamic(
                model,
                result,
                op_types_to_quantize=["MatMul", "Gemm"],
                weight_type=QuantType.QInt8,
                per_channel=True,
                # Protobuf files are limited to 2 GB; write_graph merges small ones again.
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
            return read_graph(result)
    finally:
        root.setLevel(level)
