"""Seconds and memory against classes C, candidates P, images N and context tokens m.

    python -m benchmarks.scaling --plot scaling.png
    python -m benchmarks.scaling --quick             # a tiny model and fewer points

One size changes at a time; the others stay at C = 10, P = 10, N = 128, m = 8. Every point is a
separate process that runs steps of ZIP; its peak is read after its exit.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.measure import document, draw, last_line, parser, run_alone, say, show
from benchmarks.towers import Size, lean

BASE = {"C": 10, "P": 10, "N": 128, "m": 8}
FULL = {
    "C": (10, 30, 100, 300, 1000, 2000),
    "P": (2, 4, 10, 20, 40),
    "N": (16, 50, 160, 500, 1600),
    "m": (4, 8, 16, 32),
}
QUICK = {"C": (10, 100), "P": (2, 10), "N": (16, 128), "m": (4, 8)}
NAMES = {"C": "classes", "P": "candidates per batch", "N": "images", "m": "context tokens"}
PRECISIONS = ("fp32", "int8")


def measure(
    size: Size, points: Mapping[str, tuple[int, ...]], cache: Path, plot: Path | None
) -> dict[str, Any]:
    """Measure every point; draw and return the document."""
    started = time.perf_counter()
    folder = lean(size, cache)
    rows: list[dict[str, Any]] = []
    for varied, values in points.items():
        for value in values:
            point = {**BASE, varied: value}
            for precision in PRECISIONS:
                done = run_alone(
                    [
                        *(sys.executable, "-m", __spec__.name, "--bundle", folder / precision),
                        *("--point", json.dumps(point)),
                    ]
                )
                found = {**last_line(done.out), "peak_mb": round(done.peak_mb, 1)}
                rows.append({"varied": varied, **point, "precision": precision, **found})
                say(json.dumps(rows[-1]))
    if plot is not None:
        _draw(rows, plot)
    return document(started, model=size.model, base=BASE, rows=rows)


def steps(bundle_path: Path, point: Mapping[str, int]) -> dict[str, Any]:
    """Run steps at one point and return their times."""
    from benchmarks.names import classes_named
    from benchmarks.rounds import Rounds
    from runtimes.bundle import load_bundle
    from runtimes.ort import OrtPromptGraph
    from runtimes.providers import Execution
    from runtimes.tokenizer import Tokenizer
    from ztune.methods.zip import ZipConfig

    bundle = load_bundle(bundle_path)
    tokenizer = Tokenizer(bundle)
    graph = OrtPromptGraph(bundle, tokenizer, Execution())
    # All images in every batch, to include the objective's cost.
    config = ZipConfig(n_context=point["m"], n_pairs=point["P"] // 2, batch_size=point["N"])
    rounds = Rounds(graph, classes_named(point["C"]), config, n_images=point["N"])
    tokenizer.release()  # as a run does
    rounds.steps(1)
    found = rounds.steps(max(1, min(10, 1000 // (point["C"] * point["P"]))))
    return {
        "step_seconds": found["step"],
        "graph_seconds": found["graph"],
        "seconds_per_query": found["step"] / point["P"],
        "plan": rounds.plan.to_json(),
    }


def _draw(rows: list[dict[str, Any]], path: Path) -> None:
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    labels = {}
    for key, label in (("step_seconds", "seconds per step"), ("peak_mb", "peak memory, MB")):
        for varied in dict.fromkeys(row["varied"] for row in rows):
            title = f"{label} by {NAMES[varied]}"
            labels[title] = (NAMES[varied], label)
            panels[title] = {
                precision: [
                    (row[varied], row[key])
                    for row in rows
                    if row["varied"] == varied and row["precision"] == precision
                ]
                for precision in PRECISIONS
            }
    draw(panels, labels, path, columns=len(panels) // 2)


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--model", default="ViT-B-32", help="an open_clip model, or: tiny")
    given.add_argument("--plot", type=Path, metavar="FILE", help="draw all points as a PNG")
    given.add_argument("--point", type=json.loads, help="one point in this process")
    given.add_argument("--bundle", type=Path, help="of that point")
    arguments = given.parse_args()
    if arguments.point:
        print(json.dumps(steps(arguments.bundle, arguments.point)))
    elif arguments.quick:
        show(measure(Size("tiny"), QUICK, arguments.cache, arguments.plot))
    else:
        show(measure(Size(arguments.model), FULL, arguments.cache, arguments.plot))


if __name__ == "__main__":
    main()
