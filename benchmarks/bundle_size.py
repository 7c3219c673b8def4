"""Compare a bundle with its older layout: size, and the time and memory of opening its graphs.

    python -m benchmarks.bundle_size BUNDLE [BUNDLE ...]

Each bundle is also written in format version 1, where every graph has its own weights. A graph is
opened and run once in a new process, the layouts in turns; the figures are medians.
benchmarks/README.md explains them.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.measure import document, interleaved, last_line, parser, run_alone, say, show
from runtimes.bundle import Bundle, load_bundle
from runtimes.graph_check import check_graph
from runtimes.weights import WEIGHTS

GRAPHS = ("image", "prompt")
_REPEATS, _QUICK = 5, 1


def measure(bundles: list[Path], repeats: int) -> dict[str, Any]:
    """Measure every bundle in both layouts and return the document."""
    started, rows = time.perf_counter(), list[dict[str, Any]]()
    for path in bundles:
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".old-") as folder:
            old = Path(folder, "bundle")
            run_alone([sys.executable, "-m", __spec__.name, path, "--old", old])
            layouts = {"version 1": old, "shared": path}
            opened = {
                f"{layout} {graph}": partial(_open, place, graph)
                for layout, place in layouts.items()
                for graph in GRAPHS
            }
            interleaved(opened, 1)  # fills the system's file cache
            found = interleaved(opened, repeats)
            for layout, place in layouts.items():
                graphs = {graph: found[f"{layout} {graph}"] for graph in GRAPHS}
                rows.append(_row(load_bundle(path), load_bundle(place), layout, graphs))
                say(json.dumps(rows[-1]))
    return document(started, repeats=repeats, rows=rows)


def _row(
    shared: Bundle, bundle: Bundle, layout: str, graphs: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    size, weights = sum(file.bytes for file in bundle.files.values()), weight_bytes(shared)
    row: dict[str, Any] = {
        "bundle": shared.path.name,
        "layout": layout,
        "mb": round(size / 1e6, 1),
        "over_weights": round(size / weights, 3),
    }
    for graph, figures in graphs.items():
        row |= {f"{graph}_{name}": round(value, 3) for name, value in figures.items()}
    return row


def weight_bytes(bundle: Bundle) -> int:
    """Return the bytes of the model's weights: those of its towers, and the token table."""
    assert bundle.token_table is not None
    spans = {bundle.token_table.span}
    for name in ("image.onnx", "text.onnx"):
        spans.update(check_graph(bundle.path / name, WEIGHTS))
    return sum(length for _, length in spans)


def _open(bundle: Path, graph: str) -> dict[str, float]:
    done = run_alone([sys.executable, "-m", __spec__.name, bundle, "--open", graph])
    return {**last_line(done.out), "peak_mb": done.peak_mb}


def _run_once(path: Path, name: str) -> None:
    """Open a graph, run its parity inputs, and print the seconds of opening."""
    from runtimes.ort import Graph, parity_inputs
    from runtimes.providers import Execution, onnxruntime, run_graph

    onnxruntime()
    wall, processor = time.perf_counter(), time.process_time()
    bundle = load_bundle(path)
    graph = Graph(bundle, name, Execution(threads=1))
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    print(json.dumps({"open_s": wall, "open_cpu_s": processor}))
    feeds, _ = parity_inputs(path / "parity.safetensors", name)
    run_graph(graph.session, graph.path, ["features"], feeds)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("bundles", nargs="+", type=Path)
    own.add_argument("--old", type=Path, help="only write the bundle in format version 1")
    own.add_argument("--open", choices=GRAPHS, help="only open a graph of the bundle")
    given = own.parse_args()
    if given.old is not None:
        from benchmarks.old_layout import write_version_1

        write_version_1(load_bundle(given.bundles[0]), given.old)
    elif given.open is not None:
        _run_once(given.bundles[0], given.open)
    else:
        bundles = [path.resolve() for path in given.bundles]
        show(measure(bundles, _QUICK if given.quick else _REPEATS))


if __name__ == "__main__":
    main()
