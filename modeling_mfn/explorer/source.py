"""Model and atlas that are explored: a folder, or what the pages need of a repository on the Hub."""

from __future__ import annotations

from pathlib import Path

from ..features.atlas import FeatureAtlas
from ..features.atlas.storage import AtlasNotFoundError
from ..model.whole_files import readable_source

NEEDED = ("config.json", "features/*", "training_record.json", "evaluation.json")
"""Files of a repository that the pages show. Weights are not among them."""


def find_model(model: str) -> Path:
    """Returns the folder of a model. Of a repository on the Hub only `NEEDED` is downloaded, without the weights.

    Raises:
        OSError: If there is no such folder or repository.
    """
    if Path(model).is_dir():
        return Path(model)
    from huggingface_hub import snapshot_download

    with readable_source(model):
        return Path(snapshot_download(model, allow_patterns=list(NEEDED)))


def find_atlas(model: str, folder: Path, atlas: str | None = None) -> FeatureAtlas:
    """Reads the atlas that is explored.

    Args:
        model: Folder or repository of the model, for the error.
        folder: Folder of the model.
        atlas: Folder or repository of another atlas of the model's features.

    Raises:
        ValueError: If there is no atlas. The message has the command that makes one.
    """
    try:
        return FeatureAtlas.from_pretrained(atlas or folder)
    except AtlasNotFoundError as error:
        if atlas is not None:
            raise
        if Path(model).is_dir():
            how = f"mfn atlas {model} --text TEXT"
        else:
            how = f"mfn atlas {model} FOLDER --text TEXT, and then mfn explore {model} --atlas FOLDER"
        raise ValueError(f"{model} has no atlas of its features; this makes one: {how}") from error


__all__ = ["find_atlas", "find_model"]
