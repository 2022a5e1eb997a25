"""Names of a model and its layers for others: without local paths, and in the form that Neuronpedia asks for."""

from __future__ import annotations

import os
import re
from pathlib import Path

SOURCE_SET = "mfn"
"""Name that Neuronpedia has for the set of a model's MFN layers."""


def public_name(name_or_path: str | None) -> str | None:
    """Id of a model on the Hub, or a folder's own name. Atlases and explanations are shared, so they name no path."""
    name = str(name_or_path or "")
    return (Path(name).absolute().name if os.path.isdir(name) or Path(name).is_absolute() else name) or None


def neuronpedia_model(name: str | None) -> str:
    """Id of a model in Neuronpedia: the name without its owner, in small letters, digits, `-` and `_`."""
    return re.sub(r"[^a-z0-9_-]+", "-", (name or "").rpartition("/")[2].lower()).strip("-") or "unnamed"


def neuronpedia_source(layer: int) -> str:
    """Id of a block's MFN layer in Neuronpedia, `6-mfn`."""
    return f"{layer}-{SOURCE_SET}"


__all__ = ["SOURCE_SET", "neuronpedia_model", "neuronpedia_source", "public_name"]
