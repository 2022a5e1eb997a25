"""The verb `mfn push`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .options import console


def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an MFN model with its tokenizer.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, as owner/name. Created if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to. Created if missing.")] = None,
    message: Annotated[str | None, typer.Option(help="Commit message.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Hub id of the model that was converted, for the card.")
    ] = None,
) -> None:
    """Share a model on the Hub: weights, code, tokenizer and model card, and its atlas where it has one.

    Example: mfn push gpt2-mfn-trained me/gpt2-mfn --private
    """
    from ..hub.push import push as push_folder

    had_card = (folder / "README.md").exists()
    commit = push_folder(
        folder, repo, private=private or None, revision=revision, commit_message=message, base_model=base_model
    )
    wrote_card = not had_card and (folder / "README.md").exists()
    card = "; its card is README.md, also in the folder; edit it on the Hub" if wrote_card else ""
    console.print(f"{folder} is at {commit.commit_url}{card}", highlight=False, markup=False, soft_wrap=True)
