"""The command `mfn`, one verb per job."""

from __future__ import annotations

import sys
import tempfile
import traceback
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..model.version import __version__
from ..utils.display import visible_lines
from ..utils.extras import MissingExtra
from .atlas import atlas
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .explore import explore
from .export import export
from .options import console
from .push import push
from .serve import serve
from .steer import steer
from .train import TrainCommand, train
from .unwrap import unwrap

BAD_INPUT, BUG, INTERRUPTED = 2, 1, 130
"""Exit codes."""
EXPECTED = (ValueError, OSError, MissingExtra, MemoryError, RecursionError)
"""Errors that say what is wrong with the input or the machine. RecursionError comes of JSON that is nested deeply."""
READERS = ("safetensors", "pyarrow", "huggingface_hub", "datasets", "httpx", "zipfile", "tarfile")
"""Packages whose own errors say the same of a file or of the network."""

app = typer.Typer(
    help="Transformers that read through named, sparse features.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"mfn {__version__}")
        raise typer.Exit


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the verb. `main` reads --debug from the arguments."""


for verb in (convert, train, atlas, steer, explain, explore, evaluate, export, push, serve, unwrap, demo):
    app.command(cls=TrainCommand if verb is train else None)(verb)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line.

    An expected failure ends with one line and exit code 2. Anything else is a bug: it ends with one line, a file with
    the traceback, and exit code 1. `--debug` shows the traceback of either.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments)
    except (KeyboardInterrupt, SystemExit) as leaving:
        # Typer makes the exit code of an interruption within a verb
        if isinstance(leaving, SystemExit) and leaving.code != INTERRUPTED:
            raise
        _end("interrupted", INTERRUPTED)
    except Exception as error:
        if "--debug" in arguments:
            raise
        if _is_expected(error):
            _end(str(error) or type(error).__name__, BAD_INPUT)
        _end(f"this is a bug, please report it: {type(error).__name__}: {error}; {_write_log()} has the traceback", BUG)


def _is_expected(error: Exception) -> bool:
    packages = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    out_of_memory = type(error).__name__ == "OutOfMemoryError"  # torch's, which is not imported here
    return isinstance(error, EXPECTED) or out_of_memory or not packages.isdisjoint(READERS)


def _write_log() -> Path:
    """Writes the traceback of the current error to a file."""
    with tempfile.NamedTemporaryFile("w", encoding="utf-8", prefix="mfn-", suffix=".log", delete=False) as log:
        log.write(f"mfn {__version__}, Python {sys.version}\n{sys.argv}\n\n{traceback.format_exc()}")
    return Path(log.name)


def _end(message: str, code: int) -> None:
    # a message may quote text of others: names in a config, labels, files of a data set
    line = visible_lines(" ".join(message.split()))
    Console(stderr=True).print(Text.assemble(("mfn:", "red"), " ", line), soft_wrap=True)
    sys.exit(code)
