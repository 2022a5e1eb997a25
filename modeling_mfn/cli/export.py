"""The verb `mfn export`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.text import Text

from ..utils.files import new_folder
from .inputs import load_mfn, read_config
from .options import Overwrite, console, parse_layers

if TYPE_CHECKING:
    from ..model.configuration_mfn import MFNConfig


def export(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for the files of the other tool.")],
    format: Annotated[
        Literal["saelens", "sparsify", "neuronpedia"], typer.Option("--format", help="Tool that is to read the files.")
    ] = "saelens",
    layers: Annotated[
        str | None, typer.Option(help='Layers to write as SAEs: "all", or indices such as "6,7". Default: all.')
    ] = None,
    atlas: Annotated[
        str | None,
        typer.Option(
            help="Atlas for Neuronpedia: a folder, or a repository on the Hub. Default: the one of the model."
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model's features in the format of another tool.

    saelens, sparsify: each MFN layer as a sparse autoencoder (SAE), in a folder of its own. neuronpedia: batch files of
    the atlas, as Neuronpedia imports them.

    Example: mfn export gpt2-mfn-trained saes --format saelens
    """
    config = read_config(model)
    if format == "neuronpedia":
        if layers is not None:
            raise ValueError("--layers is for SAEs; --format neuronpedia writes all layers of the atlas")
        written = _write_atlas(model, config, atlas or model, output, overwrite)
    else:
        if atlas is not None:
            raise ValueError(f"--atlas is for --format neuronpedia; SAEs for {format} have no atlas")
        written = _write_saes(model, format, parse_layers(layers or "all"), output, overwrite)
    console.print(f"{output}: {written}")


def _write_saes(
    model: str, format: Literal["saelens", "sparsify"], layers: str | list[int], output: Path, overwrite: bool
) -> str:
    from ..interop.export import export_saes

    with new_folder(output, overwrite, inputs=[model]) as folder:
        mfn = load_mfn(model)
        with console.status(Text(f"exporting {model}")):
            written = export_saes(mfn, folder, format, layers)
    return f"{len(written)} SAEs for {format}, in {', '.join(place.name for place in written.values())}"


def _write_atlas(model: str, config: MFNConfig, atlas: str, output: Path, overwrite: bool) -> str:
    from ..features.atlas import FeatureAtlas
    from ..features.public_names import public_name
    from ..interop.neuronpedia import export_neuronpedia

    described = FeatureAtlas.from_pretrained(atlas)
    with new_folder(output, overwrite, inputs=[model, atlas]) as folder, console.status("writing"):
        export_neuronpedia(described, config, folder, public_name(model))
    return f"{len(described)} features of layers {', '.join(map(str, config.layers))} for neuronpedia"


__all__ = ["export"]
