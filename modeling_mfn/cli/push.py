"""The verb `mfn push`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from .explore import EvaluationFolder, write
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
    with_explorer: Annotated[
        bool, typer.Option("--with-explorer", help="Add the static explorer to the repository, as explorer/.")
    ] = False,
    explorer_space: Annotated[
        str | None, typer.Option(help="Put the static explorer into this static Space, owner/name.")
    ] = None,
    evaluation: EvaluationFolder = None,
) -> None:
    """Share a model on the Hub: weights, code, tokenizer and model card, and its atlas where it has one.

    Example: mfn push gpt2-mfn-trained me/gpt2-mfn --private
    """
    had_card = (folder / "README.md").exists()
    with _site(folder, repo, evaluation, with_explorer or explorer_space is not None) as site:
        from ..hub.push import push as push_folder
        from ..hub.push_explorer import explorer_note, has_explorer, push_explorer, push_space

        options: dict[str, Any] = {"private": private or None, "revision": revision, "commit_message": message}
        about = explorer_note(repo, explorer_space) if site is not None else ""
        commit = push_folder(folder, repo, **options, base_model=base_model, about=about)
        wrote_card = not had_card and (folder / "README.md").exists()
        card = "; its card is README.md, also in the folder; edit it on the Hub" if wrote_card else ""
        _say(f"{folder} is at {commit.commit_url}{card}")
        if site is not None and with_explorer:
            _say(f"its explorer is at {push_explorer(site, repo, revision=revision).commit_url}")
        elif has_explorer(repo, revision=revision):
            _say(f"explorer/ of {repo} is of an earlier push; --with-explorer replaces it")
        if site is not None and explorer_space is not None:
            _say(f"its explorer is at {push_space(site, explorer_space, repo, private=private or None)}")


@contextmanager
def _site(folder: Path, repo: str, evaluation: Path | None, wanted: bool) -> Iterator[Path | None]:
    """Gives a temporary folder with the static explorer of a model, or None if it is not wanted."""
    if not wanted:
        yield None
        return
    from ..explorer.source import find_atlas

    atlas = find_atlas(str(folder), folder)
    with tempfile.TemporaryDirectory(prefix="mfn-explorer-") as scratch:
        write(atlas, repo, folder, Path(scratch), evaluation)
        yield Path(scratch)


def _say(text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)
