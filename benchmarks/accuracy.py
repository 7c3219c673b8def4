"""Accuracy on test images: zero-shot, ZIP over several seeds, and GDA; one JSON document.

    python -m benchmarks.accuracy models/mini --data examples/digits --templates digits
    python -m benchmarks.accuracy bundles/vit-b-32 --data photos --seeds 1,2,3

Every figure comes from the commands that a user types, in separate processes.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from ztune.system import machine, versions

TEMPLATES = {
    "general": ("a photo of a {}.",),
    # Chosen before any accuracy on the digits was measured.
    "digits": (
        "{}.",
        "a photo of a {}.",
        "a photo of the digit {}.",
        "the number {}.",
        "a handwritten digit {}.",
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--templates", choices=TEMPLATES, default="general")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(arguments, Path(folder))
    print(json.dumps(document, indent=2))


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run every cell once and return all figures."""
    cache = folder / "cache"
    seeds = [int(seed) for seed in arguments.seeds.split(",")]

    def tuned(method: str, seed: int) -> dict[str, Any]:
        out = folder / f"{method}-{seed}"
        run = ztune(
            "tune", arguments.bundle, "--data", arguments.data, "--method", method,
            "--shots", arguments.shots, "--queries", arguments.queries, "--seed", seed,
            "--cache", cache, "--out", out,
        )  # fmt: skip
        scored = ztune("eval", out, "--cache", cache)
        return {
            "seed": seed,
            "test_accuracy": scored["accuracy"],
            "n": scored["n"],
            "train_loss": run["train_loss"],
            "queries": run["queries"],
            "seconds": run["seconds"],
            "peak_memory_mb": run["peak_memory_mb"],
        }

    rows: dict[str, Any] = {
        method: [tuned(method, seed) for seed in seeds] for method in ("zip", "gda")
    }
    first = folder / f"zip-{seeds[0]}"
    zero_shot = {
        template: ztune("eval", first, "--template", template, "--cache", cache)[
            "zero_shot_accuracy"
        ]
        for template in TEMPLATES[arguments.templates]
    }
    best = max(zero_shot.values())
    means = {
        method: statistics.mean(row["test_accuracy"] for row in rows[method]) for method in rows
    }
    return {
        "bundle": str(arguments.bundle),
        "data": str(arguments.data),
        "shots": arguments.shots,
        "zero_shot": zero_shot,
        "zero_shot_best": best,
        "mean": means,
        "gain_over_best_zero_shot": {method: mean - best for method, mean in means.items()},
        "rows": rows,
        "machine": machine(),
        "versions": versions(),
    }


def ztune(*words: object) -> dict[str, Any]:
    """Run one `ztune` command and return its JSON document."""
    command = [sys.executable, "-m", "ztune.cli.main", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


if __name__ == "__main__":
    main()
