"""Peak resident memory of whole processes: `ztune tune`, its image pass, and tuning in torch.

    python -m benchmarks.memory              # C = 10 and 100, fp32 and int8
    python -m benchmarks.memory --quick      # a tiny model, as a smoke test

Every figure is the peak of a separate process, reported by the system after its exit. Exporting the
models takes minutes the first time.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import document, last_line, parser, run_alone, say, show
from benchmarks.names import classes_named
from benchmarks.towers import Size, full

PRECISIONS = ("fp32", "int8")
SHOTS = 16
LOOPS = {
    "backprop": "backpropagation in torch (SGD on the context), image features given",
    "forward": "forward passes in torch, one candidate at a time, image features given",
    "published": "the same with both towers, 128 images a candidate",
}


def measure(
    size: Size, classes: tuple[int, ...], loops: Sequence[str], cache: Path, queries: int = 50
) -> dict[str, Any]:
    """Run every process and return the document."""
    started = time.perf_counter()
    bundles = {precision: full(size, cache, precision) for precision in PRECISIONS}
    rows: list[dict[str, Any]] = []
    for n_classes in classes:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            run_alone([sys.executable, "-m", __spec__.name, "--draw", n_classes, folder / "data"])
            for precision, bundle in bundles.items():
                rows.append(_tune(bundle, folder, n_classes, precision, queries))
                say(json.dumps(rows[-1]))
        for loop in loops:
            rows.append(_torch(size, loop, n_classes))
            say(json.dumps(rows[-1]))
    return document(started, model=size.model, queries=queries, rows=rows)


def _tune(
    bundle: Path, folder: Path, n_classes: int, precision: str, queries: int
) -> dict[str, Any]:
    """Tune twice: the first run fills the feature cache, the second uses it."""
    cache = folder / f"cache-{precision}"
    found: dict[str, Any] = {}
    for name, n_queries in (("image_pass", 10), ("cached", queries)):
        out = folder / f"{precision}-{name}"
        done = run_alone(
            [
                *(
                    sys.executable,
                    "-m",
                    "ztune.cli.main",
                    "tune",
                    bundle,
                    "--data",
                    folder / "data",
                ),
                *("--shots", SHOTS, "--val", 0, "--test-fraction", 0, "--queries", n_queries),
                *("--provider", "cpu", "--cache", cache, "--out", out, "--quiet", "--json"),
                # Random weights and images have no signal; the gate measures it anyway.
                "--force",
            ],
            watch=True,
        )
        run = json.loads((out / "run.json").read_text())
        found[f"{name}_reported_mb"] = run["peak_memory_mb"]
        found[f"{name}_peak_mb"] = round(done.peak_mb, 1)
        found[f"{name}_tree_peak_mb"] = round(done.tree_peak_mb, 1)
        found[f"{name}_seconds"] = round(done.seconds, 1)
        found[f"{name}_images"] = run["image_forwards"]
    return {"loop": "ztune", "classes": n_classes, "precision": precision, **found}


def _torch(size: Size, loop: str, n_classes: int) -> dict[str, Any]:
    done = run_alone(
        [
            *(sys.executable, "-m", "benchmarks.torch_loops", loop),
            *("--model", size.model, "--classes", n_classes, "--steps", 2),
        ]
    )
    return {
        "loop": loop,
        "title": LOOPS[loop],
        "classes": n_classes,
        "precision": "fp32",
        "peak_mb": round(done.peak_mb, 1),
        **last_line(done.out),
    }


def draw(n_classes: int, folder: Path) -> None:
    """Write 16 small images per class: coloured noise."""
    import numpy as np
    from PIL import Image

    random = np.random.default_rng(0)
    for name in classes_named(n_classes):
        (folder / name).mkdir(parents=True)
        for i in range(SHOTS):
            pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--model", default="ViT-B-32", help="an open_clip model, or: tiny")
    given.add_argument("--draw", nargs=2, metavar=("CLASSES", "FOLDER"), help="images only")
    arguments = given.parse_args()
    if arguments.draw:
        draw(int(arguments.draw[0]), Path(arguments.draw[1]))
    elif arguments.quick:
        show(measure(Size("tiny"), (10,), ("backprop", "forward"), arguments.cache))
    else:
        show(measure(Size(arguments.model), (10, 100), tuple(LOOPS), arguments.cache))


if __name__ == "__main__":
    main()
