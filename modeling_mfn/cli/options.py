"""Console and options shared by several verbs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console(markup=False, emoji=False)  # names of files and of features are shown as they are

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]
