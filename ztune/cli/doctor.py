"""`ztune doctor`: what this machine really runs, and whether a bundle is sound on it."""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
from pathlib import Path

from rich.table import Table

from ztune.cli.output import Output, table
from ztune.cli.server import (
    add_server_arguments,
    is_url,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.cli.server_check import check_server
from ztune.errors import ConfigError, ZtuneError
from ztune.types import Json

EXAMPLE = """\
  ztune doctor
  ztune doctor models/mini
  ztune doctor triton://host:8001/vit-b-32
  ztune doctor models/mini --data examples/digits --set perturbation=0.001"""

_EXTRAS = {
    "cpu or gpu": "onnxruntime",
    "export": "open_clip",
    "triton": "tritonclient",
    "parquet": "pyarrow",
    "dev": "pytest",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", type=place, metavar="BUNDLE|URL")
    parser.add_argument(
        "--data", type=Path, metavar="FOLDER", help="measure the signal that tuning on these has"
    )
    parser.add_argument("--names", type=Path, metavar="FILE", help="lines of folder<TAB>name")
    parser.add_argument("--shots", type=int, metavar="N", help="pictures per class (default: 16)")
    parser.add_argument("--seed", type=int, metavar="N", help="default: 1")
    parser.add_argument("--method", metavar="NAME", help=f"whose signal (default: {_METHOD})")
    parser.add_argument("--set", action="append", metavar="KEY=VALUE", help="a method's setting")
    parser.add_argument("--init", metavar="WORDS", help='start from words, say "a photo of a"')
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="BUNDLE",
        help="fp32 bundle to measure an int8 or fp16 one's signal against (default: its own graph)",
    )
    add_server_arguments(parser)


# The method whose signal is looked at unless told: ztune's own default compares no two points.
_METHOD = "zip"
_OF_THE_TASK = ("data", "names", "shots", "seed", "method", "set", "init", "reference")


def run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune.system import machine, versions

    if not is_url(arguments.bundle):
        require_no_server_options(arguments)
    elif any(getattr(arguments, name) is not None for name in _OF_THE_TASK):
        raise ConfigError(
            "the signal is measured with a bundle on this machine: leave out --data and what goes "
            "with it"
        )
    for name in _OF_THE_TASK:
        if getattr(arguments, name) is not None and None in (arguments.bundle, arguments.data):
            raise ConfigError(
                f"--{name} needs a BUNDLE and --data FOLDER (see: ztune doctor --help)"
            )
    providers = _providers()
    installed = {
        extra: importlib.util.find_spec(module) is not None for extra, module in _EXTRAS.items()
    }
    document: dict[str, Json] = {
        "machine": dict(machine()),
        "versions": dict(versions()),
        "extras": dict(installed),
        "providers": dict(providers),
    }
    lines: list[str | Table] = [
        table("machine", ("", ""), [(k, str(v)) for k, v in machine().items()]),
        "",
        table("versions", ("", ""), list(versions().items())),
        "",
        table("extras", ("", ""), [(k, "installed" if v else "no") for k, v in installed.items()]),
        "",
        table(
            "providers (each asked to run a small matrix product)",
            ("", ""),
            [(name, "runs" if reason is None else reason) for name, reason in providers.items()],
        ),
    ]
    working = [name for name in ("cuda", "cpu") if providers.get(name) is None]
    failures: list[str] = []
    if is_url(arguments.bundle):
        document["server"], server_lines = check_server(
            str(arguments.bundle), server_settings(arguments), output
        )
        lines += server_lines
    elif arguments.bundle is not None and working:
        checked, bundle_lines, failures = _check_bundle(arguments.bundle, working, output)
        document["bundle"] = checked
        lines += bundle_lines
        if arguments.data is not None:
            if failures:
                lines += ["", "signal-to-noise: not measured, since the bundle is not sound here"]
            else:
                measured, line = _signal(arguments, str(checked["provider"]), output)
                document["signal"] = measured
                lines += ["", line]
    # A server's client need not run anything here.
    document["ok"] = bool(working or is_url(arguments.bundle)) and not failures
    output.result(document, lines)
    if not document["ok"] and not failures:
        raise ZtuneError("no provider works here: " + "; ".join(str(v) for v in providers.values()))
    if failures:
        raise ZtuneError("; ".join(failures))


def _providers() -> dict[str, str | None]:
    """Return None for each provider that ran, else the reason why it did not."""
    from runtimes.providers import NAMES, probe

    result: dict[str, str | None] = {}
    for name in NAMES:
        try:
            probe(name)
            result[name] = None
        except ZtuneError as error:
            result[name] = str(error)
    return result


def _check_bundle(
    path: Path, working: list[str], output: Output
) -> tuple[dict[str, Json], list[str | Table], list[str]]:
    """Check a bundle on the first of the working providers that can run its precision."""
    from runtimes.bundle import load_bundle
    from runtimes.ort import allowed_difference, parity_on_this_machine
    from runtimes.providers import Execution
    from ztune.model import Workbench
    from ztune.pace import seconds_per_query

    bundle = load_bundle(path)
    failures: list[str] = []
    files: dict[str, Json] = {}
    for name in bundle.files:
        try:
            bundle.file(name)
            files[name] = "sound"
        except ZtuneError as error:
            files[name] = str(error)
            failures.append(str(error))
    document: dict[str, Json] = {
        "path": str(path),
        "model_id": bundle.model_id,
        "precision": bundle.precision,
        "files": files,
    }
    lines: list[str | Table] = [
        "",
        table(f"bundle {path}", ("", ""), [(k, str(v)) for k, v in files.items()]),
    ]
    provider, reason = _able(bundle.precision, working)
    document["provider"] = provider
    if provider is None:
        failures.append(reason)
    if failures or provider is None:
        return document, lines, failures
    parity: dict[str, Json] = {}
    rows = []
    for graph, stored in bundle.parity.items():
        here = parity_on_this_machine(bundle, graph, Execution(provider))
        parity[graph] = {"here": dict(here), "at_export": dict(stored)}
        rows.append((graph, f"{here['max_abs']:.1e}", f"{stored['max_abs']:.1e}"))
        limit = allowed_difference(stored["max_abs"])
        if not here["max_abs"] <= limit:
            failures.append(
                f"{graph}.onnx differs from torch by {here['max_abs']:.1e} on {provider}, more "
                f"than {limit:.1e}: results on this machine cannot be trusted"
            )
    bench = Workbench(bundle, Execution(provider), output)
    seconds, what = seconds_per_query(bench.prompt_graph, bundle.text.width)
    document |= {"parity": parity, "seconds_per_query": seconds}
    lines += [
        "",
        table(f"largest difference from torch on {provider}", ("graph", "here", "at export"), rows),
        "",
        f"{seconds:.5f} s per query ({what})",
    ]
    return document, lines, failures


def _able(precision: str, working: list[str]) -> tuple[str | None, str]:
    """Return the first working provider that runs a precision, or None and why none does."""
    from runtimes.providers import check_precision

    reason = ""
    for provider in working:
        try:
            check_precision(precision, provider)
        except ZtuneError as error:
            reason = str(error)
        else:
            return provider, ""
    return None, reason


def _signal(
    arguments: argparse.Namespace, provider: str, output: Output
) -> tuple[dict[str, Json], str]:
    """Measure what the gate of `ztune tune` would, without a run."""
    from runtimes.providers import Execution
    from ztune.model import open_workbench
    from ztune.precision import advice, described
    from ztune.run import RunFolder
    from ztune.run_config import request_from_arguments
    from ztune.training import Work, task_of

    if arguments.method is None:
        arguments.method = _METHOD
    request = request_from_arguments(arguments, _OF_THE_TASK)
    bench = open_workbench(arguments.bundle, Execution(provider), output)
    _, split = task_of(request)
    with tempfile.TemporaryDirectory() as folder:
        work = Work(request, split, RunFolder(Path(folder)), bench)
        work.check()
        signal, document = work.signal()
    line = f"{described(signal, document)}: {signal.verdict}, {document['seconds']:.1f} s"
    if not signal.passed:
        line += f"; {advice(signal, document, work.published)}"
    return document, line
