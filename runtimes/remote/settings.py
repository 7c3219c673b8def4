"""How a server in a bundle's place is reached, as a run keeps it and a command may change it."""

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
    "endpoints": "put the servers behind one URL, of a Kubernetes Service or a proxy "
    "(docs/serving.md)",
    "shared_memory": "leave it out, tensors always go over the network",
}
"""Settings of earlier versions, and what to do instead."""


@dataclass(frozen=True)
class ServerSettings:
    """What was asked for beside the URL; files' paths, never what is in them."""

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
    """Return the settings that a run keeps, and that are taken from it, without removed ones.

    Where secrets lie, whose certificates are trusted, and what is accepted unverified is said with
    each command, since a run's folder may come from somebody else.
    """
    connection = settings.get("connection", {})
    kept = connection.items() if isinstance(connection, dict) else ()
    plain = {k: v for k, v in settings.items() if k not in REMOVED}
    left_out = (*_NOT_SAVED, *REMOVED)
    return {**plain, "connection": {k: v for k, v in kept if k not in left_out}}


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
    connection = values.get("connection", {})
    if set(values) - known or not isinstance(connection, dict):
        raise ConfigError(f"server settings {dict(values)!r} cannot be read")
    for name, instead in REMOVED.items():
        if name in connection:
            raise ConfigError(f"`{name}` was removed: {instead}")
    plain: dict[str, Any] = {k: v for k, v in values.items() if k in _PLAIN}
    return ServerSettings(**plain, connection=connection)
