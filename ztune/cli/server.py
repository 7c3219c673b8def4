"""A server in a bundle's place: its options on the command line, and what a run says of it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ztune.cli.output import Output
from ztune.errors import ConfigError, ZtuneError
from ztune.io.config import configured
from ztune.types import Json

if TYPE_CHECKING:
    from runtimes.remote.connect import Connected
    from runtimes.remote.endpoint import Connection, Endpoint
    from runtimes.remote.served import Served
    from ztune.budget import Budget
    from ztune.model import Workbench

_OPTIONS = (
    "client", "tls_ca", "tls_cert", "tls_key", "token_file", "basic_auth_file", "endpoint",
    "images", "losses", "deadline", "give_up", "max_inflight", "shared_memory", "compression",
    "insecure",
)  # fmt: skip
_PLAIN = ("client", "images", "losses")
_NOT_SAVED = ("tls_ca", "tls_cert", "tls_key", "token_file", "basic_auth_file", "insecure")


def is_url(word: Path | str) -> bool:
    """Return whether a word means a server, not a folder."""
    return isinstance(word, str) and "://" in word


def place(word: str) -> Path | str:
    """Return what stands for a bundle on the command line: a folder, or a server's URL."""
    return word if is_url(word) else Path(word)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that go with a URL in a bundle's place."""
    group = parser.add_argument_group(
        "a server in the bundle's place (triton:// or tritons:// for gRPC, http://, https://)"
    )
    group.add_argument(
        "--client", type=Path, metavar="FOLDER", help="bundle or its client half (default: fetched)"
    )
    group.add_argument(
        "--endpoint", action="append", metavar="URL", help="one more server with the same models"
    )
    group.add_argument(
        "--images", metavar="WHERE", help="server (default), or local: encode pictures here"
    )
    group.add_argument(
        "--losses", metavar="WHERE", help="auto (default: here for little text), here or server"
    )
    group.add_argument("--deadline", type=float, metavar="S", help="of a request (default: 30)")
    group.add_argument(
        "--give-up",
        type=float,
        metavar="S",
        help="stop after so long without answer (default: 300)",
    )
    group.add_argument(
        "--max-inflight", type=int, metavar="N", help="requests on their way (default: 4)"
    )
    group.add_argument(
        "--shared-memory", metavar="WHEN", help="auto (default: where measured faster), on or off"
    )
    group.add_argument("--compression", metavar="KIND", help="none (default), gzip or deflate")
    group.add_argument("--tls-ca", type=Path, metavar="FILE", help="whose certificates are trusted")
    group.add_argument("--tls-cert", type=Path, metavar="FILE", help="own, for mutual TLS")
    group.add_argument("--tls-key", type=Path, metavar="FILE", help="of --tls-cert")
    group.add_argument(
        "--token-file",
        type=Path,
        metavar="FILE",
        help="bearer token (or ZTUNE_TOKEN in the environment; it goes to servers that the command "
        "or ZTUNE_TOKEN_HOST names, not to those that only a run names)",
    )
    group.add_argument(
        "--basic-auth-file", type=Path, metavar="FILE", help="user:password (or ZTUNE_BASIC_AUTH)"
    )
    group.add_argument(
        "--insecure",
        action="store_true",
        default=None,
        help="accept any certificate (https), and send a token unencrypted",
    )


@dataclass(frozen=True)
class ServerSettings:
    """What was asked for beside the URL; files' paths, never what is in them."""

    endpoints: tuple[str, ...] = ()
    client: str | None = None
    """Folder of the client half; None: fetched from the server."""
    images: str = "server"
    """server, or local: by the image tower of the bundle that `client` names."""
    losses: str = "auto"
    """Where they are computed: here, server, or auto."""
    connection: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a Connection that differ from its defaults."""

    def __post_init__(self) -> None:
        if self.images not in ("server", "local"):
            raise ConfigError(f'--images is "{self.images}", expected server or local')
        if self.images == "local" and self.client is None:
            raise ConfigError("--images local needs --client BUNDLE, a bundle with image.onnx")

    def connected(self) -> Connection:
        """Return how the server is spoken to.

        Raises: ConfigError for a value that cannot be.
        """
        from runtimes.remote.endpoint import Connection

        return configured(Connection, dict(self.connection), "server settings")


def server_settings(arguments: argparse.Namespace) -> dict[str, Json]:
    """Return what the options ask for; empty where there are none.

    Raises: ConfigError for a value that cannot be.
    """
    given: dict[str, Any] = {}
    for name in _OPTIONS:
        value = getattr(arguments, name, None)
        if value is not None:
            given[name] = str(value.resolve()) if isinstance(value, Path) else value
    settings: dict[str, Json] = {}
    if "endpoint" in given:
        settings["endpoints"] = list(given.pop("endpoint"))
    for name in _PLAIN:
        if name in given:
            settings[name] = given.pop(name)
    if given:
        settings["connection"] = given
    settings_from(settings).connected()
    return settings


def to_save(settings: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings that a run keeps, and that are taken from it.

    Where secrets lie, whose certificates are trusted, and what is accepted unverified is said with
    each command, since a run's folder may come from somebody else.
    """
    connection = settings.get("connection", {})
    kept = connection.items() if isinstance(connection, dict) else ()
    return {**settings, "connection": {k: v for k, v in kept if k not in _NOT_SAVED}}


def merged(saved: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    """Return a run's saved settings with what is asked for now in their place."""
    saved = to_save(saved)  # older versions kept more
    connections = [values.get("connection", {}) for values in (saved, given)]
    connection = {k: v for one in connections if isinstance(one, dict) for k, v in one.items()}
    return {**saved, **given, **({"connection": connection} if connection else {})}


def settings_from(values: Mapping[str, Json]) -> ServerSettings:
    """Return saved settings.

    Raises: ConfigError for an unknown one, or a value that cannot be.
    """
    known = {f.name for f in fields(ServerSettings)}
    unknown = sorted(set(values) - known)
    connection, endpoints = values.get("connection", {}), values.get("endpoints", [])
    if unknown or not isinstance(connection, dict) or not isinstance(endpoints, list | tuple):
        raise ConfigError(f"server settings {dict(values)!r} cannot be read")
    plain: dict[str, Any] = {k: v for k, v in values.items() if k in _PLAIN}
    return ServerSettings(
        **plain, endpoints=tuple(str(one) for one in endpoints), connection=connection
    )


def require_no_server_options(arguments: argparse.Namespace) -> None:
    """Refuse options of a server where a folder is named.

    Raises: ConfigError naming the first.
    """
    for name in _OPTIONS:
        if getattr(arguments, name, None) is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} goes with a server's URL in the bundle's place; leave "
                "it out"
            )


def named_servers(target: Path | str | None, given: Mapping[str, Json]) -> frozenset[Endpoint]:
    """Return the servers that a command names, by URL and --endpoint: they may be told secrets.

    Raises: ConfigError for an address that is none.
    """
    from runtimes.remote.endpoint import parse_endpoint, parse_location

    first = {parse_location(str(target)).endpoint} if target and is_url(target) else set()
    return frozenset(first | {parse_endpoint(one) for one in settings_from(given).endpoints})


def connect_to(
    url: str, values: Mapping[str, Json], named: frozenset[Endpoint], output: Output
) -> Connected:
    """Reach a server, fetch the client half where it is not named, and check both.

    `named` are the servers that may be told secrets.

    Raises: ServerError, ConfigError.
    """
    from runtimes.remote.connect import connect

    settings = settings_from(values)
    client = None if settings.client is None else Path(settings.client)
    with output.activity("fetching the client half", 100) as ticker:
        return connect(
            url,
            settings.endpoints,
            replace(settings.connected(), named=named),
            client,
            output.remark,
            lambda done, total: ticker.update(done * 100 // max(1, total), unit=" %"),
        )


def open_served_workbench(
    url: str,
    values: Mapping[str, Json],
    named: frozenset[Endpoint],
    output: Output,
    *,
    provider: str = "auto",
    threads: int | None = None,
) -> Workbench:
    """Return a bundle at work on a server; `provider` and `threads` are of a local image tower.

    Raises: ServerError, ConfigError; ProviderError where pictures are encoded here and cannot be.
    """
    from runtimes.ort import OrtImageEncoder
    from runtimes.providers import Execution, check_precision
    from runtimes.remote.served import Served
    from ztune.cli.execution import settled
    from ztune.model import Workbench

    settings, images = settings_from(values), None
    execution = Execution("cpu", threads)
    if settings.images == "local":
        execution = settled(provider, threads, output)
    connected = connect_to(url, values, named, output)
    bundle = connected.bundle
    if settings.images == "local":
        check_precision(bundle.precision, execution.provider)
        bundle.file("image.onnx")
        images = OrtImageEncoder(bundle, execution)
    try:
        served = Served(connected.service, bundle, images, settings.losses)
    except ZtuneError:
        connected.service.close()
        raise
    output.remark(described(served))
    return Workbench(bundle, execution, output, served)


def described(served: Served) -> str:
    """Return the line that says what a server is and gives."""
    from ztune.access import described as access

    service = served.service
    others = f" and {service.n_servers - 1} more" if service.n_servers > 1 else ""
    return (
        f"server {service.location}{others}: bundle {served.bundle.digest[:12]}…, "
        f"{served.bundle.precision}; gives {access(served.access)}"
    )


@dataclass(frozen=True)
class Wire:
    """What run.json says of a server that a run was tuned on."""

    served: Served

    def to_json(self, budget: Budget) -> dict[str, Json]:
        """Return counts; requests and bytes are of this process alone."""
        service = self.served.service
        sent, received = service.payload_bytes
        return {
            "url": str(service.location),
            "servers": service.n_servers,
            "gives": list[Json](sorted(self.served.access)),
            "sent": budget.sent,
            "possibly_billed_twice": budget.possibly_billed_twice,
            "report_queries": budget.report_queries,
            "requests": service.requests,
            "payload_mb_sent": round(sent / 1e6, 3),
            "payload_mb_received": round(received / 1e6, 3),
            "shared_memory": service.shares_memory,
        }
