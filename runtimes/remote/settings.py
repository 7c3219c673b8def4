"""Server settings that a run saves and a command may change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from runtimes.remote.endpoint import Connection
from ztune.errors import ConfigError
from ztune.io.config import configured
from ztune.types import Json

_PLAIN = ("client", "images", "losses")
_NOT_SAVED = ("tls_ca", "tls_cert", "tls_key", "token_file", "basic_auth_file", "insecure")
REMOVED = {
    "endpoints": "put the servers behind one URL of a Kubernetes Service or a proxy "
    "(docs/serving.md)",
    "shared_memory": "leave it out; tensors are always sent over the network",
}
"""Removed settings, and what to do instead."""


@dataclass(frozen=True)
class ServerSettings:
    """Settings besides the URL; secrets only as paths of their files."""

    client: str | None = None
    """Folder of the client half; None: download it from the server."""
    images: str = "server"
    """Where images are encoded: server, or local with the image tower of `client`."""
    losses: str = "auto"
    """Where losses are computed: here, server, or auto."""
    connection: Mapping[str, Json] = field(default_factory=dict)
    """Fields of a Connection that differ from its defaults."""

    def __post_init__(self) -> None:
        if self.images not in ("server", "local"):
            raise ConfigError(f'`images` is "{self.images}", expected server or local')
        if self.images == "local" and self.client is None:
            raise ConfigError("`images=local` needs `client=BUNDLE`, a bundle with image.onnx")

    def to_connection(self) -> Connection:
        """Return the connection settings.

        Raises: ConfigError for an invalid value.
        """
        return configured(Connection, dict(self.connection), "server settings")


def settings_to_save(settings: Mapping[str, Json]) -> dict[str, Json]:
    """Return the settings that a run saves, also read from runs of older versions.

    Paths of secrets, trusted certificates and `insecure` must be given with each command, since a
    run's folder may come from another user.
    """
    connection = settings.get("connection", {})
    kept = connection.items() if isinstance(connection, dict) else ()
    plain = {k: v for k, v in settings.items() if k not in REMOVED}
    left_out = (*_NOT_SAVED, *REMOVED)
    return {**plain, "connection": {k: v for k, v in kept if k not in left_out}}


def merge_settings(saved: Mapping[str, Json], given: Mapping[str, Json]) -> dict[str, Json]:
    """Return a run's saved settings, overridden by the given ones."""
    saved = settings_to_save(saved)  # older versions saved more
    connections = [values.get("connection", {}) for values in (saved, given)]
    connection = {k: v for one in connections if isinstance(one, dict) for k, v in one.items()}
    return {**saved, **given, **({"connection": connection} if connection else {})}


def parse_settings(values: Mapping[str, Json]) -> ServerSettings:
    """Parse saved settings.

    Raises: ConfigError for an unknown one or an invalid value.
    """
    known = {f.name for f in fields(ServerSettings)}
    connection = values.get("connection", {})
    if set(values) - known or not isinstance(connection, dict):
        raise ConfigError(
            f"invalid server settings {dict(values)!r} (expected {', '.join(sorted(known))})"
        )
    for name, instead in REMOVED.items():
        if name in connection:
            raise ConfigError(f"`{name}` was removed: {instead}")
    plain: dict[str, Any] = {k: v for k, v in values.items() if k in _PLAIN}
    return ServerSettings(**plain, connection=connection)
