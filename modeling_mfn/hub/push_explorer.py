"""Upload of a static explorer: next to its model, or as a static Space."""

from __future__ import annotations

import tempfile
from pathlib import Path

from huggingface_hub import CommitInfo, HfApi, constants

from ..utils.display import for_table_cell
from ..utils.ours import SITE
from .push import one_clear_error

FOLDER = "explorer"
"""Folder of a model's repository in which its explorer is."""
NEW_SPACE = {".gitattributes", "README.md", "index.html", "style.css"}
"""Files that the Hub may put into a new Space."""


def explorer_note(repo_id: str, space: str | None = None) -> str:
    """Writes the sentences of a model's card about its explorer, in Markdown.

    Args:
        repo_id: Repository of the model.
        space: Space of the explorer. Default: it is in the model's repository.
    """
    if space is not None:
        return f"The features can be seen in a browser: [explorer]({_page_of_space(space)})."
    return (
        f"`{FOLDER}/` shows the features in a browser, without a server. Download it, and open "
        f"`{FOLDER}/index.html`:\n\n"
        f'```bash\nhf download {repo_id} --include "{FOLDER}/*" --local-dir .\n```'
    )


def push_explorer(
    site: Path, repo_id: str, *, revision: str | None = None, token: str | bool | None = None
) -> CommitInfo:
    """Uploads a static explorer as `explorer/` of its model's repository. It replaces an earlier one.

    Args:
        site: Folder that `mfn explore --static` writes.
        repo_id: Repository of the model, which exists.
        revision: Branch to push to.
        token: Access token. Default: the one of `hf auth login`.

    Returns:
        Address and id of the commit.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    with one_clear_error(repo_id):
        return HfApi(token=token).upload_folder(
            repo_id=repo_id,
            folder_path=site,
            path_in_repo=FOLDER,
            delete_patterns="*",
            revision=revision,
            commit_message="Upload the explorer",
        )


def has_explorer(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> bool:
    """Returns True if a model's repository has an explorer, of this or an earlier upload.

    Args:
        repo_id: Repository of the model, which exists.
        revision: Branch. Default: the main one.
        token: Access token. Default: the one of `hf auth login`.

    Raises:
        OSError: If the Hub cannot be reached or refuses.
    """
    with one_clear_error(repo_id):
        return HfApi(token=token).file_exists(repo_id, f"{FOLDER}/index.html", revision=revision)


def push_space(
    site: Path, space: str, repo_id: str, *, private: bool | None = None, token: str | bool | None = None
) -> str:
    """Uploads a static explorer as a static Space, which the Hub shows as it is.

    The Space's `README.md` is written once, and kept afterwards.

    Args:
        site: Folder that `mfn explore --static` writes.
        space: `owner/name` of the Space. Created if missing.
        repo_id: Repository of the model, which the Space names.
        private: True makes a new Space private. Default: the owner's setting.
        token: Access token. Default: the one of `hf auth login`.

    Returns:
        Address of the Space.

    Raises:
        ValueError: If the Space holds something else, or is public although `private` is asked for. Nothing is uploaded
            then.
        OSError: If the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    with one_clear_error(space):
        space = api.create_repo(space, repo_type="space", space_sdk="static", private=private, exist_ok=True).repo_id
        if private and not api.space_info(space).private:
            raise ValueError(f"{space} exists and is public; make it private in its settings on the Hub first")
        there = set(api.list_repo_files(space, repo_type="space"))
        is_ours = SITE in there
        if not is_ours and (foreign := sorted(there - NEW_SPACE)):
            raise ValueError(f"the Space {space} holds {foreign[0]}, which is not of an explorer; choose another name")
        api.upload_folder(
            repo_id=space,
            repo_type="space",
            folder_path=site,
            delete_patterns="data/*",
            commit_message="Upload the explorer",
        )
        if not is_ours:
            with tempfile.TemporaryDirectory() as scratch:
                card = Path(scratch) / "README.md"
                card.write_text(_space_card(space, repo_id), encoding="utf-8")
                api.upload_file(
                    repo_id=space,
                    repo_type="space",
                    path_or_fileobj=card,
                    path_in_repo=card.name,
                    commit_message="Say what the Space is",
                )
    return _page_of_space(space)


def _page_of_space(space: str) -> str:
    return f"{constants.ENDPOINT}/spaces/{space}"


def _space_card(space: str, repo_id: str) -> str:
    """Markdown with the settings of a static Space. Names on the Hub are letters, digits, `-`, `_` and `.`."""
    title = space.rpartition("/")[2]
    settings = f'title: "{title}"\nsdk: static\napp_file: index.html\npinned: false\nmodels:\n- "{repo_id}"\n'
    words = "`mfn push --explorer-space` of the package `modeling_mfn` wrote this Space."
    return f"---\n{settings}---\n\nFeatures of {for_table_cell(repo_id)} in a browser. {words}\n"


__all__ = ["explorer_note", "push_explorer", "push_space"]
