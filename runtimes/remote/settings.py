"""How a server in a bundle's place is reached, as a run keeps it and a command may change it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from runtimes.remote.endpoint import (
    Connection,
    Endpoint,
    is_url,
    parse_endpoint,
    parse_location,
)
from ztune.errors import ConfigError
from ztune.io.config import configured
from ztune.types import Json

_PLAIN = ("client", "images", "losses")
_NOT_SAVED = ("tls_ca", "tls_cert", "tls_key", "token_file", "basic_auth_file", "insecure")


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
            raise ConfigError(f'`images` is "{self.images}", expected server or local')
        if self.images == "local" and self.client is None:
            raise ConfigError("`images=local` needs `client=BUNDLE`, a bundle with image.onnx")

    def connected(self) -> Connection:
        """Return how the server is spoken to.

        Raises: ConfigError for a value that cannot be.
        """
        return configured(Connection, dict(self.connection), "server settings")


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


def named_servers(target: Path | str | None, given: Mapping[str, Json]) -> frozenset[Endpoint]:
    """Return the servers that a command names, by URL and `endpoints`: they may be told secrets.

    Raises: ConfigError for an address that is none.
    """
    first = {parse_location(str(target)).endpoint} if target and is_url(target) else set()
    return frozenset(first | {parse_endpoint(one) for one in settings_from(given).endpoints})
