"""Saving and loading of models whole: no mixture of an older and a newer model is left, or loaded."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME

from .checks import naming
from .configuration_mfn import check_structure
from .mfn_layer import MFNLayer
from .twins import is_a
from .unguided_training import tell_of_norms
from .weights_digest import digest_of_folder

WRITING, COMPLETE = ".saving", ".saved"
"""Folders inside a model's folder: of a model that is being written, and of one whose files are being renamed."""
CONFIG, NAMES = "config.json", ".names.json"
OLD_CODE = "modeling_mfn.py"
"""Code that version 0.1.0 saved. It shadows this package where the folder is the working directory."""
FOR_THE_HUB = ("repo_id", "commit_message", "commit_description", "private", "create_pr", "revision", "tags", "token")
"""Arguments of `save_pretrained` that are for the upload."""


class WholeFiles:
    """Base class of MFN models that saves and loads them whole."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Loads a model as transformers does.

        Raises:
            OSError: If the weights are damaged or missing. The message names the folder or id.
            ValueError: If the folder's config is not that of its weights, or if a weight is missing. With
                `output_loading_info=True` the caller checks the weights: missing ones start afresh.
        """
        source, tells = pretrained_model_name_or_path, kwargs.pop("output_loading_info", False)
        with readable_source(source), naming(source):
            if source is not None and not tells and kwargs.get("variant") is None:
                check_folder(Path(source) / (kwargs.get("subfolder") or ""))
            model, info = super().from_pretrained(  # type: ignore[misc]
                source, *args, output_loading_info=True, **kwargs
            )
        model.note_features()
        if tells:
            return model, info
        of_a_model = source is not None and not model._hf_peft_config_loaded
        if of_a_model and (missing := sorted(info["missing_keys"])):
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise ValueError(f"the weights of {source} lack {missing[0]}{more}; save the model again as a whole")
        return model

    def save_pretrained(
        self: Any, save_directory: str | os.PathLike[str], is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> None:
        """Saves a model as transformers does, but as a whole: older files stay until the new ones are complete.

        Raises:
            OSError: If the folder cannot be written. The older files are then as they were.
            ValueError: If the config has another setting than the one that the weights were made with.
        """
        folder, save = Path(save_directory), super().save_pretrained  # type: ignore[misc]
        check_structure(self.config, {each.layer_index: each for each in self.modules() if is_a(each, MFNLayer)})
        tell_of_norms(self)
        if kwargs.get("distributed_checkpoint"):  # every process writes a part, and the weights are in no one file
            self.config.weights_digest = None
            save(folder, is_main_process, *args, **kwargs)
            return
        push = kwargs.pop("push_to_hub", False)
        upload = {name: kwargs.pop(name) for name in FOR_THE_HUB if push and name in kwargs}
        if not self.should_save_on_this_rank(is_main_process):
            with tempfile.TemporaryDirectory() as nothing:  # a process that only takes part in gathering
                save(nothing, is_main_process, *args, **kwargs)
            return
        variant = kwargs.get("variant")
        with _aside(folder, variant) as aside:
            save(aside, is_main_process, *args, **kwargs)
            if (aside / CONFIG).is_file():  # an adapter has none
                self.name_features(None if variant else digest_of_folder(aside))
                self.config.save_pretrained(aside)
        if push:
            self.push_to_hub(upload.pop("repo_id", folder.resolve().name), **upload)


@contextmanager
def readable_source(source: Any) -> Iterator[None]:
    """Names the folder or id in the error if it cannot be found, or if its weights turn out to be damaged."""
    name = "" if source is None else os.fspath(source)
    if not os.path.exists(name) and (os.path.isabs(name) or name.startswith(".") or name.count("/") > 1):
        raise ValueError(f"{name} is neither a folder nor an id on the Hub")
    try:
        yield
    except RecursionError as error:
        raise ValueError(f"the config of {source} is nested too deeply") from error
    except SafetensorError as error:
        raise OSError(f"the weights of {source} are truncated or not safetensors ({error})") from error
    except OSError as error:
        if str(source) in str(error):
            raise
        raise OSError(f"{source} is not a folder, and cannot be downloaded from the Hub: {error}") from error


def check_folder(folder: Path) -> None:
    """Checks that the config of a saved model is that of its weights. Folders of earlier versions pass.

    Raises:
        ValueError: If they do not belong together.
    """
    for complete in folder.glob(f"{COMPLETE}*"):
        raise ValueError(
            f"a save into {folder} was killed between two renames: move the files of {complete} into {folder}, and "
            f"delete {complete} and older weights in files of other names"
        )
    if (generation := folder / GENERATION_CONFIG_NAME).is_file():
        try:
            GenerationConfig.from_pretrained(folder)
        except Exception as error:  # whatever a setting of a wrong type raises
            raise ValueError(f"{generation} is damaged: {error}") from error
    told = digest_in_config(folder)
    found = None if told is None else digest_of_folder(folder)
    if found != told and found is not None:
        raise ValueError(
            f"{folder / CONFIG} is of other weights ({told}) than those next to it ({found}). Take both from one "
            "place; if these weights are meant, delete weights_digest from the config"
        )


def digest_in_config(folder: Path) -> str | None:
    """Returns the digest of the weights that a folder's config names; `None` where it names none."""
    try:
        digest = json.loads((folder / CONFIG).read_text(encoding="utf-8")).get("weights_digest")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None  # transformers says what is wrong with it
    return digest if isinstance(digest, str) else None


@contextmanager
def _aside(folder: Path, variant: str | None) -> Iterator[Path]:
    """Gives a folder for new files, which take the place of the older ones at the end of the context."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK") or 0)  # processes that all save one folder must not take each other's files
    writing, complete = (folder / (name + f"-{rank}" * (rank > 0)) for name in (WRITING, COMPLETE))
    _complete(complete, folder, variant)  # of a save that was killed
    try:
        shutil.rmtree(writing, ignore_errors=True)
        writing.mkdir()
        yield writing
        names = [file.name for file in writing.iterdir()]
        (writing / NAMES).write_text(json.dumps(names), encoding="utf-8")
        os.replace(writing, complete)
    except (OSError, SafetensorError) as error:
        raise OSError(f"the model could not be saved in {folder}, which is as it was: {error}") from error
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    _complete(complete, folder, variant)


def _complete(complete: Path, folder: Path, variant: str | None) -> None:
    """Renames the files of a complete model to their places, weights first, and removes weights of an older one."""
    if not complete.is_dir():
        return
    names = json.loads((complete / NAMES).read_text(encoding="utf-8"))
    for file in sorted(complete.iterdir(), key=lambda file: (not file.name.startswith("model"), file.name)):
        if file.name != NAMES:
            os.replace(file, folder / file.name)
    own = f".{variant}" if variant else ""
    weights = re.compile(rf"model{own}(-\d{{5}}-of-\d{{5}})?\.safetensors|model\.safetensors\.index{own}\.json")
    if any(map(weights.fullmatch, names)):  # an adapter leaves the weights of its model alone
        for file in folder.iterdir():
            if (weights.fullmatch(file.name) or file.name == OLD_CODE) and file.name not in names:
                file.unlink(missing_ok=True)
    shutil.rmtree(complete)


__all__ = ["CONFIG", "OLD_CODE", "WholeFiles", "check_folder", "digest_in_config", "readable_source"]
