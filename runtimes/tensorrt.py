"""TensorRT's provider options: cached engines, shape ranges and fp16."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from runtimes.weights import WEIGHTS
from ztune.errors import FormatError, ProviderError
from ztune.io.files import sha256, user_cache

Shapes = Mapping[str, tuple[int, ...]]


def options(
    graph: Path | bytes, calls: Sequence[Shapes], remark: Callable[[str], None]
) -> dict[str, str]:
    """Return the provider's options for a graph; call `remark` when an engine must be built.

    A graph in memory is a probe, whose small engine is not cached.

    Raises: ProviderError when the cache folder cannot be created or is not private.
    """
    # fp16 is allowed only for fp16 graphs, whose norms stay in fp32.
    chosen = {
        "trt_fp16_enable": "True" if _is_half(graph) else "False",
        "trt_layer_norm_fp32_fallback": "True",
        **_profiles(calls),
    }
    if isinstance(graph, bytes):
        return chosen
    root = user_cache("tensorrt")
    folder = root / engine_name(graph, calls)
    try:
        for path in (root, folder):
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            # An engine is executable code: never load one that another user could have written.
            if hasattr(os, "getuid") and (
                path.stat().st_uid != os.getuid() or path.stat().st_mode & 0o022
            ):
                raise ProviderError(
                    f"the TensorRT engine cache {path} is owned or writable by another user; set "
                    "XDG_CACHE_HOME to a private folder"
                )
    except OSError as error:
        raise ProviderError(
            f"the TensorRT engine cache {folder} cannot be created ({error.strerror or error}); "
            "set XDG_CACHE_HOME to a writable folder"
        ) from None
    if not any(folder.glob("*.engine")):
        remark(
            f"building the TensorRT engine for {graph.name}; the first time this can take ten "
            "minutes"
        )
    return {
        **chosen,
        "trt_engine_cache_enable": "True",
        "trt_engine_cache_path": str(folder),
        "trt_timing_cache_enable": "True",
        "trt_timing_cache_path": str(root),
    }


def engine_name(graph: Path, calls: Sequence[Shapes]) -> str:
    """Return the name of an engine's folder, from the graph's path and content, and the shapes.

    ONNX Runtime distinguishes engines by the graph's structure, but not by its weights.
    """
    digest = hashlib.sha256(str(graph.resolve()).encode())
    for part in (graph, graph.with_name(f"{graph.name}.data"), graph.with_name(WEIGHTS)):
        if part.exists():
            digest.update(sha256(part).encode())
    for call in calls:
        digest.update(repr(sorted(call.items())).encode())
    return f"{graph.stem}-{digest.hexdigest()[:16]}"


def _profiles(calls: Sequence[Shapes]) -> dict[str, str]:
    """Return the range of shapes to build for; without calls, TensorRT uses those of the inputs."""
    if not calls:
        return {}

    def shown(shapes: Shapes) -> str:
        return ",".join(f"{name}:{'x'.join(map(str, shape))}" for name, shape in shapes.items())

    def extreme(pick: Callable[[Sequence[int]], int]) -> Shapes:
        return {
            name: tuple(pick(sizes) for sizes in zip(*(call[name] for call in calls), strict=True))
            for name in calls[0]
        }

    return {
        "trt_profile_min_shapes": shown(extreme(min)),
        "trt_profile_max_shapes": shown(extreme(max)),
        "trt_profile_opt_shapes": shown(calls[0]),
    }


def _is_half(graph: Path | bytes) -> bool:
    """Return whether a graph computes with fp16 weights, rather than only storing them."""
    import onnx
    from google.protobuf.message import DecodeError

    try:
        if isinstance(graph, bytes):
            model = onnx.load_model_from_string(graph)
        else:
            model = onnx.load(str(graph), load_external_data=False)
    except (DecodeError, ValueError) as error:
        raise FormatError(f"the graph for TensorRT is not an ONNX graph ({error})") from None
    half = {w.name for w in model.graph.initializer if w.data_type == onnx.TensorProto.FLOAT16}
    return any(
        node.op_type != "Cast" and half.intersection(node.input) for node in model.graph.node
    )
