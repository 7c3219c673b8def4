"""The kind of a path: a bundle, a run, an artifact, an ONNX file, another file or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from ztune.errors import FormatError
from ztune.printing import quoted

Expected = Literal["bundle", "run", "artifact", "classifier", "scored", "bench"]
Kind = Literal[
    "nothing", "bundle", "run", "bench", "comparison", "folder", "artifact", "onnx", "file"
]

RUN_FORMAT = "ztune-run"
"""The `format` of run.json."""
_MARKS: dict[str, Kind] = {
    "bundle.json": "bundle",
    "run.json": "run",
    "compare.json": "comparison",
    "results.sqlite": "bench",
}
_KINDS: dict[Kind, str] = {
    "bundle": "is a bundle",
    "run": "is a run",
    "bench": "has the results of ztune bench",
    "comparison": "has the results of ztune compare",
    "folder": "is a folder",
    "artifact": "is an artifact",
    "onnx": "is an ONNX file",
    "file": "is a file",
    "nothing": "does not exist",
}
# By expected kind: its name, the file that marks its folder, and how to make one.
_EXPECTED: dict[Expected, tuple[str, str, str]] = {
    "bundle": ("a bundle", "bundle.json", "make one with: ztune export --help"),
    "run": ("a run", "run.json", "make one with: ztune tune BUNDLE --data FOLDER --out RUN"),
    "artifact": (
        "a run or its prompt.safetensors",
        "run.json",
        "make one with: ztune tune BUNDLE --data FOLDER --out RUN",
    ),
    "classifier": (
        "a classifier.onnx",
        "",
        "make one with: ztune pack BUNDLE --prompt RUN --out classifier.onnx",
    ),
    "scored": (
        "a run, a bundle or a classifier.onnx",
        "run.json and bundle.json",
        "make a run with: ztune tune BUNDLE --data FOLDER --out RUN",
    ),
    "bench": (
        "a folder of results",
        "results.sqlite",
        "make one with: ztune bench PLAN.toml --out OUT",
    ),
}  # fmt: skip
_PACK_IT = "make one with: ztune pack BUNDLE --prompt {path} --out classifier.onnx"
_TUNE_IT = "make one with: ztune tune {path} --data FOLDER --out RUN"
# Specific advice by expected and actual kind.
_ADVICE: dict[tuple[Expected, Kind], str] = {
    ("bundle", "run"): "give the bundle that it was tuned on; to resume the run: ztune tune "
    "--resume {path}",
    ("bundle", "artifact"): "give the bundle that it was tuned on",
    ("bundle", "onnx"): "give the folder of a bundle; to classify images: ztune predict "
    "{path} IMAGE",
    ("run", "bundle"): _TUNE_IT,
    ("run", "artifact"): "give the folder of its run",
    ("artifact", "bundle"): _TUNE_IT,
    ("artifact", "onnx"): "give the run that it was packed from",
    ("classifier", "bundle"): "make one with: ztune pack {path} --prompt RUN --out classifier.onnx",
    ("classifier", "run"): _PACK_IT,
    ("classifier", "artifact"): _PACK_IT,
    ("scored", "artifact"): "score it with: ztune eval BUNDLE --data FOLDER --prompt {path}",
}
# HOST:PORT or HOST:PORT/NAME, possibly at the end of an absolute path.
_ADDRESS = re.compile(
    r"(?:^|/)((?:[A-Za-z0-9][\w.-]*|\[[0-9A-Fa-f:.]+\]):[0-9]{1,5})((?:/[\w.-]+){0,2})/?$"
)


def kind_of(path: Path) -> Kind:
    """Return the kind of a path, judged by file names."""
    if path.is_dir():
        found = (kind for name, kind in _MARKS.items() if (path / name).is_file())
        return next(found, "folder")
    if not path.exists():
        return "nothing"
    suffixes: dict[str, Kind] = {".safetensors": "artifact", ".onnx": "onnx"}
    return suffixes.get(path.suffix.lower(), "file")


def wrong_kind(path: Path, expected: Expected) -> FormatError:
    """Return the error with a path's kind, the expected kind, and what to do."""
    kind = kind_of(path)
    what, mark, advice = _EXPECTED[expected]
    advice = _ADVICE.get((expected, kind), advice).format(path=quoted(path))
    found = _KINDS[kind] + (f" without {mark}" if kind == "folder" and mark else "")
    address = _ADDRESS.search(path.as_posix())
    if kind == "nothing" and expected in ("bundle", "scored") and address:
        place = f"{address[1]}{address[2] or '/NAME'}"
        advice = f"for a server add a scheme: triton://{place} for gRPC, http://{place} for HTTP"
    return FormatError(f'"{path}" {found}, expected {what} ({advice})')
