"""`ztune doctor`: check which providers run here, and a bundle's numerical parity."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from runtimes.remote.endpoint import is_url
from ztune.capabilities import describe
from ztune.cli.options import add
from ztune.cli.output import Output, Table
from ztune.cli.server import (
    SERVER,
    add_server_arguments,
    place,
    require_no_server_options,
    server_settings,
)
from ztune.errors import ConfigError, ZtuneError
from ztune.io.schema import plain
from ztune.types import Json

if TYPE_CHECKING:
    from ztune.doctor import BundleCheck, ServerCheck

USAGE = ("[BUNDLE|URL] [options]",)
EXAMPLE = """\
  ztune doctor
  ztune doctor models/mini
  ztune doctor triton://host:8001/vit-b-32
  ztune doctor models/mini --data examples/digits --set perturbation=0.001"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", nargs="?", type=place, metavar="BUNDLE|URL", help="what to check")
    signal = parser.add_argument_group("signal-to-noise ratio of tuning")
    add(
        signal,
        "--data",
        type=Path,
        metavar="FOLDER",
        help="measure the signal-to-noise ratio on these images",
    )
    add(signal, "--names", "--nested", "--shots", "--seed", "--set", "--init", "--reference")
    add(signal, "--method", help=f"method to measure (default: {_METHOD})")
    add_server_arguments(parser)


_AT = ("here", "at_export")
# The default method of the signal check: ztune's own default (auto) compares no two points.
_METHOD = "zip"


def run(arguments: argparse.Namespace, output: Output) -> None:
    from ztune import doctor
    from ztune.system import machine, versions

    of_signal = [option for name, option in arguments.given.items() if name not in SERVER]
    if not is_url(arguments.bundle):
        require_no_server_options(arguments)
    elif of_signal:
        raise ConfigError(
            "the signal-to-noise ratio needs a local bundle: leave out --data and its options"
        )
    if of_signal and None in (arguments.bundle, arguments.data):
        raise ConfigError(
            f"{of_signal[0]} needs a BUNDLE and --data FOLDER (see: ztune doctor --help)"
        )
    providers, installed = doctor.check_providers(), doctor.check_extras()
    document: dict[str, Json] = {
        "machine": dict(machine()),
        "versions": dict(versions()),
        "extras": dict(installed),
        "providers": dict(providers),
    }
    lines: list[str | Table] = [
        Table("machine", ("", ""), [(k, str(v)) for k, v in machine().items()]),
        "",
        Table("versions", ("", ""), list(versions().items())),
        "",
        Table("extras", ("", ""), [(k, "installed" if v else "no") for k, v in installed.items()]),
        "",
        Table(
            "providers (each runs a small matrix product)",
            ("", ""),
            [(name, "runs" if reason is None else reason) for name, reason in providers.items()],
        ),
    ]
    products = doctor.check_products()
    failures = doctor.wrong_products(products)
    document["products"] = {k: None if v == math.inf else v for k, v in products.items()}
    rows = [(name, "not run" if v is None else f"{v:.1e}") for name, v in products.items()]
    lines += ["", Table("largest error of matrix products", ("", ""), rows)]
    working = [name for name in ("cuda", "cpu") if providers.get(name) is None]
    if is_url(arguments.bundle):
        url = str(arguments.bundle)
        server = doctor.check_server(url, server_settings(arguments), output)
        document["server"] = plain(server)
        lines += _server_lines(server)
    elif arguments.bundle is not None and working:
        found = doctor.check_bundle(arguments.bundle, working)
        failures += found.failures
        document["bundle"] = found.to_json(arguments.bundle)
        lines += _bundle_lines(arguments.bundle, found)
        if arguments.data is not None:
            if failures:
                lines += ["", "signal-to-noise ratio: not measured, the bundle failed its checks"]
            else:
                measured, line = _signal(arguments, str(found.provider), output)
                document["signal"] = measured
                lines += ["", line]
    # A server's client need not run anything here.
    document["ok"] = bool(working or is_url(arguments.bundle)) and not failures
    output.result(document, lines)
    if not document["ok"] and not failures:
        raise ZtuneError("no provider works here: " + "; ".join(str(v) for v in providers.values()))
    if failures:
        raise ZtuneError("; ".join(failures))


def _bundle_lines(path: Path, found: BundleCheck) -> list[str | Table]:
    from ztune.doctor import TIMED

    lines: list[str | Table] = ["", Table(f"bundle {path}", ("", ""), list(found.files.items()))]
    if found.parity is None:
        return lines
    rows = [
        (graph, *(f"{both[at]['max_abs']:.1e}" for at in _AT))
        for graph, both in found.parity.items()
    ]
    title = f"largest difference from torch on {found.provider}"
    return [
        *lines,
        "",
        Table(title, ("graph", "here", "at export"), rows),
        "",
        f"{found.seconds_per_query:.5f} s per query ({TIMED})",
    ]


def _server_lines(found: ServerCheck) -> list[str | Table]:
    from ztune.doctor import TIMED

    said = "in every response" if found.reports_digest else "not in every response"
    rows = [
        ("models", ", ".join(found.models)),
        ("capabilities", describe(found.capabilities)),
        ("bundle", f"{found.bundle_digest[:12]}…, {found.precision}, reported {said}"),
    ]
    differences = [(part, f"{value:.1e}") for part, value in found.parity.items()]
    lines: list[str | Table] = [
        "",
        Table(f"server {found.url}", ("", ""), rows),
        "",
        Table("largest difference from torch", ("model", "over the network"), differences),
    ]
    if found.seconds_per_query is not None:
        lines += ["", f"{found.seconds_per_query:.5f} s per query ({TIMED}, network included)"]
    return lines


def _signal(
    arguments: argparse.Namespace, provider: str, output: Output
) -> tuple[dict[str, Json], str]:
    """Run the signal check of `ztune tune` without a run."""
    from runtimes.providers import Execution
    from ztune.cli.run_settings import run_config_of, settings_of
    from ztune.doctor import measure_signal
    from ztune.model import open_model
    from ztune.precision import advice, describe_signal

    if arguments.method is None:
        arguments.method = _METHOD
    run_config = run_config_of(arguments, settings_of(arguments))
    model = open_model(arguments.bundle, Execution(provider), output)
    signal, document, published = measure_signal(run_config, model)
    line = f"{describe_signal(signal, document)}: {signal.verdict}, {document['seconds']:.1f} s"
    if not signal.passed:
        line += f"; {advice(signal, document, published)}"
    return document, line
