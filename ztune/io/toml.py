"""TOML, read the same on every Python that there is support for."""

from __future__ import annotations

import sys
from typing import Any

from ztune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parsed_toml(text: str, where: str) -> dict[str, Any]:
    """Return what a TOML text holds.

    Raises: ConfigError naming `where` and what is no TOML.
    """
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number too long, brackets too deep
        raise ConfigError(f"{where}: no TOML ({error})") from None
    return document
