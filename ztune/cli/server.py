"""Options of a server, given by URL instead of a bundle."""

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
"""Arguments that are server options."""


def place(word: str) -> Path | str:
    """Return a bundle's folder or a server's URL."""
    return word if is_url(word) else Path(word)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a server."""
    group = parser.add_argument_group(
        "server given by URL (triton:// or tritons:// for gRPC, http://, https://)"
    )
    for option, kind, metavar, what in (
        ("--client", Path, "FOLDER", "bundle or its client half (default: fetch it)"),
        ("--images", str, "WHERE", "where images are encoded: server (default) or local"),
        ("--losses", str, "WHERE", "where losses are computed: auto (default), here or server"),
        ("--deadline", float, "S", "timeout of a request, in seconds (default: 30)"),
        ("--give-up", float, "S", "stop after S seconds without a response (default: 300)"),
        ("--max-inflight", int, "N", "maximum concurrent requests (default: 4)"),
        ("--max-request", float, "MB", "maximum size of a request's tensors (default: 64)"),
        ("--compression", str, "KIND", "none (default), gzip or deflate"),
        ("--tls-ca", Path, "FILE", "trusted CA certificates"),
        ("--tls-cert", Path, "FILE", "client certificate, for mutual TLS"),
        ("--tls-key", Path, "FILE", "private key of --tls-cert"),
        ("--token-file", Path, "FILE", "bearer token (or ZTUNE_TOKEN; sent only to servers named "
         "in the command or in ZTUNE_TOKEN_HOST, not to one known only from a run)"),
        ("--basic-auth-file", Path, "FILE", "file with user:password (or ZTUNE_BASIC_AUTH)"),
    ):  # fmt: skip
        group.add_argument(option, type=kind, metavar=metavar, help=what)
    group.add_argument(
        "--insecure",
        action="store_true",
        help="accept any certificate, and send secrets unencrypted",
    )


def server_settings(arguments: argparse.Namespace) -> dict[str, Json]:
    """Return the server settings given as options.

    Raises: ConfigError for an invalid value.
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
    """Refuse server options for a bundle's folder.

    Raises: ConfigError naming the first.
    """
    for name, option in arguments.given.items():
        if name in SERVER:
            raise ConfigError(f"{option} applies only to a server's URL (leave it out)")
