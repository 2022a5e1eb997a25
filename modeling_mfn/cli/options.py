"""Console and options shared by several verbs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

console = Console(markup=False, emoji=False)  # names of files and of features are shown as they are

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an output folder that is not empty.")]


def parse_layers(layers: str) -> str | list[int]:
    """Reads block indices from an option; "all" stays."""
    if layers == "all":
        return layers
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f'layers is {layers!r}; write "all" or block indices such as "6,7"') from None
