"""Checks and timings of this machine, a bundle or a server."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from runtimes.bundle import Parity, load_bundle
from runtimes.ort import allowed_difference, parity_on_this_machine
from runtimes.providers import NAMES, Execution, check_precision, probe, product_in_graph
from runtimes.remote.endpoint import parse_named_server
from runtimes.remote.settings import parse_settings
from runtimes.tokenizer import Tokenizer
from ztune.capabilities import TEXTS
from ztune.errors import ZtuneError
from ztune.io.schema import plain
from ztune.model import Model, connect_server
from ztune.precision import Signal
from ztune.progress import SILENCE, Progress
from ztune.run import RunFolder
from ztune.run_config import RunConfig
from ztune.starting import read_split
from ztune.timing import N_CONTEXT, time_text_queries
from ztune.training import TrainingRun
from ztune.types import F32, Json

_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TIMED = f"{len(_WORDS)} classes, {N_CONTEXT} context tokens, text side"
_EXTRAS = {
    "cpu or gpu": "onnxruntime",
    "export": "open_clip",
    "triton": "tritonclient",
    "parquet": "pyarrow",
    "heic": "pillow_heif",
    "dev": "pytest",
}
"""A module that each extra installs, by extra."""


def check_extras() -> dict[str, bool]:
    """Return which extras of the distribution are installed."""
    return {extra: find_spec(module) is not None for extra, module in _EXTRAS.items()}


def check_providers() -> dict[str, str | None]:
    """Return None for each provider that ran a small matrix product, else the reason."""
    result: dict[str, str | None] = {}
    for name in NAMES:
        try:
            probe(name)
            result[name] = None
        except ZtuneError as error:
            result[name] = str(error)
    return result


_SHAPES = ((1, 64, 1), (7, 129, 5), (64, 512, 33), (300, 48, 300), (16, 1000, 16))
"""Rows, inner size and columns: vectors, odd sizes, and sizes that are computed in blocks."""
WRONG_PRODUCT = 1e-3
"""Difference above which a product is wrong; rounding stays below 1e-4."""


def check_products() -> dict[str, float | None]:
    """Return the largest errors of f32 matrix products by NumPy and by ONNX Runtime.

    Both are compared with sums in double precision without BLAS. None: the package did not run;
    infinity: a product was not finite.
    """
    rng = np.random.default_rng(0)
    pairs = [
        (rng.standard_normal((m, k)).astype(np.float32), rng.standard_normal((k, n)).astype("f4"))
        for m, k, n in _SHAPES
    ]
    exact = [np.einsum("ik,kj->ij", a.astype("f8"), b.astype("f8")) for a, b in pairs]

    def worst(product: Callable[[F32, F32], F32]) -> float | None:
        with np.errstate(all="ignore"):
            errors = [
                np.abs(product(*pair) - known).max()
                for pair, known in zip(pairs, exact, strict=True)
            ]
        return float(np.max(np.nan_to_num(errors, nan=np.inf)))

    found: dict[str, float | None] = {"numpy": worst(np.matmul), "onnxruntime": None}
    with contextlib.suppress(ZtuneError):
        found["onnxruntime"] = worst(product_in_graph())
    return found


def wrong_products(found: Mapping[str, float | None]) -> list[str]:
    """Return a failure for each package whose products are wrong."""
    return [
        f"matrix products of {name} are wrong by {error:.1e} on this machine, expected at most "
        f"{WRONG_PRODUCT}: its results cannot be trusted (install another build of {name})"
        for name, error in found.items()
        if error is not None and not error <= WRONG_PRODUCT
    ]


@dataclass(frozen=True)
class BundleCheck:
    """Results of checking a bundle on this machine."""

    files: Mapping[str, str]
    """By file: `sound`, or the error."""
    failures: Sequence[str]
    model_id: str
    precision: str
    provider: str | None
    """The first working provider that runs the precision, or None."""
    parity: Mapping[str, Mapping[str, Parity]] | None = None
    """Differences from torch by graph, `here` and `at_export`; None if not run."""
    seconds_per_query: float | None = None
    """Of TIMED; None if not run."""

    def to_json(self, path: Path) -> dict[str, Json]:
        document: dict[str, Json] = {
            "path": str(path),
            "model_id": self.model_id,
            "precision": self.precision,
            "files": dict(self.files),
            "provider": self.provider,
        }
        if self.parity is not None:
            parity = plain(self.parity)
            document |= {"parity": parity, "seconds_per_query": self.seconds_per_query}
        return document


def check_bundle(path: Path, working: Sequence[str]) -> BundleCheck:
    """Check a bundle on the first working provider that runs its precision.

    Raises: FormatError without a bundle.
    """
    bundle = load_bundle(path)
    failures: list[str] = []
    files: dict[str, str] = {}
    for name in bundle.files:
        try:
            bundle.file(name)
            files[name] = "sound"
        except ZtuneError as error:
            files[name] = str(error)
            failures.append(str(error))
    provider, reason = _able(bundle.precision, working)
    if provider is None:
        failures.append(reason)
    if failures or provider is None:
        return BundleCheck(files, failures, bundle.model_id, bundle.precision, provider)
    parity: dict[str, dict[str, Parity]] = {}
    for graph, stored in bundle.parity.items():
        here = parity_on_this_machine(bundle, graph, Execution(provider))
        parity[graph] = {"here": here, "at_export": stored}
        limit = allowed_difference(stored["max_abs"])
        if not here["max_abs"] <= limit:
            failures.append(
                f"{graph}.onnx differs from torch by {here['max_abs']:.1e} on {provider}, more "
                f"than {limit:.1e}: results on this machine cannot be trusted"
            )
    model = Model(bundle, Execution(provider))
    seconds = time_text_queries(model.prompt_graph, _WORDS, bundle.text.width).per_query
    return BundleCheck(
        files, failures, bundle.model_id, bundle.precision, provider, parity, seconds
    )


def _able(precision: str, working: Sequence[str]) -> tuple[str | None, str]:
    """Return the first working provider that runs a precision, or None and the reason."""
    reason = ""
    for provider in working:
        try:
            check_precision(precision, provider)
        except ZtuneError as error:
            reason = str(error)
        else:
            return provider, ""
    return None, reason


@dataclass(frozen=True)
class ServerCheck:
    """Results of a server that has passed all checks."""

    url: str
    models: Sequence[str]
    capabilities: Sequence[str]
    bundle_digest: str
    model_id: str
    precision: str
    parity: Mapping[str, float]
    """Largest difference from torch by model, over the wire."""
    reports_digest: bool
    """Whether every answer reports its bundle's digest."""
    extensions: Sequence[str]
    seconds_per_query: float | None
    """Of TIMED, network included; None without text features."""


def check_server(url: str, values: Mapping[str, Json], progress: Progress = SILENCE) -> ServerCheck:
    """Check and time a server.

    Raises: ServerError for the first failed check, ConfigError for settings.
    """
    from runtimes.remote.served import ServerRuntime

    connected = connect_server(url, values, parse_named_server(url), progress)
    service, bundle = connected.service, connected.bundle
    try:
        served = ServerRuntime(service, bundle, losses=parse_settings(values).losses)
        seconds = None
        if TEXTS in served.capabilities:
            graph = served.prompts(Tokenizer(bundle))
            seconds = time_text_queries(graph, _WORDS, bundle.text.width).per_query
        return ServerCheck(
            url=str(service.location),
            models=[service.model(part) for part in service.offers],
            capabilities=sorted(served.capabilities),
            bundle_digest=bundle.digest,
            model_id=bundle.model_id,
            precision=bundle.precision,
            parity=connected.parity,
            reports_digest=all(offer.reports_digest for offer in service.offers.values()),
            extensions=sorted(service.extensions),
            seconds_per_query=seconds,
        )
    finally:
        service.close()


def measure_signal(run_config: RunConfig, model: Model) -> tuple[Signal, dict[str, Json], float]:
    """Measure a run's signal without a run.

    Returns the signal, its entry for run.json, and the published value of its setting.

    Raises: ConfigError for a method without a signal; ZtuneError.
    """
    _, split = read_split(run_config)
    with tempfile.TemporaryDirectory() as folder:
        run = TrainingRun(run_config, split, RunFolder(Path(folder)), model)
        run.check()
        signal, document = run.signal()
    return signal, document, run.published
