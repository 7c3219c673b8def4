"""Compare the duration of short commands with that of Python and ONNX Runtime alone.

    python -m benchmarks.startup                    # 20 processes each, under a minute
    python -m benchmarks.startup --quick            # 5 each

benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ztune
from benchmarks.measure import ROOT, document, interleaved, parser, say, show, timed

DIGITS = ROOT / "examples" / "digits"
_REPEATS, _QUICK = 20, 5
_LOADED = "import numpy, onnxruntime"


def measure(bundle: Path, repeats: int) -> dict[str, Any]:
    """Time the commands in turns and return the document."""
    started = time.perf_counter()
    train, test = ztune.Dataset.from_folder(DIGITS).split(shots=16, seed=1)
    image, _ = test.items[0]
    with tempfile.TemporaryDirectory() as folder:
        packed = Path(folder, "classifier.onnx")
        with ztune.load(bundle, provider="cpu") as model:
            ztune.FewShotClassifier(model, method="gda").fit(train).export_onnx(packed)
        cli = ("-m", "ztune.cli.main")
        commands: dict[str, Sequence[object]] = {
            "python": ("-c", "pass"),
            _LOADED: ("-c", _LOADED),
            "ztune --help": (*cli, "--help"),
            "ztune predict": (*cli, "predict", packed, image),
        }
        loops = {name: timed(partial(_run, words)) for name, words in commands.items()}
        interleaved(loops, 1)  # fills the system's file cache
        found = interleaved(loops, repeats)
    rows = {name: {"seconds": round(one["seconds"], 3)} for name, one in found.items()}
    for name, bare in (("ztune --help", "python"), ("ztune predict", _LOADED)):
        rows[name]["ratio"] = round(found[name]["seconds"] / found[bare]["seconds"], 2)
        say(f"{name}: {rows[name]['seconds']} s, {rows[name]['ratio']} times {bare}")
    return document(started, repeats=repeats, rows=rows)


def _run(words: Sequence[object]) -> None:
    command = [sys.executable, *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--bundle", type=Path, default=ROOT / "models" / "mini")
    given = own.parse_args()
    show(measure(given.bundle, _QUICK if given.quick else _REPEATS))


if __name__ == "__main__":
    main()
