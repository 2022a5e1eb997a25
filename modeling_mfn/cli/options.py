"""Options and the console that several verbs share."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console()

Overwrite = Annotated[bool, typer.Option(help="Replace an output folder that is not empty.")]
