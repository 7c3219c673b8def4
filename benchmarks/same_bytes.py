"""Check whether two commits give bit-identical results, method by method.

    python -m benchmarks.same_bytes BEFORE
    python -m benchmarks.same_bytes BEFORE AFTER --bundle BUNDLE --data FOLDER

Each commit is unpacked into a folder and runs `ztune tune` there, with the packages of this
environment; AFTER defaults to the working tree. It compares the tensors and metadata of
`prompt.safetensors`, the lines of `history.jsonl` without seconds, and results in `run.json`. One
JSON document; the exit code is 1 if anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, document, parser, say, show
from ztune.io.old_formats import rename_arrays
from ztune.io.tensors import read_tensors

RUNS = {
    "ogn": 200,
    "ogn-context": 400,
    "zip": 400,
    "sharpzo": 1200,
    "cma": 400,
    "spsa": 200,
    "spsa-gc": 200,
    "rgf": 200,
    "gda": 0,
    "lp++": 0,
    "proker": 0,
    "bptvlm": 60,
    "blackvip": 24,
    "bar": 24,
}
"""Methods and their queries; 0 for methods without steps."""
_FOUND = ("queries", "image_forwards", "stop_reason", "train_loss", "validation")
_PROGRAM = "import sys; from ztune.cli.main import main; sys.exit(main())"


@dataclass(frozen=True)
class Task:
    """The settings for both commits."""

    bundle: Path
    data: Path
    template: str
    shots: int
    seed: int

    def words(self, method: str, queries: int, out: Path, cache: Path) -> list[str]:
        """Return the arguments of `ztune`."""
        spent = ["--queries", str(queries)] if queries else []
        return [
            *("tune", str(self.bundle), "--data", str(self.data), "--template", self.template),
            *("--shots", str(self.shots), "--seed", str(self.seed), "--method", method, *spent),
            *("--provider", "cpu", "--threads", "1", "--quiet"),
            *("--cache", str(cache), "--out", str(out)),
        ]


def unpack(revision: str, folder: Path) -> Path:
    """Write the files of a commit into a new folder and return it."""
    folder.mkdir()
    archive = subprocess.run(
        ["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE, check=True
    )
    subprocess.run(["tar", "-x", "-C", str(folder)], input=archive.stdout, check=True)
    return folder


def run_tune(tree: Path, words: list[str], out: Path) -> dict[str, Any]:
    """Run the `ztune` of `tree`; return what must not differ."""
    # Puts the tree before an installed ztune.
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, *words],
        cwd=tree, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1:]}
    history = out / "history.jsonl"
    lines = history.read_text().splitlines() if history.exists() else []
    steps = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in lines]
    run = json.loads((out / "run.json").read_text())
    return {
        "prompt": digest_of(out / "prompt.safetensors"),
        "history": hashlib.sha256(json.dumps(steps).encode()).hexdigest(),
        "steps": len(steps),
        **{name: run.get(name) for name in _FOUND},
    }


def digest_of(artifact: Path) -> str:
    """Return a digest of an artifact's tensors and metadata, in any version of its format."""
    arrays, metadata = read_tensors(artifact, "artifact")
    digest = hashlib.sha256(json.dumps({**metadata, "version": None}, sort_keys=True).encode())
    for name, array in sorted(rename_arrays(arrays).items()):
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()


def compare(task: Task, trees: dict[str, Path], methods: list[str], work: Path) -> list[Any]:
    """Return a row per method: both commits' results and their differences."""
    rows = []
    for method in methods:
        found = {}
        for name, tree in trees.items():
            out = work / f"{name}-{method}"
            words = task.words(method, RUNS[method], out, work / f"{name}-cache")
            found[name] = run_tune(tree, words, out)
        before, after = found["before"], found["after"]
        differ = sorted(key for key in before | after if before.get(key) != after.get(key))
        if "error" in before and "error" in after:
            differ = ["error"]
        say(f"{method}: {'differs in ' + ', '.join(differ) if differ else 'the same bytes'}")
        rows.append({"method": method, "same": not differ, "differ": differ, **found})
    return rows


def given_task(given: argparse.Namespace) -> Task:
    return Task(
        given.bundle.resolve(), given.data.resolve(), given.template, given.shots, given.seed
    )


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("before", help="a commit")
    arguments.add_argument("after", nargs="?", help="another commit (default: the working tree)")
    arguments.add_argument("--bundle", type=Path, default=ROOT / "models" / "mini")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples" / "digits")
    arguments.add_argument("--template", default="a photo of the digit {}.")
    arguments.add_argument("--shots", type=int, default=4)
    arguments.add_argument("--seed", type=int, default=1)
    arguments.add_argument("--methods", default=",".join(RUNS), help="of these")
    given = arguments.parse_args()
    started = time.perf_counter()
    methods = given.methods.split(",")[: 2 if given.quick else None]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        trees = {
            "before": unpack(given.before, work / "before"),
            "after": unpack(given.after, work / "after") if given.after else ROOT,
        }
        rows = compare(given_task(given), trees, methods, work)
    same = all(row["same"] for row in rows)
    about = {"before": given.before, "after": given.after or "working tree", "same": same}
    show(document(started, **about, data=given.data.name, bundle=given.bundle.name, rows=rows))
    sys.exit(not same)


if __name__ == "__main__":
    main()
