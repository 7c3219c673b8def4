"""The argument parsers of `ztune` and its verbs, with hints for misspelt words."""

from __future__ import annotations

import argparse
import difflib
import functools
import importlib
import re
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from types import ModuleType
from typing import NoReturn

from ztune.io.config import nearest
from ztune.printing import printable

VERBS = {
    "export": "turn an open_clip model into a bundle of ONNX graphs (needs torch)",
    "export-triton": "write a Triton model repository from a bundle",
    "tune": "tune a prompt, or fit a head, from a few labelled images",
    "eval": "evaluate a run, bundle or classifier on labelled images",
    "pack": "merge a bundle's image tower and a tuned prompt into one classifier.onnx",
    "predict": "classify images with a classifier.onnx",
    "quantize": "derive an int8 or fp16 bundle from an fp32 one",
    "bench": "run a plan of methods, data sets, protocols and seeds, and tabulate the results",
    "compare": "run several methods on the same images and tabulate their cost and accuracy",
    "data": "list the named data sets, or check a local copy",
    "methods": "list the methods, what they need and their settings",
    "doctor": "check this machine, a bundle or a server",
}

# Options of earlier versions, and what to do instead.
_REMOVED = {
    "--endpoint": "put the servers behind one URL, a Kubernetes Service or a proxy "
    "(docs/serving.md)",
    "--extractor": "tune with --set extractor=FILE (compare: --set blackvip.extractor=FILE); eval "
    "and pack take the file from the run",
    "--shared-memory": "leave it out, tensors are always sent over the network",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors suggest the nearest valid word."""

    own: tuple[argparse.Action, ...] = ()
    """The verb's own options, without those of every verb."""

    def read(self, words: Sequence[str]) -> argparse.Namespace:
        """Return the arguments; `given` has the verb's own options that differ from their defaults.

        Exits with 2 for wrong usage.
        """
        # First, since argparse would report missing arguments instead.
        for word in takewhile(lambda word: word != "--", words):
            name = word.partition("=")[0]
            if name in _REMOVED:
                self.error(f"option {name} was removed: {_REMOVED[name]}")
            if name.startswith("--") and " " not in name and not self.has(name):
                self.error(f"unknown option {name}{self._hint(name)}")
        if "" in words:
            self.error("an argument is empty (unset shell variable?)")
        arguments, others = self.parse_known_args(words)
        if others:
            hint = f": {_REMOVED['--endpoint']}" if "://" in others[0] else ""
            self.error(f'unexpected "{others[0]}"{hint}')
        arguments.given = {
            action.dest: action.option_strings[-1]
            for action in self.own
            if action.option_strings and getattr(arguments, action.dest) != action.default
        }
        return arguments

    def has(self, name: str) -> bool:
        """Return whether `name` is an option or the prefix of one."""
        return any(flag.startswith(name) for flag in self._option_string_actions)

    def _hint(self, name: str) -> str:
        flags = [flag.removeprefix("--") for flag in self._option_string_actions]
        close = difflib.get_close_matches(name.removeprefix("--"), flags, n=1)
        hints = [f"did you mean --{close[0]}?"] if close else []
        if self.own:
            there = [verb for verb in VERBS if name in flags_of(verb)]
            hints += [f"{name} is an option of {', '.join(there)}"] if there else []
        return f" ({' '.join(hints)})" if hints else ""

    def option_for(self, argument: str) -> str | None:
        """Return the option or metavar of a library argument, None without one."""
        for action in self._actions:
            if action.dest == argument:
                return action.option_strings[-1] if action.option_strings else str(action.metavar)
        return None

    def error(self, message: str) -> NoReturn:
        """Exit with 2; control characters of arguments are escaped."""
        super().error(f"{printable(message)}\nsee: {self.prog} --help")


def parser_of(verb: str) -> Parser:
    """Return the parser of one verb; no other verb's module is loaded."""
    module, summary = module_of(verb), VERBS[verb]
    parser = Parser(
        prog=f"ztune {verb}",
        usage="\n       ".join(f"ztune {verb} {form}" for form in module.USAGE),
        description=f"{summary[0].upper()}{summary[1:]}.",
        epilog=f"example:\n{module.EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
    )
    module.add_arguments(parser)
    parser.own = tuple(parser._actions)
    every = parser.add_argument_group("common options")
    every.add_argument("--json", action="store_true", help="one JSON document on standard output")
    every.add_argument("--quiet", action="store_true", help="no progress, no remarks")
    every.add_argument("--debug", action="store_true", help="show the traceback of an error")
    every.add_argument("-h", "--help", action="help", help="show this help and exit")
    return parser


def module_of(verb: str) -> ModuleType:
    """Return the module that has a verb's options and runs it."""
    return importlib.import_module(f"ztune.cli.{verb.replace('-', '_')}")


@functools.cache
def flags_of(verb: str) -> frozenset[str]:
    """Return a verb's options."""
    return frozenset(parser_of(verb)._option_string_actions)


def option_finder(parser: Parser, verb: str) -> Callable[[str], str | None]:
    """Return a function from an argument of the library to its option, None without one.

    An error may suggest an option of another verb, except in bench, where it may be a plan's key.
    """

    @functools.cache
    def find(argument: str) -> str | None:
        shown = parser.option_for(argument)
        others = (parser_of(other) for other in VERBS if verb != "bench")
        return shown or next((s for one in others if (s := one.option_for(argument))), None)

    return find


def refuse(words: Sequence[str]) -> NoReturn:
    """Handle arguments without a verb: show help or version, else exit with 2."""
    listed = "\n".join(f"  {name:<15}{summary}" for name, summary in VERBS.items())
    top = Parser(
        prog="ztune",
        usage="ztune VERB ... [options]",
        description="Adapt CLIP-like vision-language models with forward passes only.",
        epilog=f"verbs:\n{listed}\n\nsee: ztune VERB --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    asked = words[0].startswith("--v") if words else False
    shown = f"ztune {version()}" if asked else ""
    top.add_argument("--version", action="version", version=shown, help="show the version")
    if not words:
        top.error("a verb is missing")
    if words[0].startswith("-"):
        top.read(words[:1])
    top.error(f'unknown verb "{words[0]}"{nearest(words[0], VERBS)}')


def version() -> str:
    """Return the installed version, or that of the checkout."""
    from importlib import metadata  # slow to load

    try:
        return metadata.version("ztune")
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        found = re.search(r'^version = "(.+)"$', project.read_text(), re.MULTILINE)
        return found[1] if found else "unknown"
