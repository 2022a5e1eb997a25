"""Digests of weights: which weights a config, an atlas and measured figures belong to.

A digest is made of the name, type, shape and CRC-32 of each tensor. It is the same for one file and for shards.
Weights are read once for it, by all cores: 2 GB per second and core, while a disk reads less.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
DIGITS = 16


def digest_of_folder(folder: Path) -> str | None:
    """Returns the digest of the weights that are loaded from a folder; `None` if not all are there, in safetensors."""
    files = weight_files(folder)
    if not all(map(Path.is_file, files)):
        return None  # loading names the file that is missing
    opened = [safe_open(file, framework="pt") for file in files]
    tensors = {name: file.get_tensor for file in opened for name in file.keys()}  # noqa: SIM118
    return _digest(tensors) if tensors else None


def digest_of_model(model: Any) -> str | None:
    """Returns the digest that the model's weights will have when they are saved; `None` if some are not in memory."""
    tied = model.all_tied_weights_keys
    tensors = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    if any(type(tensor) is not Tensor or tensor.is_meta for tensor in tensors.values()):
        return None
    return _digest(dict.fromkeys(tensors, tensors.__getitem__))


def weight_files(folder: Path) -> list[Path]:
    """Returns the files of weights in the order in which transformers looks for them; [] if there are none.

    Raises:
        ValueError: If the index of the shards is damaged.
    """
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if not (folder / INDEX).is_file():
        return []
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        return [folder / Path(name).name for name in sorted(names)]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ValueError(f"{folder / INDEX} is damaged: {error!r}") from error


def _digest(tensors: dict[str, Callable[[str], Tensor]]) -> str:
    def line(name: str) -> tuple[str, str, list[int], int]:
        tensor = tensors[name](name)
        content = tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy()
        return name, str(tensor.dtype), list(tensor.shape), zlib.crc32(content.data)

    with ThreadPoolExecutor() as pool:
        lines = list(pool.map(line, sorted(tensors)))
    return hashlib.sha256(json.dumps(lines).encode()).hexdigest()[:DIGITS]


__all__ = ["INDEX", "WEIGHTS", "digest_of_folder", "digest_of_model", "weight_files"]
