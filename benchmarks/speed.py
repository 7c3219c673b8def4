"""Queries per second: this project's prompt graph, a naive ONNX Runtime loop, the published loop.

    python -m benchmarks.speed               # C = 10, 100, 1000; m = 4, 8, 16; about half an hour
    python -m benchmarks.speed --quick       # C = 10, 100; m = 8; a text tower of 4 layers, 45 s

Compared loops are interleaved in one process; all figures are medians, which benchmarks/README.md
explains.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.measure import document, interleaved, parser, say, show, timed
from benchmarks.names import classes_named
from benchmarks.rounds import Rounds
from benchmarks.torch_loops import BATCH, PublishedLoop
from benchmarks.towers import NAIVE, Size, lean, load_random
from export.loaded import LoadedClip
from runtimes.bundle import load_bundle
from runtimes.ort import OrtPromptGraph
from runtimes.prompts import feeds, name_lengths, name_tokens, token_table
from runtimes.providers import Execution, onnxruntime, open_session
from runtimes.tokenizer import Tokenizer
from ztune.methods.zip import ZipConfig
from ztune.types import F32

PRECISIONS = ("fp32", "int8")
# Size of the square matrices whose product measures the machine's rate.
_EDGE = 2048
_GEMM_FLOP = 2 * _EDGE**3
Loop = Callable[[], Mapping[str, float]]


@dataclass(frozen=True)
class Extent:
    """The measured sizes."""

    size: Size
    classes: Mapping[int, int]
    """Repeats by number of classes."""
    contexts: tuple[int, ...]
    published_images: int
    published_classes: int
    """Maximum classes for timing the published loop, scaled to 128 images and all classes."""
    run_queries: int
    """Queries of whole runs; 0: no runs."""


FULL = Extent(Size(), {10: 9, 100: 5, 1000: 3}, (4, 8, 16), 128, 100, 5000)
# Four layers can be exported twice within 45 s; all other sizes are real.
QUICK = Extent(Size(layers=4), {10: 3, 100: 1}, (8,), 8, 10, 0)


def matrix_flops(
    lengths: Sequence[int],
    n_candidates: int,
    n_context: int,
    width: int,
    n_layers: int,
    embed_dim: int,
) -> int:
    """Return the floating-point operations in matrix products that a candidate batch needs.

    Only real tokens count, with two operations per multiply-add. With P candidates, m context
    tokens, C classes of T tokens in total (full stop and end-of-text included), width d:

    - rows = P m + P T: each needs 12 d² multiply-adds per layer (qkv 3, out 1, MLP 8), except that
      the names' qkv in the first layer are the same for all candidates and count once;
    - the last layer needs keys and values (2 d²) of all rows, the other 10 d² only for P C ends;
    - attention: 2 d for each key that a row attends to: the i-th context token to [SOS] and i
      tokens, the j-th of a name to [SOS], the context and j tokens; in the last layer only ends;
    - the projection d e of each end to e features.

    [SOS] costs nothing: its keys and values are constants of the graph.
    """
    P, m, d, C = n_candidates, n_context, width, len(lengths)
    T = sum(lengths)
    rows = P * m + P * T
    first = 3 * d * d * (P * m + T) + 9 * d * d * rows
    last = 2 * d * d * rows + 10 * d * d * P * C
    keys_of_context = sum(1 + i for i in range(1, m + 1))
    keys_of_names = sum(1 + m + j for n in lengths for j in range(1, n + 1))
    keys_of_ends = sum(1 + m + n for n in lengths)
    seen = (n_layers - 1) * (keys_of_context + keys_of_names) + keys_of_ends
    total = (
        first + (n_layers - 2) * 12 * d * d * rows + last + 2 * d * P * seen + d * embed_dim * P * C
    )
    return 2 * total


def measure(extent: Extent, cache: Path) -> dict[str, Any]:
    """Measure everything and return the document."""
    started = time.perf_counter()
    with ThreadPoolExecutor(1) as pool:
        making = pool.submit(lean, extent.size, cache)
        loaded = load_random(extent.size)  # while processes export
        folder = making.result()
    say(f"models ready after {time.perf_counter() - started:.0f} s")
    published = Published(extent, loaded)
    bundle = load_bundle(folder / "fp32")
    tokenizer = Tokenizer(bundle)
    graphs = {
        name: OrtPromptGraph(load_bundle(folder / name), tokenizer, Execution())
        for name in PRECISIONS
    }
    # With ONNX Runtime's defaults, as a user would open it, not with ztune's.
    naive = onnxruntime().InferenceSession(folder / NAIVE, providers=["CPUExecutionProvider"])
    # The first products after a pause are slower, which would inflate the ratios.
    gemms = {name: timed(loop, 9) for name, loop in square_products().items()}
    rates: list[Mapping[str, float]] = []
    rows: list[dict[str, Any]] = []
    for n_classes, repeats in extent.classes.items():
        for n_context in extent.contexts:
            cell = Cell(graphs, tokenizer, n_classes, n_context)
            found = cell.take_turns({**gemms, **cell.naive_loops(naive)}, repeats)
            rates.append({name: _GEMM_FLOP / found[name]["seconds"] / 1e9 for name in gemms})
            baselines = {
                **{name: found[name]["seconds"] for name in ("naive", "truncated")},
                "published": published.seconds(n_classes),
            }
            for name in graphs:
                gflops = cell.flop(extent.size.n_layers) / found[name]["graph"] / 1e9
                row = {
                    "classes": n_classes,
                    "context_tokens": n_context,
                    "precision": name,
                    **_speeds(found[name], cell.n_candidates, baselines),
                    "gflops": round(gflops, 1),
                    "sgemm_fraction": round(gflops / max(rates[-1].values()), 4),
                    "max_abs_error": cell.error(name),
                    "name_tokens": sum(cell.lengths),
                    "calls": cell.rounds[name].plan.to_json(),
                    "repeats": repeats,
                }
                rows.append(row)
                say(_line(row))
    text = bundle.text
    return document(
        started,
        tower={
            "model": extent.size.model,
            "layers": extent.size.n_layers,
            "width": text.width,
            "context_length": text.context_length,
        },
        sgemm={
            "edge": _EDGE,
            **{f"{name}_gflops": round(_median(rate[name] for rate in rates), 1) for name in gemms},
        },
        published=published.to_json(),
        rows=rows,
        runs=[
            _whole_run(name, graph, extent.run_queries)
            for name, graph in graphs.items()
            if extent.run_queries
        ],
    )


class Cell:
    """Measurements for one number of classes and one context length."""

    def __init__(
        self,
        graphs: Mapping[str, OrtPromptGraph],
        tokenizer: Tokenizer,
        n_classes: int,
        n_context: int,
    ):
        config, classes = ZipConfig(n_context=n_context), classes_named(n_classes)
        self.rounds = {name: Rounds(graph, classes, config) for name, graph in graphs.items()}
        self.n_candidates = config.step_queries()
        # One step at 10 classes is too short to time on a busy machine.
        self._n_steps = max(1, 40 // n_classes)
        self._n_context = n_context
        self._bundle = bundle = graphs["fp32"].bundle
        names = name_tokens(bundle.text, tokenizer, classes, n_context)
        self.lengths = name_lengths(bundle.text, names)
        spec = replace(bundle.text, graph="sequence")
        self._feeds = feeds(spec, token_table(bundle), names, n_context)
        shape = (self.n_candidates, n_context, bundle.text.width)
        start = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
        self._contexts = np.float32(0.02) * start
        self._reference: F32 | None = None

    def flop(self, n_layers: int) -> int:
        """Return the operations of a candidate batch's matrix products."""
        width, embed_dim = self._bundle.text.width, self._bundle.embed_dim
        return matrix_flops(
            self.lengths, self.n_candidates, self._n_context, width, n_layers, embed_dim
        )

    def take_turns(self, others: Mapping[str, Loop], repeats: int) -> dict[str, dict[str, float]]:
        """Return the medians of `others` and, by precision, of this project's steps."""
        loops = dict(others)
        for name, rounds in self.rounds.items():
            rounds.steps(1)  # binds the calls
            loops[name] = functools.partial(rounds.steps, self._n_steps)
        if repeats < 3:  # else the median excludes the first calls' allocations
            others["naive"]()
        return interleaved(loops, repeats)

    def naive_loops(self, session: Any) -> dict[str, Loop]:
        """Return the naive loops' queries: whole sequences, and truncated to the longest class."""
        longest = 1 + self._n_context + max(self.lengths)
        cut = {key: self._feeds[key][:, :longest] for key in ("sequence_index", "tokens")}

        def run(**given: Any) -> None:
            # The last candidate, which would show an error in packing.
            given = {"contexts": self._contexts[-1:], **self._feeds, **given}
            self._reference = session.run(["features"], given)[0][0]

        n = self._n_steps
        return {"truncated": timed(lambda: run(**cut), n), "naive": timed(run, n)}

    def error(self, precision: str) -> float:
        """Return the largest difference of a feature from the naive fp32 graph."""
        assert self._reference is not None
        ours = self.rounds[precision].encoder.encode(self._contexts)[-1]
        return float(np.abs(ours - self._reference).max())


class Published:
    """The published loop in torch, timed in parts with fewer classes and images, and scaled."""

    def __init__(self, extent: Extent, loaded: LoadedClip):
        self._extent = extent
        self._loop = PublishedLoop(loaded, extent.published_images)
        self._loop.image_seconds()  # the first pass allocates
        self._images = [self._loop.image_seconds() for _ in range(2)]
        self._texts: dict[int, list[float]] = {}

    def seconds(self, n_classes: int) -> float:
        """Return the seconds of one query; its text tower always computes 77 tokens."""
        if n_classes not in self._texts:
            classes, at_most = classes_named(n_classes), self._extent.published_classes
            self._texts[n_classes] = [
                self._loop.text_seconds(classes, 8, at_most) for _ in range(2)
            ]
        return _median(self._texts[n_classes]) + _median(self._images)

    def to_json(self) -> dict[str, Any]:
        """Return the parts of a query in seconds."""
        return {
            "scaled": True,
            "images": BATCH,
            "images_timed": self._extent.published_images,
            "classes_timed_at_most": self._extent.published_classes,
            "image_seconds": round(_median(self._images), 3),
            "text_seconds": {str(n): round(_median(taken), 3) for n, taken in self._texts.items()},
        }


def square_products() -> dict[str, Callable[[], object]]:
    """Return products to measure the machine's rate: numpy, and ONNX Runtime's MatMul."""
    from onnx import TensorProto, helper, numpy_helper

    random = np.random.default_rng(0)
    left, right = random.standard_normal((2, _EDGE, _EDGE), dtype=np.float32)
    shape = [_EDGE, _EDGE]
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "sgemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(right, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = open_session(model.SerializeToString(), Execution())
    return {
        "numpy": lambda: left @ right,
        "onnxruntime": lambda: session.run(None, {"x": left}),
    }


def _speeds(
    found: Mapping[str, float], n_candidates: int, baselines: Mapping[str, float]
) -> dict[str, Any]:
    """Return a row's rates: a candidate's text features, and a query of a whole ZIP step."""
    query, step = found["graph"] / n_candidates, found["step"] / n_candidates
    return {
        "queries_per_s": round(1 / query, 3),
        "ratio_naive": round(baselines["naive"] / query, 2),
        "ratio_truncated": round(baselines["truncated"] / query, 2),
        "ratio_published": round(baselines["published"] / step, 1),
        "seconds_per_query": query,
        "seconds_per_zip_query": step,
        "numpy_share": round(found["numpy_share"], 4),
        **{f"{name}_seconds_per_query": taken for name, taken in baselines.items()},
        "published_scaled": True,
    }


def _whole_run(precision: str, graph: OrtPromptGraph, n_queries: int) -> dict[str, Any]:
    """Return the seconds of a whole ZIP run at 10 classes, without opening the bundle."""
    rounds = Rounds(graph, classes_named(10), ZipConfig())
    taken = rounds.run(n_queries)
    say(f"{n_queries} queries at 10 classes in {precision}: {taken:.1f} s")
    return {
        "classes": 10,
        "context_tokens": ZipConfig().n_context,
        "precision": precision,
        "queries": n_queries,
        "seconds": round(taken, 2),
    }


def _line(row: Mapping[str, Any]) -> str:
    return (
        f"C {row['classes']}, m {row['context_tokens']}, {row['precision']}: "
        f"{row['queries_per_s']:.1f} queries/s, naive x{row['ratio_naive']:.1f}, "
        f"published x{row['ratio_published']:.0f}, of sgemm {row['sgemm_fraction']:.0%}, "
        f"numpy {row['numpy_share']:.1%}, error {row['max_abs_error']:.1e}"
    )


def _median(values: Iterable[float]) -> float:
    return float(np.median(list(values)))


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--model", default="ViT-B-32", help="an open_clip model, or: tiny")
    given.add_argument("--layers", type=int, help="of its text tower (--quick: 4)")
    given.add_argument("--context", type=int, help="only this number of context tokens")
    arguments = given.parse_args()
    extent = QUICK if arguments.quick else FULL
    if arguments.context is not None:
        extent = replace(extent, contexts=(arguments.context,))
    size = Size(arguments.model, arguments.layers or extent.size.layers)
    show(measure(replace(extent, size=size), arguments.cache))


if __name__ == "__main__":
    main()
