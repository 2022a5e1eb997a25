"""Sparse autoencoders (SAEs) in the terms of an MFN layer: z = TopK(ReLU(W_e x + b_e), k), x_hat = D z + b."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

from ..utils.files import read_json
from ..utils.readers import readable

CONFIG = "cfg.json"
"""File of settings in an SAE's folder, of SAELens and of sparsify."""
DTYPES = {
    str(dtype).removeprefix("torch."): dtype for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16)
}
"""Precisions of weights by name."""


class Weights(NamedTuple):
    """Weights of an SAE. x is the residual stream, or with `input_norm="layer"` the standardised stream."""

    encoder: Tensor
    """W_e, (m, d)."""
    encoder_bias: Tensor
    """b_e, (m,)."""
    directions: Tensor
    """D, (m, d), a feature per row."""
    bias: Tensor
    """b, (d,)."""

    def read_from_plain(self) -> Weights:
        """Returns the encoder of x that equals this encoder of x - b: its bias is b_e - W_e b."""
        return self._with_bias_moved(-1)

    def read_from_centred(self) -> Weights:
        """Returns the encoder of x - b that equals this encoder of x: its bias is b_e + W_e b."""
        return self._with_bias_moved(1)

    def _with_bias_moved(self, sign: int) -> Weights:
        moved = self.encoder_bias.double() + sign * (self.encoder.double() @ self.bias.double())
        return self._replace(encoder_bias=moved)

    def with_unit_directions(self) -> Weights:
        """Returns the same reconstruction by directions of unit norm, whose norms the activations take over."""
        norms = self.directions.double().norm(dim=-1)
        return Weights(
            self.encoder.double() * norms.unsqueeze(-1),
            self.encoder_bias.double() * norms,
            F.normalize(self.directions.double(), dim=-1),
            self.bias,
        )


@dataclass(frozen=True)
class StoredSAE:
    """An SAE of another package on the disk. Its settings are read and checked, its weights are read later."""

    source: str
    """File, folder or release, for messages."""
    d_in: int
    num_features: int
    k: int | None
    """Active features per token; `None` for a ReLU, which has no such limit."""
    input_norm: str
    """`input_norm` of the MFN layer that it is."""
    hook: str | None
    """Name of the place in the model that it was trained at; `None` if no file says it."""
    read: Callable[[], Weights]
    """Function that reads the weights and brings them to the form of an MFN layer."""
    model_name: str | None = None
    """Name of the model that it was trained on; `None` if no file says it."""


def read_settings(folder: Path) -> dict[str, Any]:
    """Reads the file of settings in an SAE's folder.

    Raises:
        ValueError: If it is not there or is damaged.
    """
    written = read_json(folder / CONFIG, dict[str, Any])
    if written is None:
        raise ValueError(f"{folder} has no {CONFIG}")
    return written


def read_tensors(
    file: Path, shapes: Mapping[str, tuple[int, ...]], optional: Mapping[str, tuple[int, ...]] | None = None
) -> dict[str, Tensor]:
    """Reads exactly these tensors from a safetensors file, and those of `optional` that are there.

    Raises:
        ValueError: If the file is damaged, or has other names or shapes.
    """
    with readable(file), safe_open(file, framework="pt") as opened:
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        check_tensors(tensors, {**shapes, **{name: of for name, of in (optional or {}).items() if name in tensors}})
    return tensors


def check_tensors(tensors: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises `ValueError` unless tensors have these names and shapes, and floating-point numbers."""
    if missing := sorted(set(shapes) - set(tensors)):
        raise ValueError(f"tensor {missing[0]} is missing")
    if unknown := sorted(set(tensors) - set(shapes)):
        raise ValueError(f"tensor {unknown[0]} is unknown, and may change the function")
    for name, shape in shapes.items():
        tensor = tensors[name]
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"{name} is {found}; it must be a floating-point tensor of shape {shape}")


__all__ = ["CONFIG", "DTYPES", "StoredSAE", "Weights", "check_tensors", "read_settings", "read_tensors"]
