"""An fp32 bundle in another precision: int8 for CPUs. Needs onnx and ONNX Runtime, no torch."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from runtimes.bundle import MANIFEST, PARITY, Bundle, load_bundle
from runtimes.ort import parity_figures
from runtimes.providers import Execution
from ztune.errors import ConfigError, ZtuneError
from ztune.files import new_folder, sha256, write_json
from ztune.types import Json

GRAPHS = ("image", "text", "prompt")
# Below this an int8 tower is another model; measured ones keep 0.99 and more.
_LEAST_COSINE = 0.98


def quantize_bundle(
    bundle: Bundle,
    out: Path,
    precision: str,
    progress: Callable[[str], None] = lambda line: None,
) -> Bundle:
    """Write the bundle of the same model in `precision` to the new folder `out`.

    int8: matrix products with weights in 8 bits, one scale per output channel; activations are
    quantized as they come (dynamic), one scale per tensor and call. All else stays in 32 bits.

    Raises: ConfigError for a precision that cannot be made, a bundle that is not fp32, or an `out`
    that holds something; ZtuneError when the result is too far from torch's figures.
    """
    if precision != "int8":
        raise ConfigError(f'precision "{precision}" cannot be derived, only int8')
    if bundle.precision != "fp32":
        raise ConfigError(
            f'bundle "{bundle.path}" is {bundle.precision}; only an fp32 bundle can be quantized'
        )
    with new_folder(out) as work:
        _fill(bundle, work, progress)
    return load_bundle(out)


def _fill(bundle: Bundle, folder: Path, progress: Callable[[str], None]) -> None:
    parity: dict[str, Json] = {}
    for name in bundle.files:
        if not name.endswith((".onnx", ".onnx.data")):
            shutil.copyfile(bundle.file(name), folder / name)
    for name in GRAPHS:
        graph = folder / f"{name}.onnx"
        _to_int8(bundle.file(f"{name}.onnx"), graph)
        figures = parity_figures(folder / PARITY, name, graph, Execution())
        progress(
            f"{name}.onnx: cosine to torch at least {figures['cosine']:.5f}, differs by at most "
            f"{figures['max_abs']:.1e}"
        )
        if not figures["cosine"] >= _LEAST_COSINE:
            raise ZtuneError(
                f"{name}.onnx in int8 has a cosine of {figures['cosine']:.4f} to torch's features, "
                f"expected at least {_LEAST_COSINE}: this model loses too much in 8 bits"
            )
        parity[name] = dict(figures)
    files: dict[str, Json] = {
        file.name: {"sha256": sha256(file), "bytes": file.stat().st_size}
        for file in sorted(folder.iterdir())
    }
    manifest = {
        **bundle.manifest,
        "precision": "int8",
        "parity": parity,
        "files": files,
        "derived_from": bundle.digest,
    }
    write_json(folder / MANIFEST, manifest)


def _to_int8(source: Path, target: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # it recommends a preparation that changes nothing here
    try:
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul", "Gemm"],
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
    finally:
        root.setLevel(level)
