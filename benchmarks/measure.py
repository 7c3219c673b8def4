"""Shared by the benchmarks: the JSON document, interleaved timing, peaks of whole processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from ztune.io.files import replacing
from ztune.printing import printable
from ztune.system import commit, machine, versions

ROOT = Path(__file__).parent.parent
# Pause between loops, since threads of the previous one spin for a few milliseconds.
_PAUSE = 0.02


def parser(module_doc: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of every benchmark."""
    result = argparse.ArgumentParser(
        description=module_doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--quick", action="store_true", help="a reduced run: within 45 s")
    result.add_argument(
        "--cache",
        # Passed to processes with other working folders.
        type=lambda word: Path(word).resolve(),
        default=ROOT / ".cache" / "benchmarks",
        help="folder of the models, which are exported once",
    )
    return result


def say(text: str) -> None:
    """Write a line of progress to standard error."""
    print(printable(text), file=sys.stderr, flush=True)


def document(started: float, **content: Any) -> dict[str, Any]:
    """Return a benchmark's document; `started` comes from time.perf_counter()."""
    return {
        "command": " ".join([Path(sys.argv[0]).stem, *sys.argv[1:]]),
        **content,
        "seconds": round(time.perf_counter() - started, 1),
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit(),
        "machine": machine(),
        "versions": versions(),
    }


def show(content: Mapping[str, Any]) -> None:
    """Print the document: the only thing on standard output."""
    print(json.dumps(content, indent=2))


def seconds(call: Callable[[], object]) -> float:
    """Return the wall time of one call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def interleaved(
    loops: Mapping[str, Callable[[], Mapping[str, float]]], repeats: int
) -> dict[str, dict[str, float]]:
    """Run all loops in turn, `repeats` times; return the medians of what each reports.

    Interleaving makes a disturbance of the machine affect all of them.
    """
    found: dict[str, list[Mapping[str, float]]] = {name: [] for name in loops}
    for _ in range(repeats):
        for name, loop in loops.items():
            time.sleep(_PAUSE)
            found[name].append(loop())
    return {
        name: {key: statistics.median(one[key] for one in all_) for key in all_[0]}
        for name, all_ in found.items()
    }


def timed(call: Callable[[], object], n_calls: int = 1) -> Callable[[], dict[str, float]]:
    """Return a loop that reports the median seconds of `n_calls` in a row."""
    return lambda: {"seconds": statistics.median(seconds(call) for _ in range(n_calls))}


@dataclass(frozen=True)
class Finished:
    """A finished process."""

    out: str
    peak_mb: float
    """Of the largest process (it or a child that it waited for), as reported by the system."""
    tree_peak_mb: float
    """Of all of them together, with `watch`; shared pages count for each."""
    seconds: float


def run_alone(command: Sequence[object], *, watch: bool = False) -> Finished:
    """Run a process and measure its memory; `watch` samples its children every 20 ms.

    Watching slows the process down, so do not use it for timing. The reported memory is at least
    that of the parent process, so benchmarks of memory do not import torch.
    """
    start = time.perf_counter()
    words = [str(word) for word in command]
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(words, stdout=out, cwd=ROOT)
        tree_peak = 0
        while not (ended := os.wait4(process.pid, os.WNOHANG if watch else 0))[0]:
            with contextlib.suppress(psutil.Error):
                tree = [root := psutil.Process(process.pid), *root.children(recursive=True)]
                tree_peak = max(tree_peak, sum(one.memory_info().rss for one in tree))
            time.sleep(0.02)
        taken = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(ended[1])
        if process.returncode:
            sys.exit(f"{' '.join(words)}: exit code {process.returncode}")
        out.seek(0)
        unit = 1 if sys.platform == "darwin" else 1024
        peak = ended[2].ru_maxrss * unit / 1e6
        return Finished(out.read().decode(), peak, max(peak, tree_peak / 1e6), taken)


def last_line(out: str) -> dict[str, Any]:
    """Return the JSON object on a process's last line of output."""
    found: dict[str, Any] = json.loads(out.strip().splitlines()[-1])
    return found


def draw(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    labels: Mapping[str, tuple[str, str]],
    path: Path,
    columns: int,
) -> None:
    """Draw lines (x, y) by name, one panel per title; a large y range gets a logarithmic axis."""
    import logging

    logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it announces its font cache
    from matplotlib.figure import Figure

    n_rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.2 * columns, 3 * n_rows), dpi=120, layout="constrained")
    colours = ("#0b6e99", "#c1440e", "#4c7a34", "#7a4c9e")
    places = figure.subplots(n_rows, columns, squeeze=False).flat
    for axes, (title, lines) in zip(places, panels.items(), strict=False):
        for colour, (name, points) in zip(colours, lines.items(), strict=False):
            axes.plot(*zip(*points, strict=True), "o-", color=colour, label=name, markersize=3)
        x, y = labels[title]
        at = sorted({point[0] for points in lines.values() for point in points})
        heights = [point[1] for points in lines.values() for point in points]
        axes.set(xscale="log", xlabel=x, ylabel=y)
        axes.set_xticks(at, [f"{value:g}" for value in at], minor=False)
        axes.minorticks_off()
        if max(heights) > 5 * min(heights):
            axes.set_yscale("log")
        else:
            axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(fontsize=8, frameon=False)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
