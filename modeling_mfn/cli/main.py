"""The command `mfn`, one verb per job."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ..utils.display import visible_lines
from ..utils.extras import MissingExtra
from .atlas import atlas
from .convert import convert
from .demo import demo
from .evaluate import evaluate
from .explain import explain
from .push import push
from .steer import steer
from .train import TrainCommand, train

app = typer.Typer(
    help="Transformers that read through named, sparse features.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def options(debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False) -> None:
    """Options before the verb. `main` reads --debug from the arguments."""


for verb in (convert, train, atlas, steer, explain, evaluate, push, demo):
    app.command(cls=TrainCommand if verb is train else None)(verb)


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Bad input and missing extras end with one line and exit code 2; `--debug` shows where."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments)
    except (ValueError, OSError, MissingExtra) as error:
        if "--debug" in arguments:
            raise
        Console(stderr=True).print(Text.assemble(("mfn:", "red"), " ", _one_line(error)), soft_wrap=True)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    # a message may quote text of others: names in a config, labels, files of a data set
    return visible_lines(" ".join(str(error).split()))
