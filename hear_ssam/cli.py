"""`hear-ssam`: one subcommand per module; a module is imported only when its command is asked for."""

from __future__ import annotations

import argparse
import codecs
import errno
import importlib
import io
import os
import signal
import sys
import threading
import warnings
from collections.abc import Sequence
from typing import Any

from . import __version__
from .errors import HearSsamError

# Command -> the module with its add_parser(subparsers); in the order of the help page.
COMMANDS = {
    "demo": "demo", "embed": "extract",
    "classify": "downstream.classify", "search": "downstream.search", "map": "downstream.map",
    "evaluate": "evaluation.evaluate", "report": "evaluation.report", "check": "evaluation.check",
    "tasks": "evaluation.library",
    "models": "models", "convert": "models", "export": "embedding.export",
    "corpus": "pretrain", "codes": "pretrain", "pretrain": "pretrain",
    "heareval": "heareval", "doctor": "doctor",
}  # fmt: skip

# Stand-ins for the signs that our texts hold.
PLAIN = {"─": "-", "–": "-", "−": "-", "±": "+-", "≈": "~", "×": "x", "→": "->", "…": "...", "†": "+"}

EXAMPLES = """examples:
  hear-ssam demo                                    the whole path on a small task that ships with the package
  hear-ssam embed recordings/ -o embeddings.parquet
  hear-ssam classify train sounds/ -o sounds.json
  hear-ssam evaluate --tasks-dir tasks --results-dir results
  hear-ssam COMMAND --help                          options and examples of one command
"""


class _Parser(argparse.ArgumentParser):
    """Its examples keep their lines, as do those of its subcommands."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"formatter_class": argparse.RawDescriptionHelpFormatter, **options})


def build_parser(command: str | None = None) -> argparse.ArgumentParser:
    """The parser of one command, or of all of them."""
    description = "Audio embeddings behind the HEAR API, and the HEAR linear probe that judges them."
    parser = _Parser(prog="hear-ssam", description=description, epilog=EXAMPLES)
    parser.add_argument("--version", action="version", version=f"hear-ssam {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in [COMMANDS[command]] if command else dict.fromkeys(COMMANDS.values()):
        importlib.import_module(f"hear_ssam.{module}").add_parser(subparsers)
    return parser


def _in_plain(error: UnicodeError) -> tuple[str, int]:
    """Codec error handler for terminals that lack a sign: ours have stand-ins, others are escaped."""
    assert isinstance(error, UnicodeEncodeError)
    lacking = error.object[error.start : error.end]
    return "".join(PLAIN.get(x) or x.encode("ascii", "backslashreplace").decode() for x in lacking), error.end


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Exit codes: 0 done; 1 done, but something was skipped; 2 wrong input; 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None:
        codecs.register_error("hear_ssam", _in_plain)
        names = "surrogateescape"  # of files, on stdin, which need not be UTF-8
        for stream, errors in ((sys.stdin, names), (sys.stdout, "hear_ssam"), (sys.stderr, "hear_ssam")):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors=errors)
        # A batch system that asks a job to end gets what Ctrl-C gets: a saved state, no leftovers.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        warnings.formatwarning = lambda message, *_: f"hear-ssam: warning: {message}\n"
    args = build_parser(arguments[0] if arguments and arguments[0] in COMMANDS else None).parse_args(arguments)
    try:
        code: int = args.run(args)
        print(end="", flush=True)  # also without a stdout
        return code
    except HearSsamError as error:
        print(f"hear-ssam: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hear-ssam: interrupted", file=sys.stderr)
        if argv is None and any(not t.daemon for t in threading.enumerate() if t is not threading.main_thread()):
            sys.stdout.flush()
            os._exit(130)  # a normal exit waits for threads, however long the file is that they are at
        return 130
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.ENOSPC):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing left to flush at exit
        if error.errno == errno.EPIPE:  # the reader (`| head`) has seen enough
            return 128 + 13
        print(f"hear-ssam: error: standard output: {error.strerror}; make room or write elsewhere.", file=sys.stderr)
        return 2
