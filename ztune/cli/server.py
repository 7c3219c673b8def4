"""The options of a server in a bundle's place."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

from runtimes.remote.endpoint import Connection, is_url
from runtimes.remote.settings import ServerSettings, parse_settings
from ztune.errors import ConfigError
from ztune.types import Json

_CONNECTION = tuple(one.name for one in fields(Connection) if one.name != "named")
_SETTINGS = tuple(one.name for one in fields(ServerSettings) if one.name != "connection")
SERVER = (*_SETTINGS, *_CONNECTION)
"""What of the arguments says how a server is reached: each is an option below."""


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
        "--images", metavar="WHERE", help="server (default), or local: encode images here"
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
        "--max-inflight", type=int, metavar="N", help="maximum concurrent requests (default: 4)"
    )
    group.add_argument(
        "--max-request", type=float, metavar="MB", help="of a request's tensors (default: 64)"
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
        help="accept any certificate (https), and send a token unencrypted",
    )


def server_settings(arguments: argparse.Namespace) -> dict[str, Json]:
    """Return what the options ask for; empty where there are none.

    Raises: ConfigError for a value that cannot be.
    """
    given: dict[str, Json] = {}
    for name in SERVER:
        if name in arguments.given:
            value = getattr(arguments, name)
            given[name] = str(value.resolve()) if isinstance(value, Path) else value
    settings = {name: value for name, value in given.items() if name in _SETTINGS}
    connection = {name: value for name, value in given.items() if name in _CONNECTION}
    if connection:
        settings["connection"] = connection
    parse_settings(settings).to_connection()
    return settings


def require_no_server_options(arguments: argparse.Namespace) -> None:
    """Refuse options of a server where a folder is named.

    Raises: ConfigError naming the first.
    """
    for name, option in arguments.given.items():
        if name in SERVER:
            raise ConfigError(
                f"{option} goes with a server's URL in the bundle's place; leave it out"
            )
