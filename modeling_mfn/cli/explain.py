"""The verb `mfn explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..utils.files import check_output, new_folder
from .inputs import load_mfn, read_config, read_tokenizer
from .options import Overwrite, console


def explain(
    model: Annotated[str, typer.Argument(help="MFN model with alpha above 0: a folder, or an id on the Hub.")],
    text: Annotated[str, typer.Argument(help="Text that the model reads.")],
    position: Annotated[
        int, typer.Option(help="Position of the token after which the prediction is made; -1 is the last.")
    ] = -1,
    token: Annotated[str | None, typer.Option(help="Predicted token to explain. Default: the likeliest.")] = None,
    top: Annotated[int, typer.Option(help="Features to list per layer, the strongest first.")] = 10,
    output: Annotated[Path | None, typer.Option(help="Folder for the explanation as JSON and figures.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Trace a predicted token to the features that moved its logit, and those features to the tokens that raised them.

    If the model has an atlas, each feature is shown with examples of text on which it fires.

    Example: mfn explain gpt2-mfn-trained "The king and the" --token " queen" --output why-queen
    """
    from ..features.atlas.atlas import find_atlas
    from ..features.attribution import explain as explain_token

    if output is not None:
        check_output(output, overwrite, inputs=[model])
    read_config(model)
    tokenizer = read_tokenizer(model)
    mfn = load_mfn(model)
    atlas = find_atlas(model)
    with console.status("tracing"):
        explanation = explain_token(mfn, tokenizer, text, position, token=token, top=top, atlas=atlas)
    console.print(explanation.table())
    if output is not None:
        with new_folder(output, overwrite, inputs=[model]) as folder:
            explanation.save(folder)
