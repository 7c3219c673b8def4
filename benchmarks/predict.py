"""Compare single-image predictions of the library's classifiers and of bare ONNX Runtime sessions.

    python -m benchmarks.predict                    # 10,000 predictions each, 2 minutes
    python -m benchmarks.predict --quick            # 500 each

benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import ztune
from benchmarks.measure import ROOT, document, interleaved, parser, say, show, timed
from runtimes.bundle import Bundle
from runtimes.preprocess import crop, normalise, read_image_file
from runtimes.providers import Execution, open_session
from ztune.artifact import Artifact, read_artifact

DIGITS = ROOT / "examples" / "digits"
# Predictions per turn of a loop; and the turns after which memory is first measured.
_TURN, _FIRST = 50, 20
_PREDICTIONS, _QUICK = 10_000, 500
Predict = Callable[[Path], object]


def measure(place: Path, n_predictions: int, threads: int) -> dict[str, Any]:
    """Measure single predictions and return the document."""
    started = time.perf_counter()
    train, test = ztune.Dataset.from_folder(DIGITS).split(shots=16, seed=1)
    paths = [path for path, _ in test.items]
    execution = Execution("cpu", threads)
    with (
        tempfile.TemporaryDirectory() as folder,
        ztune.load(place, provider="cpu", threads=threads) as model,
    ):
        bundle, packed, saved = model.bundle, Path(folder, "c.onnx"), Path(folder, "artifact")
        fitted = ztune.FewShotClassifier(model, method="gda").fit(train)
        fitted.export_onnx(packed)
        fitted.save(saved)
        artifact = read_artifact(saved)
        with ztune.load_classifier(packed, provider="cpu", threads=threads) as deployed:
            ways: dict[str, Predict] = {
                "FewShotClassifier": lambda path: fitted.predict([path]),
                "bare image tower": bare_tower(bundle, artifact, execution),
                "load_classifier": lambda path: deployed.predict([path]),
                "bare classifier": bare_classifier(bundle, packed, artifact, execution),
            }
            rows, memory = _take_turns(ways, paths, n_predictions)
    bare = {"FewShotClassifier": "bare image tower", "load_classifier": "bare classifier"}
    for name, other in bare.items():
        ratio = rows[other]["images_per_s"] / rows[name]["images_per_s"]
        rows[name]["seconds_over_bare"] = round(ratio, 3)
        say(f"{name}: {rows[name]['images_per_s']} images/s, {ratio:.3f} times the {other}'s time")
    return document(
        started,
        bundle=bundle.model_id,
        threads=threads,
        predictions=n_predictions,
        rows=rows,
        resident_mb=memory,
    )


def _take_turns(
    ways: Mapping[str, Predict], paths: list[Path], n_predictions: int
) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return images per second of each, and resident MB after some numbers of predictions."""

    def loop(predict: Predict) -> Callable[[], dict[str, float]]:
        images = itertools.cycle(paths)
        return timed(lambda: predict(next(images)), _TURN)

    loops = {name: loop(predict) for name, predict in ways.items()}
    turns = n_predictions // _TURN
    first = min(_FIRST, turns // 2)
    interleaved(loops, first)
    memory = {f"after {first * _TURN}": _resident_mb()}
    found = interleaved(loops, turns - first)
    memory[f"after {turns * _TURN}"] = _resident_mb()
    rates = {name: {"images_per_s": round(1 / one["seconds"], 1)} for name, one in found.items()}
    return rates, memory


def bare_tower(bundle: Bundle, artifact: Artifact, execution: Execution) -> Predict:
    """Return a prediction with the image tower's session, without the library."""
    session = open_session(bundle.file("image.onnx"), execution)
    head, classes = artifact.classifier(), np.array(artifact.classes)

    def predict(path: Path) -> object:
        pixels = normalise(crop(read_image_file(path), bundle.image)[None], bundle.image)
        (features,) = session.run(["features"], {"pixels": pixels})
        return classes[(features @ head.weight.T + head.bias).argmax(axis=1)]

    return predict


def bare_classifier(
    bundle: Bundle, packed: Path, artifact: Artifact, execution: Execution
) -> Predict:
    """Return a prediction with the packed classifier's session, without the library."""
    session, classes = open_session(packed, execution), np.array(artifact.classes)

    def predict(path: Path) -> object:
        pixels = crop(read_image_file(path), bundle.image)
        (logits,) = session.run(["logits"], {"pixels": pixels[None]})
        return classes[logits.argmax(axis=1)]

    return predict


def _resident_mb() -> float:
    return round(float(psutil.Process().memory_info().rss) / 1e6, 1)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--bundle", type=Path, default=ROOT / "models" / "mini")
    own.add_argument("--threads", type=int, default=1, help="of every graph")
    given = own.parse_args()
    n_predictions = _QUICK if given.quick else _PREDICTIONS
    show(measure(given.bundle, n_predictions, given.threads))


if __name__ == "__main__":
    main()
