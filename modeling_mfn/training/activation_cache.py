"""MFN layers trained on cached residual streams: the backbone runs over the text once, however long they train.

    cache = ActivationCache.write(model, windows, "cache")
    MFNTrainer(CachedResiduals(model), arguments, train_dataset=cache).train()  # with alpha_end=0, lambda_util=0

While alpha is 0 and the backbone frozen, without dropout, this is a training through the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.configuration_mfn import MFNConfig
from ..model.families import family_of
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import MFNPass, ReconstructionRequest
from ..model.modeling_mfn import MFNForCausalLM, MFNModelOutput
from ..model.modes import as_base

DESCRIPTION = "activations.json"
READ = ("input_ids", "attention_mask", "position_ids")
"""Columns of windows that the model is run on."""


class ResidualsTooLarge(ValueError):
    """For the numbers of a cache."""


class ActivationCache(torch.utils.data.Dataset):
    """The residual streams (T, d) that each MFN layer read in windows of text, one memory-mapped file a layer.

    Rows are what [`CachedResiduals`] takes: `input_ids` (T,), `residuals` (L, T, d), in the order of `layers`, and
    `attention_mask` (T,) where the windows had one.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / DESCRIPTION).exists():
            raise ValueError(f"{folder} holds no cached activations: it has no {DESCRIPTION}")
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.layers: list[int] = description["layers"]
        columns = description.get("columns", ["input_ids"])
        self._columns = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in columns}
        self._residuals = [np.load(folder / f"layer_{layer}.npy", mmap_mode="r") for layer in self.layers]

    def __len__(self) -> int:
        return len(self._columns["input_ids"])

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        residuals = torch.from_numpy(np.stack([file[row] for file in self._residuals]))
        return {name: torch.tensor(file[row]) for name, file in self._columns.items()} | {"residuals": residuals}

    @classmethod
    @torch.no_grad()
    def write(
        cls,
        model: MFNForCausalLM,
        windows: Dataset,
        folder: str | Path,
        batch_size: int = 8,
        dtype: str | None = None,
    ) -> ActivationCache:
        """Runs the model at alpha = 0, up to its last MFN layer, over windows of tokens, (T,) each, and keeps what its
        MFN layers read. Windows have `input_ids`, and `attention_mask` and `position_ids` where the model shall have
        them; at padding the residual streams are kept as 0.

        `dtype` is float16 by default, L x d x 2 bytes a token; where residual streams are too large for it (its largest
        number is 65,504) the writing starts again in float32. A dtype that is given and too small is a `ValueError`. A
        writing that is broken off leaves no cache, also none that was there before. So is a data set that is streamed,
        or whose windows are not all of one length.
        """
        if not hasattr(windows, "__len__"):
            raise ValueError(
                f"windows is of type {type(windows).__name__}, whose length is not known; a cache is made of a data "
                "set that is not streamed"
            )
        if dtype is None:
            try:
                return cls.write(model, windows, folder, batch_size, "float16")
            except ResidualsTooLarge:
                return cls.write(model, windows, folder, batch_size, "float32")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)  # an older cache's; it comes last, so that no half of one loads
        layers, rows, length = model.config.layers, len(windows), len(windows[0]["input_ids"])
        shape = (rows, length, model.config.hidden_size)
        columns = {
            name: np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(np.int32), shape[:2])
            for name in ("input_ids", "attention_mask")
            if name in windows[0]
        }
        files = [
            np.lib.format.open_memmap(folder / f"layer_{layer}.npy", "w+", np.dtype(dtype), shape) for layer in layers
        ]
        with as_base(model), _without_blocks_above(model), _residuals(model) as found:
            for start in tqdm(range(0, rows, batch_size), "caching activations", unit="batch", leave=False):
                batch = slice(start, start + batch_size)
                texts = windows[batch]
                inputs = {name: _of_one_length(texts[name], length).to(model.device) for name in READ if name in texts}
                for name, column in columns.items():
                    column[batch] = inputs[name].cpu().numpy()
                padding = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) == 0
                model.model(**inputs, use_cache=False)
                for file, layer in zip(files, layers, strict=True):
                    with np.errstate(over="ignore"):  # an infinity says as much
                        read = found[layer].float().masked_fill(padding[..., None], 0)
                        residual = read.cpu().numpy().astype(dtype)
                    if not np.isfinite(residual).all():
                        raise ResidualsTooLarge(
                            f'residuals of block {layer} are too large for {dtype}; use dtype="float32"'
                        )
                    file[batch] = residual
        for file in (*columns.values(), *files):
            file.flush()
        description = {"layers": layers, "columns": list(columns)}
        (folder / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
        return cls(folder)


def _of_one_length(rows: Sequence[Any], length: int) -> Tensor:
    """(B, T) of B rows, each of T numbers."""
    for row in rows:
        if len(row) != length:
            raise ValueError(
                f"a window has {len(row)} tokens and the first one {length}; those of a cache are all of one length, "
                "padded under an attention_mask where texts are shorter"
            )
    return torch.as_tensor(rows, dtype=torch.long)


@contextmanager
def _without_blocks_above(model: MFNForCausalLM) -> Iterator[None]:
    """The model up to its last MFN layer."""
    backbone, name = model.model.backbone, family_of(model.config.text_config).blocks
    blocks = getattr(backbone, name)
    setattr(backbone, name, blocks[: model.config.layers[-1] + 1])
    try:
        yield
    finally:
        setattr(backbone, name, blocks)


@contextmanager
def _residuals(model: MFNForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Layer -> what it read in the last forward, whether or not it made anything of it."""
    found: dict[int, Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        return lambda layer, arguments: found.update({number: arguments[0]})

    handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in model.mfn_layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class CachedResiduals(nn.Module):
    """The MFN layers of a model, in its place for `MFNTrainer`: they read residual streams from an
    [`ActivationCache`]. The layers are the model's own, so that it has learnt what they have."""

    def __init__(self, model: MFNForCausalLM) -> None:
        super().__init__()
        self.config: MFNConfig = model.config
        self.blocks = nn.ModuleDict({str(n): nn.ModuleDict({"mfn": layer}) for n, layer in model.mfn_layers.items()})
        self.set_blend, self.set_k = model.set_blend, model.set_k

    @property
    def mfn_layers(self) -> dict[int, MFNLayer]:
        """MFN layers by block index, shared with the model."""
        return {int(number): block.get_submodule("mfn") for number, block in self.blocks.items()}  # type: ignore[misc]

    def forward(
        self,
        residuals: Tensor,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        reconstruction_request: ReconstructionRequest | None = None,
        **kwargs: Any,
    ) -> MFNModelOutput:
        """(B, L, T, d) residual streams -> each layer's reconstruction. Other arguments are those that the whole model
        would take, and mean nothing here; the Trainer brings a mask to its losses if it is one of them."""
        mfn_pass = MFNPass(reconstructions={}, request=reconstruction_request)
        for place, layer in enumerate(self.mfn_layers.values()):
            layer(residuals[:, place].to(layer.encoder.weight.dtype), mfn_pass)
        return MFNModelOutput(reconstructions=mfn_pass.reconstructions)


__all__ = ["ActivationCache", "CachedResiduals"]
