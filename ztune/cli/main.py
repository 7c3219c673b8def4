"""The `ztune` command: dispatch a verb, print an error as one line."""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import signal
import sys

from ztune.cli.output import OptionOf, Output, fail, show_traceback, with_options
from ztune.cli.parser import VERBS, module_of, option_finder, parser_of, refuse
from ztune.errors import ZtuneError
from ztune.io.pixel_limit import at_most
from ztune.io.stopping import INTERRUPTED, stop_on
from ztune.printing import holds_password
from ztune.progress import forward_warnings

# How to resume a command after a full disk.
_AGAIN = {
    "bench": "then resume with the same command and --resume",
    "compare": "then resume with the same command",
}


def main(argv: list[str] | None = None) -> int:
    """Run one verb; return 0, 1 for an error (2 for wrong usage), 130 when interrupted."""
    # Otherwise tokenizers warns about forking.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    sys.excepthook = lambda _kind, error, _trace: show_traceback(error)
    words = sys.argv[1:] if argv is None else argv
    # First, since later code may print an argument or save it to a file.
    if any("://" in word and holds_password(word) for word in words):
        fail(
            "URLs must not contain a user or password (use ZTUNE_BASIC_AUTH=user:password or "
            "--basic-auth-file)"
        )
        return 1
    if not words or words[0] not in VERBS:
        refuse(words)
    verb = words[0]
    # Windows lacks SIGHUP; nohup ignores it.
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    stop_on([number for number in numbers if signal.getsignal(number) != signal.SIG_IGN])
    try:
        parser = parser_of(verb)
        arguments = parser.read(words[1:])
    except ImportError as error:
        fail(f"{error} (the installation is damaged: install ztune again, see README)")
        return 1
    except KeyboardInterrupt:
        fail("stopped")
        return INTERRUPTED
    arguments.command = shlex.join(["ztune", *words])
    with at_most(getattr(arguments, "max_pixels", None)):
        return _run(verb, arguments, option_finder(parser, verb))


def _run(verb: str, arguments: argparse.Namespace, option_of: OptionOf) -> int:
    try:
        output = Output(arguments.quiet, arguments.json, option_of)
        with forward_warnings(output.warn):
            module_of(verb).run(arguments, output)
    except ZtuneError as error:
        if arguments.debug:
            show_traceback(error)
        fail(with_options(str(error), option_of))
        return 1
    except KeyboardInterrupt as stop:
        fail(f"stopped{f' ({stop})' if str(stop) else ''}")
        return INTERRUPTED
    except MemoryError:
        fail("out of memory (use smaller images, a lower --max-pixels or --memory-limit)")
        return 1
    except BrokenPipeError:
        # The reader of the output is gone.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:  # disk full, permission denied, …
        if arguments.debug:
            show_traceback(error)
        where = f'"{error.filename}": ' if error.filename else ""
        again = _AGAIN.get(verb, "then try again")
        full = f" (free some space, {again})" if error.errno == errno.ENOSPC else ""
        fail(f"{where}{error.strerror or error}{full}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
