"""Upload of a model to the Hub: which files of a folder become public, checks that none is missing, one commit."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import CommitInfo, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError
from safetensors import SafetensorError, safe_open
from transformers.dynamic_module_utils import get_relative_import_files
from transformers.utils import logging

from ..features.atlas.belonging import check_model as check_atlas
from ..features.atlas.schema import FOLDER, METADATA_FILE
from ..features.atlas.storage import read_metadata
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.weights_digest import INDEX, WEIGHTS, weight_files
from ..model.whole_files import CONFIG, OLD_CODE, check_folder
from ..utils.files import read_json
from ..utils.ours import named_classes
from .card import CARD_FILE, base_of, model_card, read_config, write_card
from .evaluation_file import read_perplexities

logger = logging.get_logger(__name__)

SHARED = (
    *("config.json", "generation_config.json", "model*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("additional_chat_templates/*.jinja", "vocab.json", "merges.txt", "vocab.txt", "*.model", "*.spm", "*.tiktoken"),
    *("features/*.json", "features/*.parquet", "training_record.json", "evaluation.json"),
    *(CARD_FILE, "LICENSE*", "NOTICE*"),
)
"""Files of a folder that become public, next to the code that `config.json` and `tokenizer_config.json` name.

Nothing else is ever uploaded: the folder of a training also holds optimizer states, pickled arguments and perhaps
private notes."""
CODE_NAME = re.compile(r"(?:(?P<repository>[\w./-]+)--)?(?P<module>\w+)\.\w+")
"""Class in an `auto_map`: a module of the folder, or of another repository."""

SAVE_AGAIN = "load the folder with modeling_mfn imported and `save_pretrained` it again"


def check_model(folder: str | os.PathLike[str]) -> list[str]:
    """Checks that a folder holds a complete MFN model: config, every weight in its shape, and the code that loads it.

    Returns:
        Names of the files to share, relative to the folder.

    Raises:
        ValueError: If a file is missing or damaged, or a link; if a weight does not fit the config; or if the weights,
            the atlas or `evaluation.json` are those of another model.
    """
    folder = Path(folder)
    _check_weights(folder, _expected_shapes(folder))
    files = sorted({*_code(folder), *_matching(folder)})
    _check_links(folder, files)
    check_folder(folder)
    read_perplexities(folder)
    if f"{FOLDER}/{METADATA_FILE}" in files:
        check_atlas(read_metadata(folder / FOLDER), read_config(folder), str(folder), whole=True)
    return files


def _check_links(folder: Path, files: list[str]) -> None:
    """Checks that files are in the folder themselves. A link would publish a file from elsewhere.

    A snapshot in the Hub's own cache is made of links into `blobs`.
    """
    home = folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    for name in files:
        place = (home / name).resolve()
        if place != home / name and not (blobs != home and place.is_relative_to(blobs)):
            raise ValueError(f"{folder / name} is a link to {place}, which is not shared; copy the file into {folder}")


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    about: str = "",
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads a saved MFN model with its tokenizer in one commit.

    The atlas, the training record and `evaluation.json` are uploaded where the folder has them. A card in the
    repository is kept. If neither the repository nor the folder has a card, one is written into the folder and
    uploaded. After a broken connection, call it again: large files that arrived are not sent twice.

    Args:
        folder: Folder that `save_pretrained` or a training wrote.
        repo_id: `owner/name` on the Hub. Created if missing.
        private: True makes a new repository private. Default: the owner's setting.
        revision: Branch to push to. Created if missing.
        commit_message: "Upload MFN model" by default.
        base_model: Id on the Hub of the model that was converted, for the card. Default: the one in the config.
        about: Your own Markdown for a new card, put before the rest.
        token: Access token. Default: the one of `hf auth login`.

    Returns:
        Address and id of the commit.

    Raises:
        ValueError: If the folder has no complete model or no tokenizer, or if `private` is asked for and the repository
            is public. Nothing is uploaded then.
        OSError: If the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    files = check_model(folder)
    if not {"tokenizer_config.json", "tokenizer.json"} & set(files):
        raise ValueError(f"{folder} has no tokenizer; save it there: `tokenizer.save_pretrained({str(folder)!r})`")
    api = HfApi(token=token)
    if CARD_FILE not in files:
        base_model = base_model or base_of(read_config(folder))
        card = model_card(folder, repo_id, base_model, _license(api, base_model), about)
    with one_clear_error(repo_id):
        repo_id = _repository(api, repo_id, private)
        if _keeps_its_card(api, repo_id, revision):
            files = [file for file in files if file != CARD_FILE]
        elif CARD_FILE not in files:
            write_card(folder, card)
            files.append(CARD_FILE)
        return _upload(api, folder, files, repo_id, revision, commit_message)


def push_model(
    model: MFNForCausalLM,
    repo_id: str,
    *,
    tokenizer: Any = None,
    atlas: Any = None,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    max_shard_size: int | str = "50GB",
    tags: list[str] | None = None,
) -> CommitInfo:
    """Uploads a model with its code and a model card in one commit. `MFNForCausalLM.push_to_hub` calls it.

    A card in the repository is kept. `push` shares a saved folder with its training record.

    Args:
        model: Model in memory.
        repo_id: `owner/name` on the Hub. Created if missing.
        tokenizer: Tokenizer to upload in the same commit.
        atlas: `FeatureAtlas` to upload as `features/`. It replaces an earlier one.
        commit_message: "Upload MFN model" by default.
        commit_description: Longer text of the commit.
        private: True makes a new repository private. Default: the owner's setting.
        token: Access token. Default: the one of `hf auth login`.
        revision: Branch to push to. Created if missing.
        create_pr: True opens a pull request instead.
        max_shard_size: Size above which the weights are split into several files.
        tags: Further tags for the model card.

    Returns:
        Address and id of the commit.

    Raises:
        ValueError: If `private` is asked for and the repository is public.
        OSError: If the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for part in (tokenizer, atlas):
            if part is not None:
                part.save_pretrained(folder)
        files = check_model(folder)
        with one_clear_error(repo_id):
            repo_id = _repository(api, repo_id, private)
            if not _keeps_its_card(api, repo_id, revision):
                base_model = base_of(model.config)
                card = model_card(folder, repo_id, base_model, _license(api, base_model))
                card.data.tags = list(dict.fromkeys([*card.data.tags, *(model.model_tags or []), *(tags or [])]))
                write_card(folder, card)
                files.append(CARD_FILE)
            return _upload(api, folder, files, repo_id, revision, commit_message, commit_description, create_pr)


def _repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Creates the repository if it is missing. For an existing one the Hub would ignore `private`, and publish."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} exists and is public; make it private in its settings on the Hub first")
    return repo_id


def _keeps_its_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Returns True, with a warning, if the repository has a card. Somebody may have edited it there."""
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    logger.warning(f"the {CARD_FILE} in {repo_id} is kept; delete it there to upload a new one")
    return True


def _expected_shapes(folder: Path) -> dict[str, list[int]]:
    """Shape of each weight that the files must hold. Tied weights are stored once."""
    config = read_config(folder)
    with torch.device("meta"):
        model = MFNForCausalLM(config)
    tied = model.all_tied_weights_keys
    return {name: list(weight.shape) for name, weight in model.state_dict().items() if name not in tied}


def _check_weights(folder: Path, expected: dict[str, list[int]]) -> None:
    found: dict[str, list[int]] = {}
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                found |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file} is missing, truncated or not safetensors ({error})") from error
    for name, shape in expected.items():
        if found.get(name) != shape:
            there = f"has the shape {found[name]}" if name in found else "is missing"
            raise ValueError(f"the weight {name} in {folder} {there}; config.json asks for {shape}")


def _weight_files(folder: Path) -> list[Path]:
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} has no weights ({WEIGHTS}); give a folder that `save_pretrained` wrote")
    return files


def _code(folder: Path) -> set[str]:
    """Names of the code files that load the model and its tokenizer where this package is not installed."""
    modules = {
        f"{named['module']}.py"
        for file in ("config.json", "tokenizer_config.json")
        for named in _named_code(folder / file)
        if not (named["repository"] and file == "tokenizer_config.json")  # it stays there
    }
    try:
        needed = {Path(file).name for module in modules for file in get_relative_import_files(folder / module)}
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename} is missing, and the model cannot be loaded without it; {SAVE_AGAIN}"
        ) from error
    if not any(map(bool, _named_code(folder / "config.json"))):
        raise ValueError(f"{folder} has no code, and the model cannot be loaded without it; {SAVE_AGAIN}")
    return modules | needed


def _named_code(file: Path) -> list[re.Match[str]]:
    """Classes that the `auto_map` of a file names; `ValueError` if it holds something else."""
    found = []
    for each in named_classes(read_json(file, dict[str, Any]) or {}):
        match = CODE_NAME.fullmatch(each) if isinstance(each, str) else None
        if match is None and each is not None:
            raise ValueError(f"{file} has {each!r} in auto_map; it must name a module and a class, as 'module.Class'")
        found += [match] if match else []
    return found


def _matching(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for pattern in SHARED for path in folder.glob(pattern) if path.is_file()
    }


def _license(api: HfApi, base_model: str | None) -> str | None:
    """License in the base model's card on the Hub; None if it cannot be read."""
    if base_model is None:
        return None
    try:
        card = api.model_info(base_model).card_data
    except Exception:  # offline, private or missing: the card then says that the license is not known
        return None
    found = card.get("license") if card else None
    return found if isinstance(found, str) else None


def _upload(
    api: HfApi,
    folder: Path,
    files: list[str],
    repo_id: str,
    revision: str | None,
    message: str | None,
    description: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    if revision is not None and not create_pr:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    # old shards and old files of an atlas must go, or loaders would mix them with the new ones
    replaced = ["model*.safetensors", INDEX]
    if any(file.startswith("features/") for file in files):
        replaced.append("features/*")
    if _has_old_code(api, repo_id, revision):
        replaced.append(OLD_CODE)
    return api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        allow_patterns=files,
        delete_patterns=replaced,
        revision=revision,
        commit_message=message or "Upload MFN model",
        commit_description=description,
        create_pr=create_pr,
    )


def _has_old_code(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Returns True for a repository with code of version 0.1.0, which would shadow this package in a clone."""
    if not all(api.file_exists(repo_id, name, revision=revision) for name in (OLD_CODE, CONFIG)):
        return False
    config = read_json(Path(api.hf_hub_download(repo_id, CONFIG, revision=revision)), dict[str, Any]) or {}
    return any(str(each).startswith(f"{Path(OLD_CODE).stem}.") for each in named_classes(config))


@contextmanager
def one_clear_error(repo_id: str) -> Iterator[None]:
    """Makes every error of an upload one `OSError` that says what to do. A `ValueError` passes."""
    try:
        yield
    except ValueError:
        raise
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise OSError(
                f"{constants.ENDPOINT} does not let you write to {repo_id}: log in with `hf auth login`, "
                "or set HF_TOKEN to a token with write access"
            ) from error
        raise OSError(f"{constants.ENDPOINT} refuses the upload to {repo_id}: {error}") from error
    except Exception as error:  # each transport has its own errors: HTTP, LFS, Xet
        raise OSError(
            f"the upload to {repo_id} was interrupted ({error}); nothing of it is public yet: "
            "run the same command again, which continues it"
        ) from error
