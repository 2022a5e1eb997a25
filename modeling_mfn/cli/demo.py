"""The verb `mfn demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.files import new_folder
from .options import Overwrite, console


def demo(
    output: Annotated[Path, typer.Option(help="Folder for the model and figures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Seed of initialisation and data order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Convert SmolLM2-135M, train its MFN layers for a few minutes, and use them.

    Example: mfn demo
    """
    from ..demo.run import run

    with new_folder(output, overwrite) as folder:
        run(folder, seed, console)
    console.print(f"model and figures are in {output}")
