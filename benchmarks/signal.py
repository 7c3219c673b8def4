"""Signal-to-noise ratio by perturbation and precision, and a check of its verdict; one document.

    python -m benchmarks.signal models/mini --data examples/digits --tune --plot signal.png
    python -m benchmarks.signal BUNDLE --data FOLDER --with earlier.json --plot signal.png

BUNDLE is fp32; int8 and fp16 bundles are made in a temporary folder. --tune also tunes fp32 and
int8 at some perturbations with `ztune tune --force`, to compare test accuracy and training loss
with the gate's ratio. --with adds the panels of earlier documents to the plot.

fp16 is measured on the CPU, where ztune refuses to tune with it, with only ONNX Runtime's basic
optimisations, products accumulated in fp32, and image features of the fp32 bundle.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from export.quantize import quantize_bundle
from runtimes.bundle import Bundle, load_bundle
from runtimes.prompts import feeds, name_tokens, token_table
from runtimes.providers import Execution, Setup, open_session, run_graph
from runtimes.tokenizer import Tokenizer
from ztune.data.features import Features
from ztune.model import Model
from ztune.precision import LIMIT
from ztune.printing import printable
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.starting import read_split
from ztune.system import machine, versions
from ztune.training import TrainingRun
from ztune.types import F32

# Half decades in the range where precisions differ, decades below.
GRID = (1e-9, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
TUNED = {
    "fp32": (1e-9, 1e-8, 1e-7, 1e-5, 1e-2, 1e-1),
    "int8": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1),
}
PUBLISHED = 0.01
# The loss is no longer linear in larger perturbations, in any precision.
_TOO_LARGE = 0.1
_COLOURS = {"fp32": "#0b6e99", "int8": "#c1440e", "fp16": "#4c7a34"}
_INK, _SOFT = "#1f2430", "#9aa3b0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--title", help="of the plot's panels (default: the folder's name)")
    parser.add_argument("--shots", type=int, default=16)
    parser.add_argument("--seeds", default="1,2", help="of the measurements and of the runs")
    parser.add_argument("--tune", action="store_true", help="also tune, which takes minutes")
    parser.add_argument("--queries", type=int, default=5000)
    parser.add_argument("--plot", type=Path, metavar="FILE")
    parser.add_argument("--with", type=Path, action="append", dest="earlier", metavar="JSON")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        document = measure(arguments, Path(folder))
    print(json.dumps(document, indent=2))
    if arguments.plot:
        earlier = [json.loads(path.read_text()) for path in arguments.earlier or []]
        draw([*earlier, document], arguments.plot)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the document: `rows` of the gate's figures, `runs` of tuning results."""
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    full = load_bundle(arguments.bundle)
    bundles = {"fp32": arguments.bundle}
    for precision in ("int8", "fp16"):
        say(f"converting to {precision}")
        bundles[precision] = quantize_bundle(full, folder / precision, precision).path
    rows = []
    for precision, bundle in bundles.items():
        for perturbation in GRID:
            for seed in seeds:
                row = signal(
                    full, bundle, arguments.data, arguments.shots, seed, perturbation, folder
                )
                rows.append({"seed": seed, **row})
            say(f"{precision}, perturbation {perturbation:g}: {rows[-1]['ratio']:.3g}")
    # The same with the unquantized weights as reference.
    for seed in seeds:
        row = signal(
            full, bundles["int8"], arguments.data, arguments.shots, seed, PUBLISHED, folder,
            reference=str(arguments.bundle),
        )  # fmt: skip
        rows.append({"seed": seed, **row, "reference": "fp32 bundle"})
    runs = []
    if arguments.tune:
        for precision, perturbations in TUNED.items():
            for perturbation in perturbations:
                for seed in seeds:
                    runs.append(tuned(arguments, bundles[precision], seed, perturbation, folder))
                say(f"tuned {precision}, perturbation {perturbation:g}: {runs[-1]}")
    return {
        "title": arguments.title or arguments.data.name,
        "shots": arguments.shots,
        "queries": arguments.queries,
        "limit": LIMIT,
        "rows": rows,
        "runs": runs,
        "machine": machine(),
        "versions": versions(),
    }


class _Fp16Graph:
    """An fp16 prompt graph on the CPU, with one call per candidate batch."""

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer):
        self._bundle, self._tokenizer = bundle, tokenizer
        self._path = bundle.file("prompt.onnx")
        self._session = open_session(self._path, Execution(), Setup(plain=True))

    def encoder(self, classes: Sequence[str], n_context: int, _n_candidates: int) -> _Fp16Graph:
        names = name_tokens(self._bundle.text, self._tokenizer, classes, n_context)
        self._constants = feeds(self._bundle.text, token_table(self._bundle), names, n_context)
        return self

    def encode(self, contexts: F32) -> F32:
        given = {**self._constants, "contexts": contexts}
        return run_graph(self._session, self._path, ["features"], given)[0]


@dataclass(frozen=True, kw_only=True)
class _Fp16Model(Model):
    full: Bundle
    """Encodes the images."""

    @cached_property
    def prompt_graph(self) -> Any:
        return _Fp16Graph(self.bundle, self.tokenizer)

    def features(self, *arguments: Any, **more: Any) -> Features:
        return Model(self.full, self.execution).features(*arguments, **more)


def signal(
    full: Bundle,
    bundle: Path,
    data: Path,
    shots: int,
    seed: int,
    perturbation: float,
    folder: Path,
    reference: str | None = None,
) -> dict[str, Any]:
    """Return the measurement of `ztune tune`'s gate with these settings."""
    run_config = RunConfig(
        str(bundle),
        str(data),
        shots=shots,
        seed=seed,
        cache=str(folder / "cache"),
        reference=reference,
        settings={"perturbation": perturbation},
    )
    _, split = read_split(run_config)
    model = Model(load_bundle(bundle), Execution())
    if model.bundle.precision == "fp16":
        model = _Fp16Model(model.bundle, model.execution, full=full)
    return TrainingRun(run_config, split, RunFolder(folder / "no-run"), model).signal()[1]


def ztune(*words: object) -> dict[str, Any]:
    """Run one `ztune` command and return its JSON document."""
    command = [sys.executable, "-m", "ztune.cli.main", *map(str, words), "--json", "--quiet"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def tuned(
    arguments: argparse.Namespace, bundle: Path, seed: int, perturbation: float, folder: Path
) -> dict[str, Any]:
    """Return the results of one forced run."""
    out = folder / f"{bundle.name}-{perturbation:g}-{seed}"
    run = ztune(
        "tune", bundle, "--data", arguments.data, "--shots", arguments.shots, "--seed", seed,
        "--queries", arguments.queries, "--set", f"perturbation={perturbation}", "--force",
        "--cache", folder / "cache", "--out", out,
    )  # fmt: skip
    scored = ztune("eval", out, "--cache", folder / "cache")
    return {
        "precision": run["precision"],
        "perturbation": perturbation,
        "seed": seed,
        "ratio": run["signal"]["ratio"],
        "verdict": run["signal"]["verdict"],
        "train_loss": run["train_loss"],
        "test_accuracy": scored["accuracy"],
        "n": scored["n"],
        "zero_shot_accuracy": scored["zero_shot_accuracy"],
        "seconds": run["seconds"],
    }


def draw(documents: Sequence[dict[str, Any]], path: Path) -> None:
    """Draw one column per document: the ratio, and tuning results against it, if any."""
    from matplotlib.figure import Figure

    n_rows = 3 if any(document["runs"] for document in documents) else 1
    figure = Figure(figsize=(3.7 * len(documents), 3.1 * n_rows), dpi=110, layout="constrained")
    panels = figure.subplots(n_rows, len(documents), squeeze=False)
    queries = documents[0]["queries"]
    for column, document in enumerate(documents):
        _draw_ratios(panels[0][column], document)
        for row, key in enumerate(("train_loss", "test_accuracy")[: n_rows - 1], 1):
            if document["runs"]:
                _draw_runs(panels[row][column], document, key)
            else:
                panels[row][column].set_axis_off()
    panels[0][0].set_ylabel("signal-to-noise of loss differences")
    if n_rows > 1:
        panels[1][0].set_ylabel(f"training loss after {queries:,} queries, nats")
        panels[2][0].set_ylabel(f"test accuracy after {queries:,} queries")
    figure.savefig(path, format="png", metadata={"Software": None})


def _draw_ratios(axes: Any, document: dict[str, Any]) -> None:
    axes.set_title(document["title"], fontsize=10)
    rows = [row for row in document["rows"] if row["reference"].startswith("own graph")]
    for precision in dict.fromkeys(row["precision"] for row in rows):
        own = [row for row in rows if row["precision"] == precision]
        where = sorted({row["perturbation"] for row in own})
        ratios = [_mean_ratio([r for r in own if r["perturbation"] == c]) for c in where]
        axes.plot(
            where, ratios, color=_COLOURS[precision], marker="o", markersize=3, label=precision
        )
    axes.axhline(document["limit"], color=_INK, linestyle="--", linewidth=1)
    axes.axvline(PUBLISHED, color=_SOFT, linewidth=1)
    _note(axes, f"limit {document['limit']:g}", (1e-9, document["limit"]), (0, 3))
    top = ("data", "axes fraction")
    _note(axes, "ZIP's c", (PUBLISHED, 0.02), (-3, 0), xycoords=top, ha="right")
    axes.set(xscale="log", yscale="log", xlabel="perturbation c")
    axes.legend(fontsize=8, frameon=False, loc="upper left")
    _tidy(axes)


def _draw_runs(axes: Any, document: dict[str, Any], key: str) -> None:
    runs = document["runs"]
    for precision in dict.fromkeys(run["precision"] for run in runs):
        own = [run for run in runs if run["precision"] == precision]
        points = []
        for c in sorted({run["perturbation"] for run in own}):
            same = [run for run in own if run["perturbation"] == c]
            points.append((_mean_ratio(same), float(np.mean([run[key] for run in same])), c))
        usual = [point for point in points if point[2] < _TOO_LARGE]
        large = [point for point in points if point[2] >= _TOO_LARGE]
        colour = _COLOURS[precision]
        axes.plot(*list(zip(*usual, strict=True))[:2], "-o", color=colour, ms=4, label=precision)
        axes.plot(
            *list(zip(*large, strict=True))[:2],
            "o",
            color=colour,
            markerfacecolor="white",
            label=f"{precision}, c = {_TOO_LARGE:g}",
        )
    if key == "test_accuracy":
        right = ("axes fraction", "data")
        zero_shot = float(np.mean([run["zero_shot_accuracy"] for run in runs]))
        axes.axhline(zero_shot, color=_SOFT, linewidth=1)
        _note(axes, "hand-written prompt", (1, zero_shot), (-3, 3), xycoords=right, ha="right")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:.1%}")
    axes.axvline(document["limit"], color=_INK, linestyle="--", linewidth=1)
    place = (document["limit"], 0.94 if key == "train_loss" else 0.06)
    text = f"limit {document['limit']:g}"
    _note(axes, text, place, (3, 0), xycoords=("data", "axes fraction"))
    axes.set(xscale="log", xlabel="signal-to-noise before the first step")
    if key == "train_loss":
        axes.legend(fontsize=7, frameon=False, loc="upper right")
    _tidy(axes)


def _mean_ratio(rows: Sequence[dict[str, Any]]) -> float:
    """Return the geometric mean over the seeds."""
    return float(np.exp(np.mean([np.log(max(row["ratio"], 1e-9)) for row in rows])))


def _note(axes: Any, text: str, at: tuple[float, float], by: tuple[int, int], **more: Any) -> None:
    axes.annotate(text, at, xytext=by, textcoords="offset points", fontsize=8, color=_INK, **more)


def _tidy(axes: Any) -> None:
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def say(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
