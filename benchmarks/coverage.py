"""Export every architecture of open_clip with few layers, and compare it with torch: a line each.

    python -m benchmarks.coverage
    python -m benchmarks.coverage SigLIP --out siglip.jsonl
    python -m benchmarks.coverage --docs docs/models.md

The weights are random and the towers narrow (benchmarks/reduced.py); the rest is the published
architecture, exported as `ztune export` does. Results go to a file of JSON lines, so that a second
call continues. An architecture that ends its process costs a line, not the list.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

from benchmarks.coverage_page import render
from benchmarks.measure import ROOT, say
from ztune.errors import ZtuneError
from ztune.printing import reason_of

RESULTS = ROOT / ".cache" / "coverage.jsonl"
BATCH = 24
"""Architectures a process, since torch takes 10 s to import."""
Row = Mapping[str, Any]


def main() -> None:
    """Export what is missing, or write the page of what was exported."""
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("word", nargs="?", default="", metavar="WORD", help="only these names")
    options.add_argument("--out", type=Path, default=RESULTS, metavar="FILE", help="results")
    options.add_argument("--jobs", type=int, default=1, metavar="N", help="processes at once (1)")
    options.add_argument("--docs", type=Path, metavar="FILE", help="write the page of the results")
    options.add_argument("--batch", nargs="+", metavar="NAME", help=argparse.SUPPRESS)
    options.add_argument("--graphs", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    given = options.parse_args()
    if given.batch:
        with operators_once():
            for name in given.batch:
                append(given.out, export_one(name, given.graphs))
        return
    import open_clip

    if given.docs is None:
        names = [name for name in open_clip.list_models() if given.word.lower() in name.lower()]
        with tempfile.TemporaryDirectory() as graphs:
            run(names, given.out, functools.partial(run_batch, given.out, Path(graphs)), given.jobs)
    else:
        names = open_clip.list_models()
        tags = {name: open_clip.list_pretrained_tags_by_model(name) for name in names}
        given.docs.write_text(render(names, tags, read(given.out)), encoding="utf-8")


def run(
    names: Sequence[str], out: Path, batch: Callable[[Sequence[str]], int], jobs: int = 1
) -> None:
    """Export the architectures that `out` lacks; `batch` returns how its process ended."""
    while missing := [name for name in names if name not in read(out)]:
        parts = [missing[job::jobs][:BATCH] for job in range(min(jobs, len(missing)))]
        with ThreadPoolExecutor(jobs) as pool:
            codes = list(pool.map(batch, parts))
        for part, code in zip(parts, codes, strict=True):
            left = [name for name in part if name not in read(out)]
            if code and left:
                append(out, {"name": left[0], "failed": f"its process ended with code {code}"})
            elif left:
                raise ZtuneError(f"a process left out {left[0]} and reported no error")


def run_batch(out: Path, graphs: Path, names: Sequence[str]) -> int:
    """Export architectures in a process of their own."""
    options = ["--out", str(out), "--graphs", str(graphs), "--batch", *names]
    command = [sys.executable, "-m", "benchmarks.coverage", *options]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def read(out: Path) -> dict[str, Row]:
    """Return the results by name; a line that was cut off counts as missing."""
    rows = {}
    for line in out.read_text(encoding="utf-8").splitlines() if out.exists() else ():
        with contextlib.suppress(ValueError):
            row = json.loads(line)
            rows[row["name"]] = row
    return rows


def append(out: Path, row: Row) -> None:
    """Add one result to the file, and print it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("a+", encoding="utf-8") as file:
        file.seek(0)
        whole = not (text := file.read()) or text.endswith("\n")
        file.write(f"{'' if whole else chr(10)}{json.dumps(row)}\n")
    said = row.get("refused") or row.get("failed")
    if said is None:
        said = f"{row['graph']}, largest difference {row['max_abs']:.1e}, {row['seconds']} s"
    say(f"{row['name']}: {said}")


def export_one(name: str, graphs: Path) -> Row:
    """Export one architecture; return its row."""
    from benchmarks.reduced import reduced_config, reduced_timm, write_reduced
    from export.bundle import export_bundle
    from export.clip import load_clip

    started = time.perf_counter()
    row: dict[str, Any] = {"name": name}
    try:
        with tempfile.TemporaryDirectory() as place, reduced_timm():
            model, row["stand_ins"] = write_reduced(name, Path(place) / "model")
            with graphs_once(reduced_config(name), graphs):
                bundle = export_bundle(load_clip(model), Path(place) / "bundle")
    except ZtuneError as error:
        row["refused"] = str(error)
    except Exception as error:
        row["failed"] = reason_of(error)
        traceback.print_exc()
    else:
        row |= {
            "graph": bundle.text.graph,
            "pooling": bundle.text.pooling,
            "max_abs": max(figures["max_abs"] for figures in bundle.parity.values()),
            "cosine": min(figures["cosine"] for figures in bundle.parity.values()),
        }
    versions = {"open_clip": _version("open_clip_torch"), "torch": _version("torch")}
    versions |= {"timm": _version("timm"), "transformers": _version("transformers")}
    return row | {"seconds": round(time.perf_counter() - started, 1), "versions": versions}


def _version(package: str) -> str:
    from importlib import metadata

    return metadata.version(package)


@contextlib.contextmanager
def graphs_once(config: Mapping[str, Any], folder: Path) -> Iterator[None]:
    """Trace equal towers of several architectures once; each is compared with its own torch."""
    import onnx_ir
    import torch

    trace = torch.onnx.export

    def traced_once(module: Any, *given: Any, **options: Any) -> Any:
        graph = type(module).__name__
        whole = {key: value for key, value in config.items() if not key.endswith("_cfg")}
        tower = config["vision_cfg" if graph == "ImageGraph" else "text_cfg"]
        key = json.dumps([graph, whole, tower], sort_keys=True)
        kept = folder / hashlib.sha256(key.encode()).hexdigest()
        if not kept.exists():
            program: Any = trace(module, *given, **options)
            onnx_ir.save(program.model, folder / f"{os.getpid()}")
            (folder / f"{os.getpid()}").replace(kept)  # whole at once, for other processes
        return SimpleNamespace(model=onnx_ir.load(kept))

    with mock.patch.object(torch.onnx, "export", traced_once):
        yield


@contextlib.contextmanager
def operators_once() -> Iterator[None]:
    """Let torch's exporter read its library of operators once, not for every graph (2 s)."""
    from torch.onnx._internal.exporter import _registration

    apis = _registration.onnxscript_apis
    with mock.patch.object(apis, "get_torchlib_ops", functools.cache(apis.get_torchlib_ops)):
        yield


if __name__ == "__main__":
    main()
