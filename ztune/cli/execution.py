"""The options that say how graphs run on this machine; most verbs have them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING

from ztune.cli.output import Output

if TYPE_CHECKING:
    from runtimes.providers import Execution


def add_execution_arguments(parser: argparse.ArgumentParser, default: str | None = "auto") -> None:
    """Add --provider, where None leaves the default to the verb, and --threads."""
    parser.add_argument(
        "--provider",
        default=default,
        help=f"auto, cpu, cuda or tensorrt (default: {default or 'auto'})",
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="use N cores and never spin (default: all, fast)"
    )


def settled(
    provider: str, threads: int | None, output: Output, memory_limit: int | None = None
) -> Execution:
    """Return how to run, saying which provider and why.

    Raises: ProviderError when the one asked for does not really run, ConfigError for the others.
    """
    from runtimes.providers import Execution, resolve

    asked = Execution(threads=threads, memory_limit=memory_limit, remark=output.remark)
    name, why = resolve(provider)
    output.remark(why)
    return replace(asked, provider=name)
