"""Sharing a model on the Hub: what of a folder is public, whether all of it is there, and the upload."""

from __future__ import annotations

import json
import os
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

from ..model.modeling_mfn import MFNForCausalLM
from .card import CARD_FILE, base_of, model_card, read_config, write_card

logger = logging.get_logger(__name__)

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARED = (
    *("config.json", "generation_config.json", "model*.safetensors", INDEX),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja"),
    *("vocab.json", "merges.txt", "vocab.txt", "*.model"),
    *("features/*.json", "features/*.parquet", "training_record.json", "evaluation.json"),
    *(CARD_FILE, "LICENSE*", "NOTICE*"),
)
"""What is public of a folder, beside the code that `config.json` names. Nothing else is ever uploaded: folders that a
training wrote also hold optimizer states, pickled arguments and whatever somebody put there."""

AGAIN = "load the folder with modeling_mfn imported and `save_pretrained` it again"


def check_model(folder: str | os.PathLike[str]) -> list[str]:
    """Checks that a folder holds a whole MFN model: config, every weight in its shape, and the code that loads it. The
    weights are not read, only what their files say of themselves.

    Returns:
        The files to share, relative to the folder.

    Raises:
        ValueError: on what is missing, damaged or does not fit.
    """
    folder = Path(folder)
    _check_weights(folder, _expected_shapes(folder))
    return sorted({*_code(folder), *_matching(folder)})


def push(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    base_model: str | None = None,
    token: str | bool | None = None,
) -> CommitInfo:
    """Uploads a saved MFN model with its tokenizer, and its atlas, training record and evaluation where it has them, in
    one commit. Large files that arrived before a connection broke are not sent again. A card that the repository has is
    kept; where neither it nor the folder has one, one is written into the folder.

    Args:
        folder: what `save_pretrained` or a training wrote.
        repo_id: `owner/name` on the Hub; made if it is not there.
        private: make a new repository private; by default what its owner's settings say.
        revision: branch to push to, which is made if it is not there.
        commit_message: by default "Upload MFN model".
        base_model: id on the Hub of the model that was converted, for the card; by default what the config says.
        token: of the Hub; by default the one that you are logged in with.

    Raises:
        ValueError: if the folder holds no whole model, or no tokenizer, or if the repository is public and `private` is
            asked for. Nothing is uploaded then.
        OSError: if the Hub cannot be reached or refuses.
    """
    folder = Path(folder)
    files = check_model(folder)
    if not {"tokenizer_config.json", "tokenizer.json"} & set(files):
        raise ValueError(f"{folder} has no tokenizer; save it there: `tokenizer.save_pretrained({str(folder)!r})`")
    api = HfApi(token=token)
    if CARD_FILE not in files:
        base_model = base_model or base_of(read_config(folder))
        card = model_card(folder, repo_id, base_model, _license(api, base_model))
    with _one_clear_error(repo_id):
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

    A card that the repository already has is kept. `modeling_mfn.push` shares a saved folder with its training record.

    Args:
        model: model in memory.
        repo_id: `owner/name` on the Hub. The repository is made if it does not exist.
        tokenizer: tokenizer to upload in the same commit.
        atlas: `FeatureAtlas` to upload as `features/`. It replaces an earlier one.
        commit_message: "Upload MFN model" by default.
        commit_description: longer text of the commit.
        private: True makes a new repository private. The default is the owner's setting.
        token: access token. The default is the one of `hf auth login`.
        revision: branch to push to. It is made if it does not exist.
        create_pr: True opens a pull request instead of committing.
        max_shard_size: size above which the weights are split.
        tags: more tags for the model card.

    Raises:
        ValueError: if the repository is public and `private` is asked for.
        OSError: if the Hub cannot be reached or refuses.
    """
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        model.save_pretrained(folder, max_shard_size=max_shard_size)
        for part in (tokenizer, atlas):
            if part is not None:
                part.save_pretrained(folder)
        files = check_model(folder)
        with _one_clear_error(repo_id):
            repo_id = _repository(api, repo_id, private)
            if not _keeps_its_card(api, repo_id, revision):
                base_model = base_of(model.config)
                card = model_card(folder, repo_id, base_model, _license(api, base_model))
                card.data.tags = list(dict.fromkeys([*card.data.tags, *(model.model_tags or []), *(tags or [])]))
                write_card(folder, card)
                files.append(CARD_FILE)
            return _upload(api, folder, files, repo_id, revision, commit_message, commit_description, create_pr)


def _repository(api: HfApi, repo_id: str, private: bool | None) -> str:
    """Makes the repository if it is not there. Of one that is there the Hub would ignore `private`, and publish."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if private and not api.model_info(repo_id).private:
        raise ValueError(f"{repo_id} is there and public; make it private in its settings on the Hub first")
    return repo_id


def _keeps_its_card(api: HfApi, repo_id: str, revision: str | None) -> bool:
    """Whether the repository has a card, which somebody may have edited there; says so."""
    if not api.file_exists(repo_id, CARD_FILE, revision=revision):
        return False
    logger.warning(f"the {CARD_FILE} that {repo_id} has is kept; delete it there to have another one uploaded")
    return True


def _expected_shapes(folder: Path) -> dict[str, list[int]]:
    """Weight -> shape, of those that a file must hold."""
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
            raise ValueError(f"{file} is missing, truncated or no safetensors ({error})") from error
    for name, shape in expected.items():
        if found.get(name) != shape:
            there = f"has the shape {found[name]}" if name in found else "is missing"
            raise ValueError(f"the weight {name} in {folder} {there}; by config.json it has the shape {shape}")


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        raise ValueError(f"{folder} has no weights ({WEIGHTS}); give a folder that `save_pretrained` wrote")
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from error
    return [folder / Path(name).name for name in sorted(names)]


def _code(folder: Path) -> set[str]:
    """Files of the code that loads the model where this package is not installed."""
    named = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("auto_map") or {}
    modules = {f"{target.partition('.')[0]}.py" for target in named.values()}
    try:
        needed = {Path(file).name for module in modules for file in get_relative_import_files(folder / module)}
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing, without which nobody can load the model; {AGAIN}") from error
    if not modules:
        raise ValueError(f"{folder} has no code, without which nobody can load the model; {AGAIN}")
    return modules | needed


def _matching(folder: Path) -> set[str]:
    return {
        path.relative_to(folder).as_posix() for pattern in SHARED for path in folder.glob(pattern) if path.is_file()
    }


def _license(api: HfApi, base_model: str | None) -> str | None:
    """The license in the base model's card on the Hub, `None` where there is none to be read."""
    if base_model is None:
        return None
    try:
        card = api.model_info(base_model).card_data
    except Exception:  # whatever keeps it from being read: the license is then said to be unknown
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
    # one whole takes the place of another: loaders would mix old shards with new ones, and an old atlas with a new
    replaced = ["model*.safetensors", INDEX]
    if any(file.startswith("features/") for file in files):
        replaced.append("features/*")
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


@contextmanager
def _one_clear_error(repo_id: str) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code in (401, 403):
            raise OSError(
                f"{constants.ENDPOINT} does not let you write to {repo_id}: log in with `hf auth login`, "
                "or set HF_TOKEN to a token that may"
            ) from error
        raise OSError(f"{constants.ENDPOINT} refuses the upload to {repo_id}: {error}") from error
    except Exception as error:  # transports have errors of their own: HTTP, LFS, Xet
        raise OSError(
            f"the upload to {repo_id} broke off ({error}); nothing of it is public yet, and what arrived is kept: "
            "run the same again to go on"
        ) from error
