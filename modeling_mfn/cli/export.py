"""The verb `mfn export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..utils.files import new_folder
from .inputs import read_config
from .options import Overwrite, console


def export(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for the files of the other tool.")],
    format: Annotated[
        Literal["neuronpedia"], typer.Option("--format", help="Tool that is to read the files.")
    ] = "neuronpedia",
    atlas: Annotated[
        str | None,
        typer.Option(help="Atlas to write: a folder, or a repository on the Hub. Default: the one of the model."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model's features in the format of another tool.

    neuronpedia: batch files of the atlas, as Neuronpedia imports them.

    Example: mfn export gpt2-mfn-trained for-neuronpedia --format neuronpedia
    """
    from ..features.atlas import FeatureAtlas
    from ..features.public_names import public_name
    from ..interop.neuronpedia import export_neuronpedia

    config = read_config(model)
    described = FeatureAtlas.from_pretrained(atlas or model)
    with new_folder(output, overwrite, inputs=[model, atlas or model]) as folder, console.status("writing"):
        export_neuronpedia(described, config, folder, public_name(model))
    layers = ", ".join(map(str, config.layers))
    console.print(f"{output}: {len(described)} features of layers {layers} for {format}")
