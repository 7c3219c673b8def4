"""`ztune tune`: tune a prompt or fit a head on labelled images."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.remote.endpoint import is_url, parse_named_server
from runtimes.remote.settings import merge_settings, settings_to_save
from ztune.cli.options import add, number_or_word
from ztune.cli.output import Output, Table
from ztune.cli.run_settings import run_config_of, settings_of
from ztune.cli.server import (
    SERVER,
    add_server_arguments,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.data.relocate import resolve_roots
from ztune.errors import AwayError, ConfigError, FormatError, ServerError, StorageError
from ztune.io.schema import plain
from ztune.methods.registry import views_of
from ztune.printing import quoted
from ztune.run_config import RunConfig
from ztune.run_document import RunReport
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.model import Model
    from ztune.saved_run import SavedRun

USAGE = ("BUNDLE|URL --data FOLDER|NAME --out RUN [options]", "--resume RUN")
EXAMPLE = """\
  ztune tune models/mini --data examples/digits --shots 16 --out runs/digits
  ztune tune bundles/vit-b-32 --data photos --method gda --out runs/photos-gda
  ztune tune bundles/vit-b-32 --data photos --method zip --set step_size=0.02 --out runs/photos
  ztune tune bundles/vit-b-32 --data dtd --root /data --template "{} texture." --out runs/dtd
  ztune tune triton://host:8001/vit-b-32 --data photos --out runs/photos
  ztune tune --resume runs/photos"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        nargs="?",
        type=place,
        metavar="BUNDLE|URL",
        help="bundle from ztune export, or a server",
    )
    first = parser.add_argument_group("most needed")
    add(first, "--data", "--root")
    first.add_argument("--out", type=Path, metavar="RUN", help="new folder for the results")
    add(first, "--method", "--shots", "--queries", "--seed", "--template", "--provider")
    first.add_argument("--resume", type=Path, metavar="RUN", help="resume a stopped run")
    data = parser.add_argument_group("data and files")
    add(data, "--names", "--nested", "--val", "--test-fraction", "--test-data", "--split-seed")
    data.add_argument("--augment", type=int, metavar="K", help="cached views per training image")
    add(data, "--cache", help="cache folder for features (default: one for all runs)")
    add(data, "--skip-broken", "--skip-conflicts", "--max-pixels")
    data.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    method = parser.add_argument_group("method")
    add(method, "--preset", "--set", "--init")
    method.add_argument(
        "--reject", type=float, metavar="SHARE", help="refuse images of none of the classes"
    )
    method.add_argument(
        "--priors", metavar="WHICH", help="uniform (default), or data: class shares"
    )
    method.add_argument("--keep", metavar="WHICH", help="point: last (default), best (validation)")
    method.add_argument("--validate-every", type=int, metavar="N", help="queries between passes")
    method.add_argument(
        "--patience", type=int, metavar="N", help="stop after N validations without improvement"
    )
    method.add_argument(
        "--snapshots",
        type=number_or_word,
        metavar="N|N,N",
        help="save N - 1 intermediate snapshots, or one after each of these numbers of queries",
    )
    machine = parser.add_argument_group("machine")
    add(machine, "--threads", "--memory-limit", "--reference", "--force")
    add_server_arguments(parser)


def run(arguments: argparse.Namespace, output: Output) -> None:
    if arguments.resume is not None:
        for name, option in arguments.given.items():
            if name not in ("resume", "data", "test_data", "max_pixels", *SERVER):
                raise ConfigError(
                    f"{option} does not apply to --resume (leave it out: the run has its settings)"
                )
        server = server_settings(arguments)
        roots = resolve_roots(arguments.data, arguments.test_data)
        report = _resume(arguments.resume, arguments.bundle, server, roots, output)
        path = arguments.resume
    else:
        for name, shown in (("bundle", "BUNDLE"), ("data", "--data"), ("out", "--out")):
            if getattr(arguments, name) is None:
                raise ConfigError(f"{shown} is required (see: ztune tune --help)")
        if not is_url(arguments.bundle):
            require_no_server_options(arguments)
        server = server_settings(arguments)
        run_config = run_config_of(arguments, settings_of(arguments), settings_to_save(server))
        if arguments.augment is None:
            run_config = replace(run_config, augment=views_of(run_config.method, run_config.preset))
        overwrite = arguments.overwrite
        report = _start(run_config, server, arguments.out, output, overwrite=overwrite)
        path = arguments.out
    if report.no_gain:
        output.warn(report.no_gain)
    output.result(plain(report), _lines(report, path))


Settings = Mapping[str, Json]
"""Server options of this command."""


def _start(
    run_config: RunConfig, server: Settings, out: Path, output: Output, *, overwrite: bool
) -> RunReport:
    from runtimes.providers import resolve_execution
    from ztune.model import open_model
    from ztune.starting import start_run

    # Invalid settings are reported before anything is opened.
    run_config.check_method()
    run_config.split_settings()
    if is_url(run_config.bundle):
        model = _open_server(run_config, run_config.bundle, run_config.bundle, server, output)
    else:
        execution = resolve_execution(
            run_config.provider, run_config.threads, output, run_config.memory_limit
        )
        model = open_model(Path(run_config.bundle), execution, output)
    with model, ResumeHint(out, run_config.bundle) as hint:
        return start_run(run_config, model, out, hint.begin, overwrite=overwrite)


def _resume(
    path: Path,
    moved_bundle: Path | str | None,
    server: Settings,
    roots: Mapping[str, Path],
    output: Output,
) -> RunReport:
    from ztune.run import REPLACED
    from ztune.saved_run import SavedRun

    with SavedRun.locked(path) as saved:
        if (report := saved.report()) is not None:
            output.remark(f"{path} is finished; nothing to do")
            return report
        if saved.head.status == REPLACED:
            raise ConfigError(
                f'run "{path}" was stopped while it was being replaced, and neither run is left '
                "(start it again with the same command)"
            )
        if saved.head.status == "refused":
            raise ConfigError(
                f'run "{path}" was refused before its first step, see "signal" in its run.json; '
                "start it again with other settings: ztune tune BUNDLE --data FOLDER --out "
                f"{quoted(path)}"
            )
        with (
            _reopen(saved, moved_bundle, server, output) as model,
            ResumeHint(path, moved_bundle) as hint,
        ):
            hint.begin()
            return saved.resume(model, roots=roots)


def _open_server(
    run_config: RunConfig, url: str, named: Path | str | None, server: Settings, output: Output
) -> Model:
    """Open a server; `named` is its URL if the command gives it.

    Raises: ConfigError for an option that the server decides.
    """
    from ztune.model import open_served_model

    settings = merge_settings(run_config.server, server)
    local = settings.get("images") == "local"
    for name in ("provider", "threads", "memory_limit"):
        changed = getattr(run_config, name) != getattr(type(run_config), name)
        if changed and (name == "memory_limit" or not local):
            raise ConfigError(
                f"the server decides how graphs run: leave out --{name.replace('_', '-')}"
            )
    return open_served_model(
        url,
        settings,
        parse_named_server(named),
        output,
        provider=run_config.provider,
        threads=run_config.threads,
    )


def _reopen(
    saved: SavedRun, moved_bundle: Path | str | None, server: Settings, output: Output
) -> Model:
    """Open a run's bundle or server, or the one that it moved to.

    Raises: FormatError if it does not exist, ConfigError for a bundle instead of a server or the
        other way round.
    """
    from runtimes.bundle import load_bundle
    from runtimes.providers import Execution, resolve
    from ztune.model import Model

    run_config = saved.run_config
    bundle = moved_bundle or run_config.bundle
    if is_url(bundle) != is_url(run_config.bundle):
        kind = "a server (URL)" if is_url(run_config.bundle) else "a bundle (folder)"
        raise ConfigError(f'"{bundle}" is not {kind}, and the run was tuned on one')
    if server and not is_url(bundle):
        raise ConfigError("server options do not apply to a run tuned on a bundle (leave them out)")
    if is_url(bundle):
        return _open_server(run_config, str(bundle), moved_bundle, server, output)
    if not Path(bundle).is_dir():
        raise FormatError(
            f'the run\'s bundle "{bundle}" does not exist (give its new path: '
            f"ztune tune BUNDLE --resume {quoted(saved.folder.path)})"
        )
    provider, _ = resolve(saved.head.provider)
    execution = Execution(
        provider, run_config.threads, run_config.memory_limit, remark=output.remark
    )
    return Model(load_bundle(Path(bundle)), execution, output)


class ResumeHint:
    """Add to an interruption of a started run the command that resumes it.

    It repeats a URL given in this command, since secrets are sent only to such servers.
    """

    def __init__(self, path: Path, named: Path | str | None):
        url = f"{quoted(str(named))} " if named and is_url(named) else ""
        self._started = False
        self._command = f"ztune tune {url}--resume {quoted(path)}"

    def begin(self) -> None:
        """Note that the run has started."""
        self._started = True

    def __enter__(self) -> ResumeHint:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if not self._started:
            return
        if isinstance(error, ServerError):
            done = "all completed steps are saved, " if isinstance(error, AwayError) else ""
            raise ServerError(f"{error}; {done}resume with: {self._command}") from None
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(f"resume with: {self._command}") from None
        if isinstance(error, OSError) and not isinstance(error, BrokenPipeError):
            where = f'"{error.filename}": ' if error.filename else ""
            error = StorageError(f"{where}{error.strerror or error}")
        if isinstance(error, StorageError):
            raise StorageError(
                f"{error} (free some space or repair the folder, then resume with: {self._command})"
            ) from None


def _lines(report: RunReport, path: Path) -> list[str | Table]:
    from ztune.evaluate import why_no_accuracy
    from ztune.run import RunFolder

    lines: list[str | Table] = []
    validation = report.validation
    shown = {"zero-shot": "zero-shot", "tuned": f"tuned ({report.method})", "gda": "GDA"}
    parts = [(text, validation[name]) for name, text in shown.items() if name in validation]
    rows = [(text, f"{part.accuracy:.1%}", part.interval_shown) for text, part in parts]
    if rows:
        chosen = "used to choose the settings of heads"
        if report.run_config.keep == "best":
            chosen += " and the point of the run"
        title = f"accuracy on {validation['tuned'].n} validation images ({chosen})"
        lines.append(Table(title, ("", "accuracy", "95 % interval"), rows))
    if server := report.server:
        lines.append(
            f"server {server.url}: {server.sent} queries sent "
            f"({server.possibly_billed_twice} possibly billed twice), "
            f"{server.report_queries} more for the report"
        )
    n_cached = report.text_forwards_cached + report.image_forwards_cached
    cached = f" ({n_cached} more in the cache)" if n_cached else ""
    lines.append(
        f"{report.queries} queries, {report.text_forwards} text forwards, "
        f"{report.image_forwards} image forwards{cached}, {report.seconds:.1f} s, "
        f"peak memory {report.peak_memory_mb:.0f} MB"
    )
    more = (report.cross_validated, report.probabilities, report.rejection, report.early_end)
    lines += [line for line in more if line]
    if why := why_no_accuracy(RunFolder(path), report):
        return [*lines, why, f"{path / 'prompt.safetensors'}"]
    where = "" if "zero-shot" in validation or not rows else " --bundle DIR"
    command = f"ztune eval {quoted(path)}{where}"
    return [*lines, f"{path / 'prompt.safetensors'} (evaluate it with: {command})"]
