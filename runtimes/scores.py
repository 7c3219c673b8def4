"""Compute losses on the prompt graph's device, without copying features to the host."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np

from runtimes.binding import DEVICES
from runtimes.ort import OrtPromptEncoder
from runtimes.providers import Execution, explain_graph_errors, onnxruntime, open_session
from ztune.errors import ConfigError
from ztune.types import F32, F64, I64, Batch, Prompts, Scores

_NAME = "the score graph"


class OrtScores:
    """Softmax cross-entropy and accuracy in a small graph (a Scorer).

    The prompt graph's output and the image features f32[V * N, e] stay on the device; a step sends
    the rows i64[N] of its images and their labels i64[N], and fetches two numbers per candidate.
    """

    def __init__(
        self,
        encoder: OrtPromptEncoder,
        features: F32,
        logit_scale: float,
        logit_bias: float,
        execution: Execution,
    ):
        """Copy unit features f32[V, N, e] of the images to the device; logit_scale multiplies.

        Raises: ProviderError when the graph cannot be opened.
        """
        self._encoder = encoder
        self._n_images = features.shape[1]
        # TensorRT has no 64-bit types, so this graph runs on CUDA.
        provider = "cuda" if execution.provider == "tensorrt" else execution.provider
        groups = encoder.plan.groups
        self._session = open_session(
            score_graph(len(groups), features.shape[-1], logit_scale, logit_bias),
            replace(execution, provider=provider),
        )
        table = np.ascontiguousarray(features.reshape(-1, features.shape[-1]), dtype=np.float32)
        value = onnxruntime().OrtValue
        self._table = value.ortvalue_from_numpy(table, DEVICES[provider], 0)
        # The position of each class in the graph's order, which is by group.
        self._places = np.argsort(np.concatenate(groups)).astype(np.int64)

    def __call__(self, prompts: Prompts, batch: Batch, labels: I64) -> Scores:
        if prompts.contexts is None or prompts.visual is not None:
            raise ConfigError("visual prompts cannot be scored on the device, only contexts")
        rows = batch.views * self._n_images + batch.images
        feeds = {"rows": rows.astype(np.int64), "labels": self._places[labels]}
        parts = [
            self._score(texts, feeds) for texts in self._encoder.encode_on_device(prompts.contexts)
        ]
        losses, accuracies = (np.concatenate(part) for part in zip(*parts, strict=True))
        return Scores(losses, accuracies)

    def _score(self, texts: list[Any], feeds: dict[str, I64]) -> tuple[F64, F64]:
        """Return losses f64[p] and accuracies f64[p] of features f32[p, C_g, e] by class group."""
        with explain_graph_errors(_NAME):
            binding = self._session.io_binding()
            for number, part in enumerate(texts):
                binding.bind_ortvalue_input(f"texts_{number}", part)
            binding.bind_ortvalue_input("table", self._table)
            for name, array in feeds.items():
                binding.bind_cpu_input(name, np.ascontiguousarray(array))
            binding.bind_output("losses")
            binding.bind_output("accuracies")
            self._session.run_with_iobinding(binding)
            losses, accuracies = binding.copy_outputs_to_cpu()
        return losses, accuracies


def score_graph(n_groups: int, embed_dim: int, logit_scale: float, logit_bias: float) -> bytes:
    """Return a graph from features by class group to losses f64[p] and accuracies f64[p].

    Inputs: `texts_0` … f32[p, C_g, e], `table` f32[R, e], its `rows` i64[N], and `labels` i64[N] in
    the order of the groups.
    """
    from onnx import TensorProto, helper

    def tensor(name: str, kind: int, *shape: int | str) -> Any:
        return helper.make_tensor_value_info(name, kind, shape)

    f32, f64, i64 = TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64
    texts = [f"texts_{number}" for number in range(n_groups)]
    scoring, constants = scoring_nodes(logit_scale, logit_bias)
    nodes = [
        helper.make_node("Concat", texts, ["texts"], axis=1),
        helper.make_node("Gather", ["table", "rows"], ["images"], axis=0),
        *scoring,
        helper.make_node("Cast", ["right"], ["hits"], to=f64),
        helper.make_node("ReduceMean", ["hits", "not_candidates"], ["accuracies"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "scores",
        [tensor(name, f32, "p", f"C_{name}", embed_dim) for name in texts]
        + [tensor("table", f32, "R", embed_dim), tensor("rows", i64, "N")]
        + [tensor("labels", i64, "N")],
        [tensor(name, f64, "p") for name in ("losses", "accuracies")],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return bytes(model.SerializeToString())


def scoring_nodes(logit_scale: float, logit_bias: float) -> tuple[list[Any], list[Any]]:
    """Return nodes and constants from text features to losses; `not_candidates` is a constant too.

    From `texts` f32[p, C, e], `images` f32[N, e], `labels` i64[N] to `logits` f32[p, N, C],
    `losses` f64[p] and `right` bool[p, N, 1]. Logits are f32, softmax and mean f64, as on the host;
    an image is right when no class has a larger logit than its own.
    """
    from onnx import TensorProto, helper, numpy_helper

    def node(operator: str, inputs: str, output: str, **attributes: Any) -> Any:
        return helper.make_node(operator, inputs.split(), [output], **attributes)

    constants: dict[str, Any] = {
        "scale": np.float32(logit_scale),
        "bias": np.float32(logit_bias),
        "outer": np.array([0, 2], dtype=np.int64),
        "one": np.array([1], dtype=np.int64),
        "over_classes": np.array([2], dtype=np.int64),
        "not_candidates": np.array([1, 2], dtype=np.int64),
    }
    nodes = [
        # Not ArgMax, which copied its input from CUDA to the host.
        node("Transpose", "texts", "by_class", perm=[0, 2, 1]),
        node("MatMul", "images by_class", "cosines"),  # [p, N, C]
        node("Mul", "cosines scale", "scaled"),
        node("Add", "scaled bias", "logits"),
        node("Shape", "logits", "n_candidates", start=0, end=1),
        node("Concat", "n_candidates one one", "repeats", axis=0),
        node("Unsqueeze", "labels outer", "label_column"),  # [1, N, 1]
        node("Tile", "label_column repeats", "index"),  # [p, N, 1]
        node("Cast", "logits", "wide", to=TensorProto.DOUBLE),
        node("LogSoftmax", "wide", "log_likelihoods", axis=-1),
        node("GatherElements", "log_likelihoods index", "chosen", axis=-1),
        node("ReduceMean", "chosen not_candidates", "mean_likelihood", keepdims=0),
        node("Neg", "mean_likelihood", "losses"),
        node("GatherElements", "logits index", "own", axis=-1),
        node("ReduceMax", "logits over_classes", "best", keepdims=1),
        node("Equal", "own best", "right"),
    ]
    return nodes, [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items()]
