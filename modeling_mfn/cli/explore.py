"""The verb `mfn explore`."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from ..utils.extras import needs
from ..utils.files import new_folder
from .inputs import load_mfn, read_config, read_tokenizer
from .options import Overwrite, console

if TYPE_CHECKING:
    from ..features.atlas import FeatureAtlas

EvaluationFolder = Annotated[
    Path | None,
    typer.Option(help="Folder that mfn evaluate wrote, for its verdicts. Default: evaluation in the model's folder."),
]


def explore(
    model: Annotated[str, typer.Argument(help="MFN model with an atlas: a folder, or an id on the Hub.")],
    static: Annotated[
        Path | None, typer.Option(help="Folder to write, which opens from disk, instead of starting a server.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8000,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the address in a browser.")] = True,
    atlas: Annotated[
        str | None, typer.Option(help="Atlas: a folder, or a repository on the Hub. Default: the one of the model.")
    ] = None,
    evaluation: EvaluationFolder = None,
    overwrite: Overwrite = False,
) -> None:
    """See and steer the features of a model in a browser.

    With --static, write a folder whose index.html opens from disk. It has all pages that need no forward pass, and of a
    model on the Hub the weights are not downloaded.

    Example: mfn explore gpt2-mfn-trained
    """
    from ..explorer.source import find_atlas, find_model

    read_config(model)
    folder = find_model(model)
    found = find_atlas(model, folder, atlas)
    if static is not None:
        with new_folder(static, overwrite, inputs=[model, *([atlas] if atlas else [])]) as site:
            write(found, model, folder, site, evaluation)
        console.print(f"{len(found):,} features: open {static / 'index.html'} in a browser", soft_wrap=True)
        return
    with needs("serve"):
        from ..explorer.server.app import run_explorer
    tokenizer, mfn = read_tokenizer(model), load_mfn(model)
    with tempfile.TemporaryDirectory(prefix="mfn-explorer-") as scratch:
        write(found, model, folder, Path(scratch), evaluation, live=True)
        own = folder if Path(model).is_dir() and atlas is None else None  # labels are saved next to the atlas
        run_explorer(mfn, tokenizer, found, Path(scratch), folder=own, host=host, port=port, open_browser=open_browser)


def write(
    atlas: FeatureAtlas, model: str, folder: Path, site: Path, evaluation: Path | None, live: bool = False
) -> None:
    """Writes the static folder of a model's explorer.

    Args:
        atlas: Atlas of the model.
        model: Folder or repository of the model, which names it.
        folder: Folder with its config.
        site: Empty folder.
        evaluation: Folder that `mfn evaluate` wrote.
        live: True if a server answers what needs the model.
    """
    from ..explorer.site_data.write import write_site
    from ..features.public_names import public_name

    if evaluation is not None and not evaluation.is_dir():
        raise ValueError(f"{evaluation} is not a folder; give one that mfn evaluate wrote")
    with console.status(Text(f"writing {len(atlas):,} features")):
        write_site(atlas, folder, site, name=public_name(model), evaluation=evaluation, live=live)


__all__ = ["EvaluationFolder", "explore", "write"]
