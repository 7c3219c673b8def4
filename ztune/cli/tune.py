"""`ztune tune`: from a bundle and a folder of pictures to a prompt."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from ztune.cli.execution import add_execution_arguments, settled
from ztune.cli.output import Output, table
from ztune.cli.server import (
    add_server_arguments,
    is_url,
    merged,
    named_servers,
    open_served_workbench,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.errors import AwayError, ConfigError, FormatError, ServerError
from ztune.io.fields import Fields
from ztune.methods import METHODS, PRESETS
from ztune.optim.mixture import PROMPTS
from ztune.run_config import (
    Request,
    add_root_argument,
    remarks_on,
    request_from_arguments,
    request_from_json,
    snapshots_of_word,
)
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.model import Workbench
    from ztune.run import RunFolder
    from ztune.training import Work

EXAMPLE = """\
  ztune tune models/mini --data examples/digits --shots 16 --out runs/digits
  ztune tune bundles/vit-b-32 --data photos --method gda --out runs/photos-gda
  ztune tune bundles/vit-b-32 --data photos --method zip --set step_size=0.02 --out runs/photos
  ztune tune bundles/vit-b-32 --data dtd --root /data --template "{} texture." --out runs/dtd
  ztune tune triton://host:8001/vit-b-32 --data photos --out runs/photos
  ztune tune --resume runs/photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", type=place, metavar="BUNDLE|URL")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="go on with a stopped run")
    parser.add_argument(
        "--data", metavar="FOLDER|NAME", help="folder, .csv/.jsonl list, or name with --root"
    )
    add_root_argument(parser)
    parser.add_argument("--out", type=Path, metavar="RUN", help="new folder for the results")
    parser.add_argument("--shots", type=int, metavar="N", help="pictures per class (default: 16)")
    parser.add_argument("--method", help=f"{', '.join(METHODS)} (default: ogn; see: ztune methods)")
    parser.add_argument("--queries", type=int, metavar="N", help="default: 5000")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 1")
    parser.add_argument("--preset", help=f"{' or '.join(PRESETS)}")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a method's setting")
    parser.add_argument("--init", metavar="WORDS", help='start from words, say "a photo of a"')
    parser.add_argument(
        "--template",
        action="append",
        metavar="TEXT",
        help="hand-written prompt of zero-shot, heads and visual prompts; several are averaged "
        '(default: "a photo of a {}.")',
    )
    parser.add_argument(
        "--keep", metavar="WHICH", help="last point, as published, or best on validation"
    )
    parser.add_argument(
        "--validate-every", type=int, metavar="N", help="queries between such validations"
    )
    parser.add_argument(
        "--patience", type=int, metavar="N", help="stop after N validations without gain"
    )
    parser.add_argument(
        "--snapshots",
        type=snapshots_of_word,
        metavar="N|N,N",
        help="points of a curve: N - 1 artifacts on the way, or those after so many queries each",
    )
    parser.add_argument(
        "--extractor", type=Path, metavar="FILE", help="ONNX file whose features a decoder sees"
    )
    parser.add_argument(
        "--val", type=int, metavar="N", help="validation pictures a class (default: min(shots, 4))"
    )
    parser.add_argument("--test-fraction", metavar="X", help="kept for testing (default: auto)")
    parser.add_argument("--split-seed", type=int, metavar="N", help="default: 0")
    parser.add_argument("--test-data", type=Path, metavar="FOLDER", help="test pictures elsewhere")
    parser.add_argument("--names", type=Path, metavar="FILE", help="lines of folder<TAB>name")
    parser.add_argument("--cache", type=Path, metavar="DIR", help="default: inside RUN")
    parser.add_argument(
        "--augment", type=int, metavar="K", help="cached random views per training picture"
    )
    parser.add_argument(
        "--skip-broken", action="store_true", default=None, help="leave broken pictures out"
    )
    parser.add_argument(
        "--force", action="store_true", default=None, help="tune below the signal-to-noise limit"
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="BUNDLE",
        help="fp32 bundle to measure an int8 or fp16 one's signal against (default: its own graph)",
    )
    add_execution_arguments(parser, default=None)
    parser.add_argument(
        "--memory-limit",
        type=int,
        metavar="MB",
        help="of the tuning's forward passes (default: 250, on a GPU 4000)",
    )
    add_server_arguments(parser)


# What the last bits of a result depend on.
_ARITHMETIC = (
    "ztune", "numpy", "pillow", "onnxruntime", "onnxruntime-gpu", "processor", "cores",
)  # fmt: skip
_ASKED = (
    "data", "out", "shots", "method", "queries", "seed", "preset", "set", "init", "template", "val",
    "test_fraction", "split_seed", "test_data", "names", "cache", "augment", "skip_broken",
    "provider", "threads", "memory_limit", "force", "reference", "keep", "validate_every",
    "patience", "snapshots", "extractor", "root",
)  # fmt: skip


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.resume is not None:
        for name in _ASKED:
            if getattr(arguments, name) is not None:
                raise ConfigError(
                    f"--resume takes everything from the run; leave out --{name.replace('_', '-')}"
                )
        given = server_settings(arguments)
        document = _resume(arguments.resume, arguments.bundle, given, output)
        path = arguments.resume
    else:
        for name in ("bundle", "data", "out"):
            if getattr(arguments, name) is None:
                shown = "BUNDLE" if name == "bundle" else f"--{name}"
                raise ConfigError(f"tune needs {shown} (see: ztune tune --help)")
        if not is_url(arguments.bundle):
            require_no_server_options(arguments)
        request = request_from_arguments(arguments, _ASKED)
        document = _start(request, server_settings(arguments), arguments.out, output)
        path = arguments.out
    _judge(document, output)
    output.result(document, _lines(document, path))


Settings = Mapping[str, Json]
"""How a server is reached: what the options of this very command say of it."""


def _start(request: Request, server: Settings, out: Path, output: Output) -> dict[str, Json]:
    from ztune.checks import start_config
    from ztune.model import open_workbench
    from ztune.run import RunFolder
    from ztune.training import Work, opening, task_of

    start_config(request)
    request.split_settings()  # wrong numbers are told before anything is opened
    if is_url(request.bundle):
        bench = _served(request, request.bundle, request.bundle, server, output)
    else:
        execution = settled(request.provider, request.threads, output, request.memory_limit)
        bench = open_workbench(Path(request.bundle), execution, output)
    with bench:
        dataset, split = task_of(request)
        for remark in remarks_on(request):
            output.remark(remark)
        if request.preset == "published" and request.augment:
            output.remark(
                "preset published: random crops anew each step are approximated by "
                f"{request.augment} cached views per picture"
            )
        if dataset.ignored:
            output.remark(f"files that are no pictures of a class, left alone: {dataset.ignored}")
        for note in split.notes:
            output.remark(note)
        counts = [len(split.entries_of(role)) for role in ("train", "val", "test")]
        output.remark(
            f"{len(split.classes)} classes: {counts[0]} pictures to tune with, {counts[1]} for "
            f"validation, {counts[2]} kept for testing"
        )
        folder = RunFolder(out)
        work = Work(request, split, folder, bench)
        work.check()
        head = opening(request, bench, split)
        folder.create(head, split.to_json())
        with folder.locked(), _told_how_to_resume(out, request.bundle):
            return _drawn(work, work.carry_out(head))


def _resume(
    path: Path, moved_bundle: Path | str | None, server: Settings, output: Output
) -> dict[str, Json]:
    from ztune.run import RunFolder

    folder = RunFolder(path)
    folder.read()
    with folder.locked():
        head = {k: v for k, v in folder.read().items() if k not in ("format", "version")}
        if head.get("status") == "finished":
            output.remark(f"{path} is finished; nothing to do")
            return head
        if head.get("status") == "refused":
            raise ConfigError(
                f'run "{path}" was refused before its first step, see "signal" in its run.json; '
                "start it anew with other settings: ztune tune BUNDLE --data FOLDER --out "
                f"{shlex.quote(str(path))}"
            )
        return _go_on(folder, head, moved_bundle, server, output)


def _served(
    request: Request, url: str, named: Path | str | None, server: Settings, output: Output
) -> Workbench:
    """Return the server's bundle at work; `named` is the URL where the command itself gives it.

    Raises: ConfigError for an option that is the server's own affair.
    """
    settings = merged(request.server, server)
    local = settings.get("images") == "local"
    for name in ("provider", "threads", "memory_limit"):
        asked = getattr(request, name) != getattr(Request("", ""), name)
        if asked and (name == "memory_limit" or not local):
            raise ConfigError(
                f"how graphs run is the server's affair: leave out --{name.replace('_', '-')}"
            )
    return open_served_workbench(
        url,
        settings,
        named_servers(named, server),
        output,
        provider=request.provider,
        threads=request.threads,
    )


def _go_on(
    folder: RunFolder,
    head: dict[str, Json],
    moved_bundle: Path | str | None,
    server: Settings,
    output: Output,
) -> dict[str, Json]:
    """Finish a run as it was begun: its bundle, pictures, provider and settings."""
    from ztune.data.split import Split
    from ztune.io.files import read_json
    from ztune.system import machine, versions
    from ztune.training import Work

    where = f'run "{folder.path}": run.json'
    fields = Fields(head, where)
    request = request_from_json(fields.object("request").values, where)
    # The settings as they were then, should a default have changed since.
    request = replace(request, settings=fields.object("config").values)
    bench = _reopened(folder, fields, request, moved_bundle, server, output)
    then = {**fields.object("versions").values, **fields.object("machine").values}
    now = {**versions(), **machine()}
    changed = [
        f"{k} {then.get(k)}, now {now.get(k)}" for k in _ARITHMETIC if then.get(k) != now.get(k)
    ]
    if changed:
        output.warn(f"not as when the run began, so bytes may differ: {'; '.join(changed)}")
    with bench:
        split = Split.from_json(read_json(folder.split, where), f'run "{folder.path}": split.json')
        split.check_unchanged()
        work = Work(request, split, folder, bench)
        work.check()
        with _told_how_to_resume(folder.path, moved_bundle):
            return _drawn(work, work.carry_out(head))


def _reopened(
    folder: RunFolder,
    fields: Fields,
    request: Request,
    moved_bundle: Path | str | None,
    server: Settings,
    output: Output,
) -> Workbench:
    """Return the bundle or server that a run began with, at work as it was.

    Raises: FormatError when it is gone or another, ConfigError when it is of the other kind.
    """
    from runtimes.bundle import load_bundle
    from runtimes.providers import Execution, resolve
    from ztune.model import Workbench

    bundle = moved_bundle or request.bundle
    resumes = f"--resume {shlex.quote(str(folder.path))}"
    if is_url(bundle) != is_url(request.bundle):
        kind = "a server (URL)" if is_url(request.bundle) else "a bundle (folder)"
        raise ConfigError(f'the run was tuned on {kind}, "{bundle}" is none')
    if server and not is_url(bundle):
        raise ConfigError("the run was tuned on a bundle: leave out the options of a server")
    if is_url(bundle):
        bench = _served(request, str(bundle), moved_bundle, server, output)
        where = f"server {bundle} serves a bundle that"
    else:
        if not Path(bundle).is_dir():
            raise FormatError(
                f'the run\'s bundle "{bundle}" is gone; put it back, or name where it is now: '
                f"ztune tune BUNDLE {resumes}"
            )
        provider, _ = resolve(fields.text("provider"))
        execution = Execution(provider, request.threads, request.memory_limit, remark=output.remark)
        bench = Workbench(load_bundle(Path(bundle)), execution, output)
        where = f'bundle "{bundle}"'
    if bench.bundle.digest != fields.text("bundle_digest"):
        bench.close()
        raise FormatError(
            f"{where} is not the one that the run began with (put it back, or start a new run)"
        )
    return bench


def _drawn(work: Work, document: dict[str, Json]) -> dict[str, Json]:
    """Draw the curve of a finished run that has steps; return its document as it is."""
    from ztune.report import draw_curve

    if work.tuned is None:
        return document
    request, validation = work.request, Fields(document, "run.json").object("validation")
    shown = {"zero-shot": "zero-shot", "tuned": "tuned", "gda": "GDA"}
    levels = {
        f"{shown[name]}, validation": validation.object(name).number("accuracy")
        for name in validation.values
    }
    title = (
        f"{request.method} on {Path(request.data).name}, {request.shots} shots, seed {request.seed}"
    )
    draw_curve(work.folder.read_history(), levels, title, work.folder.path / "curve.png")
    return document


class _told_how_to_resume:  # noqa: N801 - reads as a phrase behind `with`
    """Give an interruption the command that goes on.

    A URL that this command named is in it, since secrets go nowhere else.
    """

    def __init__(self, path: Path, named: Path | str | None):
        url = [str(named)] if named and is_url(named) else []
        self._command = shlex.join(["ztune", "tune", *url, "--resume", str(path)])

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if isinstance(error, ServerError):
            done = "every step that was answered is saved, " if isinstance(error, AwayError) else ""
            raise ServerError(f"{error}; {done}go on with: {self._command}") from None
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"go on with: {self._command}") from None


def _judge(document: dict[str, Json], output: Output) -> None:
    """Warn where tuning was not worth it."""
    validation = document.get("validation")
    if not isinstance(validation, dict) or not validation:
        return
    if document["method"] == "zero-shot":
        return
    accuracy = {
        name: Fields(validation, "run").object(name).number("accuracy") for name in validation
    }
    if accuracy["tuned"] <= accuracy.get("zero-shot", 0.0):
        output.warn(
            f"on the validation pictures the result ({accuracy['tuned']:.1%}) does not beat the "
            f"hand-written prompt ({accuracy['zero-shot']:.1%})"
        )


def _lines(document: dict[str, Json], path: Path) -> list[str | Table]:
    fields = Fields(document, "run.json")
    lines: list[str | Table] = []
    validation = fields.object("validation")
    rows = []
    for name, shown in (
        ("zero-shot", "zero-shot"),
        ("tuned", f"tuned ({fields.text('method')})"),
        ("gda", "GDA"),
    ):
        if name in validation.values:
            part = validation.object(name)
            low, high = part.numbers("interval", 2)
            rows.append((shown, f"{part.number('accuracy'):.1%}", f"{low:.1%} to {high:.1%}"))
    if rows:
        n = validation.object("tuned").integer("n")
        chosen = "heads chose their settings on them"
        if fields.object("request").values.get("keep") == "best":
            chosen += ", and the run its point"
        title = f"accuracy on {n} validation pictures ({chosen})"
        lines.append(table(title, ("", "accuracy", "95 % interval"), rows))
    else:
        lines.append("no validation pictures, so nothing to compare with here (see: ztune eval)")
    if "server" in document:
        server = fields.object("server")
        lines.append(
            f"server {server.text('url')}: {server.integer('sent')} queries sent, of these "
            f"{server.integer('possibly_billed_twice')} possibly billed twice; "
            f"{server.integer('report_queries')} more for the report"
        )
    lines.append(
        f"{fields.integer('queries')} queries, {fields.integer('text_forwards')} text forwards, "
        f"{fields.integer('image_forwards')} image forwards, {fields.number('seconds'):.1f} s, "
        f"peak memory {fields.number('peak_memory_mb'):.0f} MB"
    )
    if fields.text("stop_reason") == PROMPTS:
        asked = fields.object("request").integer("queries")
        lines.append(f"ended before {asked} queries: the method takes no more (most_prompts)")
    where = "" if "zero-shot" in validation.values or not rows else " --bundle DIR"
    lines.append(f"{path / 'prompt.safetensors'} (measure it with: ztune eval {path}{where})")
    return lines
