"""TOML parsing, the same on every supported Python."""

from __future__ import annotations

import sys
from typing import Any

from ztune.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse a TOML text.

    Raises: ConfigError naming `where` and the syntax error.
    """
    try:
        document: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number too long, nesting too deep
        raise ConfigError(f"{where}: invalid TOML ({error})") from None
    return document
