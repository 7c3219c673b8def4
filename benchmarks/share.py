"""Measure the share of a run outside the text tower: numpy's, for methods that read logits.

    python -m benchmarks.share BUNDLE --classes 10,100 --queries 500

Image features are random, 16 per class; only time is measured. One JSON document.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.measure import document, parser, say, show
from benchmarks.names import classes_named
from benchmarks.rounds import Rounds
from runtimes.bundle import load_bundle
from runtimes.ort import OrtPromptGraph
from runtimes.providers import Execution
from runtimes.tokenizer import Tokenizer
from ztune.methods.base import TunedConfig
from ztune.methods.ogn import OgnConfig
from ztune.methods.ogn_context import OgnContextConfig
from ztune.methods.zip import ZipConfig

CONFIGS: dict[str, TunedConfig] = {
    "ogn": OgnConfig(),
    "ogn-context": OgnContextConfig(),
    "zip": ZipConfig(),
}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("bundle", type=Path)
    arguments.add_argument("--classes", default="10,100", help="numbers of classes")
    arguments.add_argument("--methods", default=",".join(CONFIGS), help="of these")
    arguments.add_argument("--queries", type=int, default=500)
    arguments.add_argument("--threads", type=int)
    given = arguments.parse_args()
    started = time.perf_counter()
    queries = 100 if given.quick else given.queries
    bundle = load_bundle(given.bundle)
    graph = OrtPromptGraph(bundle, Tokenizer(bundle), Execution("cpu", threads=given.threads))
    rows: list[dict[str, Any]] = []
    for n_classes in (int(word) for word in given.classes.split(",")):
        for name in given.methods.split(","):
            rounds = Rounds(graph, classes_named(n_classes), CONFIGS[name])
            found = rounds.whole(queries)
            rows.append({"method": name, "classes": n_classes, "queries": queries, **found})
            say(f"{name}, {n_classes} classes: {found['seconds']:.1f} s, numpy "
                f"{found['numpy_share']:.1%}")  # fmt: skip
    show(document(started, rows=rows))


if __name__ == "__main__":
    main()
