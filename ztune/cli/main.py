"""The `ztune` command: one verb, one file; errors become one line here."""

from __future__ import annotations

import argparse
import errno
import importlib
import os
import signal
import sys
from types import FrameType
from typing import NoReturn

from runtimes.remote.endpoint import is_url
from ztune.cli.output import Output, fail, show_traceback, with_options
from ztune.errors import ZtuneError
from ztune.printing import holds_password, printable
from ztune.progress import warnings_told

VERBS = {
    "export": "turn an open_clip model into a bundle of ONNX graphs (needs torch)",
    "export-triton": "make the model repository of a Triton server from a bundle",
    "tune": "tune a prompt, or fit a head, from a few labelled pictures",
    "eval": "measure a run, a bundle or a classifier on labelled pictures",
    "pack": "fold a bundle's image tower and a result into one classifier.onnx",
    "predict": "classify pictures with a classifier.onnx",
    "quantize": "derive an int8 or fp16 bundle from an fp32 one",
    "bench": "carry out a plan of methods, data sets, protocols and seeds, and tabulate it",
    "compare": "run several methods on the same pictures and tabulate what they cost and give",
    "data": "list the data sets known by name, or check one that is there",
    "methods": "list the methods, what they need and their settings",
    "doctor": "check this machine, and a bundle on it",
}


class Parser(argparse.ArgumentParser):
    """A parser whose errors repeat an argument without its effect on a terminal."""

    def error(self, message: str) -> NoReturn:
        super().error(printable(message))


def parser() -> argparse.ArgumentParser:
    """Return the parser of all verbs."""
    top = Parser(
        prog="ztune",
        description="Adapt a vision-language model where only forward passes are possible.",
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, summary in VERBS.items():
        module = importlib.import_module(f"ztune.cli.{name.replace('-', '_')}")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=f"{summary[0].upper()}{summary[1:]}.",
            epilog=f"example:\n{module.EXAMPLE}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(verb)
        verb.add_argument(
            "--json", action="store_true", help="one JSON document on standard output"
        )
        verb.add_argument("--quiet", action="store_true", help="no progress, no remarks")
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        verb.set_defaults(run=module.run)
    return top


# How a command goes on after a full disk.
_AGAIN = {
    "bench": "and go on with the same command and --resume",
    "compare": "and go on with the same command",
}
# Arguments of the library that options have other names for.
_ALIASES = {"template": "templates", "endpoint": "endpoints", "set": "settings"}


def options_of(top: argparse.ArgumentParser, verb: str) -> dict[str, str]:
    """Return what stands on the command line for each argument of the library.

    An error may advise what is an option of another verb, but not of a plan's.
    """
    (verbs,) = (a for a in top._actions if isinstance(a, argparse._SubParsersAction))
    options: dict[str, str] = {}
    others = () if verb == "bench" else verbs.choices.values()
    for one in (*others, verbs.choices[verb]):
        for action in one._actions:
            shown = action.option_strings[-1] if action.option_strings else str(action.metavar)
            options |= {action.dest: shown, _ALIASES.get(action.dest, action.dest): shown}
    return options


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return 0, 1 for an error (2 for wrong usage), 130 when interrupted."""
    # Without this, a warning of tokenizers' about forking reaches the user.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.excepthook = lambda _kind, error, _trace: show_traceback(error)
    words = sys.argv[1:] if argv is None else argv
    # None is named before this: whatever comes after may print an argument or keep it in a file.
    if any(is_url(word) and holds_password(word) for word in words):
        fail(
            "an address on the command line holds no user or password: put a server's into "
            "ZTUNE_BASIC_AUTH (user:password) or a file (--basic-auth-file)"
        )
        return 1
    everything = parser()
    arguments = everything.parse_args(words)
    options = options_of(everything, arguments.verb)
    signal.signal(signal.SIGTERM, _terminate)
    hangup = getattr(signal, "SIGHUP", None)  # which Windows lacks
    if hangup is not None and signal.getsignal(hangup) == signal.SIG_DFL:  # nohup ignores it
        signal.signal(hangup, _terminate)
    try:
        output = Output(arguments.quiet, arguments.json, options)
        with warnings_told(output.warn):
            arguments.run(arguments, output)
    except ZtuneError as error:
        if arguments.debug:
            show_traceback(error)
        fail(with_options(str(error), options))
        return 1
    except KeyboardInterrupt as stop:
        fail(f"stopped{f' ({stop})' if str(stop) else ''}")
        return 130
    except BrokenPipeError:
        # The reader of our output went away; there is no one left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # a full disk, a folder that may not be written or read
        if arguments.debug:
            show_traceback(error)
        where = f'"{error.filename}": ' if error.filename else ""
        again = _AGAIN.get(arguments.verb, "and try again")
        full = f" (free some space, {again})" if error.errno == errno.ENOSPC else ""
        fail(f"{where}{error.strerror or error}{full}")
        return 1
    return 0


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
