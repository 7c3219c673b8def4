"""An fp32 bundle in another precision: int8 for CPUs, fp16 for GPUs. Needs onnx, but no torch."""

from __future__ import annotations

import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from export.half import to_half
from export.weights import read_graph, write_graph
from runtimes.bundle import (
    EXTERNAL_THRESHOLD,
    IMAGE_PROMPTED,
    MANIFEST,
    PARITY,
    Bundle,
    Parity,
    files_of,
    load_bundle,
)
from runtimes.ort import parity_figures
from runtimes.providers import Execution, Setup, onnxruntime
from ztune.errors import ConfigError, ZtuneError
from ztune.io.files import new_folder, write_json
from ztune.io.schema import plain
from ztune.types import Json

GRAPHS = ("image", "text", "prompt")
# Below this a tower is another model; measured ones keep 0.99 in int8 and 0.99999 in fp16.
_LEAST_COSINE = {"int8": 0.98, "fp16": 0.999}
PRECISIONS = tuple(_LEAST_COSINE)


def quantize_bundle(
    bundle: Bundle,
    out: Path,
    precision: str,
    progress: Callable[[str], None] = lambda line: None,
    *,
    external_threshold: int = EXTERNAL_THRESHOLD,
) -> Bundle:
    """Write the bundle of the same model in `precision` to the new folder `out`.

    int8: matrix products with weights in 8 bits, one scale per output channel; activations are
    quantized as they come (dynamic), one scale per tensor and call. All else stays in 32 bits.
    fp16: matrix products and what lies between them in 16 bits; see `export/half.py`.
    Either leaves out `image_prompted.onnx`: visual prompts are tuned in 32 bits.

    Raises: ConfigError for a precision that cannot be made, a bundle that is not fp32, or an `out`
    that holds something; ZtuneError when the result is too far from torch's figures.
    """
    if precision not in PRECISIONS:
        raise ConfigError(
            f'precision "{precision}" cannot be derived, expected {" or ".join(PRECISIONS)}'
        )
    if bundle.precision != "fp32":
        raise ConfigError(
            f'bundle "{bundle.path}" is {bundle.precision}; only an fp32 bundle can be quantized'
        )
    with new_folder(out) as work:
        _fill(bundle, work, precision, progress, external_threshold)
    return load_bundle(out)


def _fill(
    bundle: Bundle,
    folder: Path,
    precision: str,
    progress: Callable[[str], None],
    external_threshold: int,
) -> None:
    parity: dict[str, Parity] = {}
    for name in bundle.files:
        if not name.endswith((".onnx", ".onnx.data")):
            shutil.copyfile(bundle.file(name), folder / name)
    for name in GRAPHS:
        graph = folder / f"{name}.onnx"
        progress(f"{name}.onnx: converting to {precision}")
        model = read_graph(bundle.file(f"{name}.onnx"))
        model = _to_int8(model, graph) if precision == "int8" else to_half(model)
        write_graph(model, graph, external_threshold)
        # The one place where 16 bit run on a CPU: the figures must be had wherever a bundle is
        # derived, and only optimisations that are skipped here have been seen to crash.
        setup = Setup(plain=precision == "fp16")
        figures = parity_figures(folder / PARITY, name, graph, Execution(), setup)
        progress(
            f"{name}.onnx: cosine to torch at least {figures['cosine']:.5f}, differs by at most "
            f"{figures['max_abs']:.1e}"
        )
        if not figures["cosine"] >= _LEAST_COSINE[precision]:
            raise ZtuneError(
                f"{name}.onnx in {precision} has a cosine of {figures['cosine']:.4f} to torch's "
                f"features, expected at least {_LEAST_COSINE[precision]}: this model loses too "
                f"much in {8 if precision == 'int8' else 16} bits"
            )
        parity[name] = figures
    if bundle.visual is not None:
        progress(f"{IMAGE_PROMPTED}: left out, since image tokens need the fp32 bundle")
    manifest: dict[str, Json] = {
        **{key: value for key, value in bundle.manifest.items() if key != "visual"},
        "precision": precision,
        "parity": plain(parity),
        "files": plain(files_of(folder)),
        "derived_from": bundle.digest,
    }
    write_json(folder / MANIFEST, manifest)


def _to_int8(model: Any, target: Path) -> Any:
    """Return the graph with 8-bit weights; files beside `target` serve on the way."""
    onnxruntime()  # as everywhere: without telemetry
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
                # A file of more than 2 GB cannot be one; what is small ends up in one again.
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True},
            )
            return read_graph(result)
    finally:
        root.setLevel(level)
