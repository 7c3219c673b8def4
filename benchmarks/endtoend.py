"""Compare a whole default run of `ztune tune` with a plain loop over the image graph.

    python -m benchmarks.endtoend                   # 3 runs of each, 2 min on 2 cores
    python -m benchmarks.endtoend --quick           # a model with 4 text layers, once

benchmarks/README.md explains the figures.
"""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.measure import document, interleaved, parser, run_alone, say, show
from benchmarks.towers import Size, full
from runtimes.bundle import load_bundle
from runtimes.preprocess import normalise, read_view
from runtimes.providers import onnxruntime

_REPEATS, _BATCH = 3, 32
_CLASSES = 10
_IMAGES, _MORE = 20, 22  # per class
_QUALITY = 90


def write_photos(folder: Path, n: int) -> Path:
    """Write `n` JPEG files of 500 x 375 pixels for each class, whose colours differ a little."""
    for c in range(_CLASSES):
        rng = np.random.default_rng(c)
        colours = rng.uniform(0, 255, (6, 8, 3))
        own = folder / f"class {'abcdefghij'[c]}"
        own.mkdir(parents=True)
        for number in range(n):
            small = np.clip(colours + rng.normal(0, 40, colours.shape), 0, 255).astype(np.uint8)
            smooth = np.asarray(Image.fromarray(small).resize((500, 375)), np.int64)
            noise = rng.integers(-12, 13, (375, 500, 1))
            photo = Image.fromarray(np.clip(smooth + noise, 0, 255).astype(np.uint8))
            photo.save(own / f"{number:03d}.jpg", quality=_QUALITY)
    return folder


def encode_plainly(bundle: Path, folder: Path) -> None:
    """Decode all images and encode them in batches: what a user's own script does at least."""
    loaded = load_bundle(bundle)
    session = onnxruntime().InferenceSession(
        bundle / "image.onnx", providers=["CPUExecutionProvider"]
    )
    files = sorted(folder.rglob("*.jpg"))
    for first in range(0, len(files), _BATCH):
        pixels = [read_view(file, loaded.image, None) for file in files[first : first + _BATCH]]
        session.run(["features"], {"pixels": normalise(np.stack(pixels), loaded.image)})


def _loop(bundle: Path, photos: Path) -> dict[str, float]:
    code = (
        "from pathlib import Path; from benchmarks.endtoend import encode_plainly; "
        f"encode_plainly(Path({str(bundle)!r}), Path({str(photos)!r}))"
    )
    return {"seconds": run_alone([sys.executable, "-c", code]).seconds}


def _tune(bundle: Path, photos: Path, place: Path, cache: Path | None) -> dict[str, float]:
    """Tune in a new folder with a copy of a cache, or an empty one."""
    with tempfile.TemporaryDirectory(dir=place) as own:
        if cache is not None:
            shutil.copytree(cache, own, dirs_exist_ok=True)
        os.environ["XDG_CACHE_HOME"] = own
        command = [sys.executable, "-m", "ztune.cli.main", "tune", bundle, "--data", photos]
        return {"seconds": run_alone([*command, "--out", Path(own, "run"), "--quiet"]).seconds}


def measure(bundle: Path, repeats: int) -> dict[str, Any]:
    """Time the loop and the runs in turns and return the document."""
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        photos = write_photos(place / "photos", _IMAGES)
        more = write_photos(place / "more", _MORE)
        cache = place / "cache"
        os.environ["XDG_CACHE_HOME"] = str(cache)
        command = [sys.executable, "-m", "ztune.cli.main", "tune", bundle, "--data", photos]
        run_alone([*command, "--out", place / "first", "--quiet"])
        loops = {
            "loop": partial(_loop, bundle, photos),
            "nothing cached": partial(_tune, bundle, photos, place, None),
            "everything cached": partial(_tune, bundle, photos, place, cache),
            "20 images more": partial(_tune, bundle, more, place, cache),
        }
        found = interleaved(loops, repeats)
    bare = found["loop"]["seconds"]
    rows = {
        name: {"seconds": round(one["seconds"], 2), "ratio": round(one["seconds"] / bare, 2)}
        for name, one in found.items()
    }
    for name, row in rows.items():
        say(f"{name}: {row['seconds']} s, {row['ratio']} times the loop")
    n_images = _CLASSES * _IMAGES
    return document(started, repeats=repeats, classes=_CLASSES, images=n_images, rows=rows)


def main() -> None:
    own = parser(__doc__)
    own.add_argument("--bundle", type=Path, help="another one than ViT-B/32's size")
    given = own.parse_args()
    size = Size(layers=4 if given.quick else None)
    bundle = given.bundle or full(size, given.cache)
    show(measure(bundle.resolve(), 1 if given.quick else _REPEATS))


if __name__ == "__main__":
    main()
