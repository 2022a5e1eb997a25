"""Console and options shared by several verbs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console()

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
