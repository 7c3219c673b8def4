"""Whole ZIP runs on CUDA: 5,000 queries, with and without CUDA graphs, fp32 and fp16.

    python -m benchmarks.gpu
    python -m benchmarks.gpu --classes 10 --queries 500

Without CUDA this prints a document with the reason, and exits with 1.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import document, parser, say, show
from benchmarks.names import classes_named
from benchmarks.towers import Size, full
from runtimes.bundle import load_bundle
from runtimes.providers import Execution, resolve
from ztune.errors import ProviderError


def measure(
    size: Size, classes: tuple[int, ...], queries: int, cache: Path, started: float
) -> dict[str, Any]:
    """Run every cell and return the document."""
    rows: list[dict[str, Any]] = []
    for precision, n_classes, cuda_graph in itertools.product(
        ("fp32", "fp16"), classes, (True, False)
    ):
        execution = Execution("cuda", cuda_graph=cuda_graph)
        taken = run(full(size, cache, precision), n_classes, queries, execution)
        rows.append({"classes": n_classes, "precision": precision, **taken})
        say(str(rows[-1]))
    return document(started, ran=True, model=size.model, queries=queries, rows=rows)


def run(path: Path, n_classes: int, queries: int, execution: Execution) -> dict[str, Any]:
    """Return the seconds of a whole run as in `ztune tune`, and of its preparation."""
    from benchmarks.rounds import Rounds
    from runtimes.ort import OrtPromptEncoder, OrtPromptGraph
    from runtimes.scores import OrtScores
    from runtimes.tokenizer import Tokenizer
    from ztune.methods.zip import ZipConfig
    from ztune.types import F32

    start = time.perf_counter()
    bundle = load_bundle(path)
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), execution)

    def score_with(encoder: OrtPromptEncoder, features: F32) -> OrtScores:
        return OrtScores(encoder, features, bundle.logit_scale, bundle.logit_bias, execution)

    config = ZipConfig()
    rounds = Rounds(graph, classes_named(n_classes), config, score_with=score_with)
    rounds.run(3 * rounds.n_candidates)  # the second candidate batch is captured
    ready = time.perf_counter() - start
    seconds = rounds.run(queries)
    return {
        "context_tokens": config.n_context,
        "cuda_graph": execution.cuda_graph,
        "captured": rounds.encoder.cuda_graph,
        "ready_seconds": round(ready, 2),
        "seconds": round(seconds, 3),
        "queries_per_s": round(queries / seconds, 1),
        "calls": rounds.plan.to_json(),
    }


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--model", default="ViT-B-16", help="an open_clip model, or: tiny")
    given.add_argument("--classes", default="10,100,1000", help="numbers, separated by commas")
    given.add_argument("--queries", type=int, default=5000)
    arguments = given.parse_args()
    started = time.perf_counter()
    try:
        resolve("cuda")
    except ProviderError as error:
        say(f"not run: {error}")
        show(document(started, ran=False, reason=str(error), rows=[]))
        sys.exit(1)
    size = Size("tiny" if arguments.quick else arguments.model)
    classes = tuple(int(word) for word in arguments.classes.split(","))
    show(measure(size, classes, arguments.queries, arguments.cache, started))


if __name__ == "__main__":
    main()
