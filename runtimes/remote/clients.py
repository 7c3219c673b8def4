"""Which client speaks an address's protocol; tritonclient is loaded with the first of them."""

from __future__ import annotations

from runtimes.remote.endpoint import Connection, Endpoint
from runtimes.remote.transport import Transport
from ztune.errors import ZtuneError, how_to_install


def open_transport(endpoint: Endpoint, connection: Connection) -> Transport:
    """Return a connection of the address's protocol; nothing is sent yet.

    Raises: ConfigError for files or secrets that cannot be used, ZtuneError without tritonclient.
    """
    connection.check_files()
    try:
        if endpoint.protocol == "grpc":
            from runtimes.remote.grpc_transport import GrpcTransport

            return GrpcTransport(endpoint, connection)
        from runtimes.remote.http_transport import HttpTransport

        return HttpTransport(endpoint, connection)
    except ImportError as error:
        raise ZtuneError(
            f"a server is reached through tritonclient ({error}); install it with: "
            f"{how_to_install('triton')}"
        ) from None
