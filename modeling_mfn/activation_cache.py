"""MFN layers trained on cached residual streams: the backbone runs over the text once, however long they train.

    cache = ActivationCache.write(model, windows, "cache")
    MFNTrainer(CachedResiduals(model), arguments, train_dataset=cache).train()  # with alpha_end=0, lambda_util=0

While alpha is 0 and the backbone frozen, without dropout, this is a training through the whole model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from .configuration_mfn import MFNConfig
from .conversion import as_base
from .mfn_layer import MFNLayer, MFNPass, ReconstructionRequest
from .modeling_mfn import MFNForCausalLM, MFNModelOutput, family_of

DESCRIPTION = "activations.json"


class ResidualsTooLarge(ValueError):
    """For the numbers of a cache."""


class ActivationCache(torch.utils.data.Dataset):
    """The residual streams (T, d) that each MFN layer read in windows of text, one memory-mapped file a layer.

    Rows are what [`CachedResiduals`] takes: `input_ids` (T,) and `residuals` (L, T, d), in the order of `layers`.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        if not (folder / DESCRIPTION).exists():
            raise ValueError(f"{folder} holds no cached activations: it has no {DESCRIPTION}")
        description = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        self.layers: list[int] = description["layers"]
        self._tokens = np.load(folder / "input_ids.npy", mmap_mode="r")
        self._residuals = [np.load(folder / f"layer_{layer}.npy", mmap_mode="r") for layer in self.layers]

    def __len__(self) -> int:
        return len(self._tokens)

    def __getitem__(self, row: int) -> dict[str, Tensor]:
        residuals = np.stack([file[row] for file in self._residuals])
        return {"input_ids": torch.tensor(self._tokens[row]), "residuals": torch.from_numpy(residuals)}

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
        MFN layers read.

        `dtype` is float16 by default, L x d x 2 bytes a token; where residual streams are too large for it (its largest
        number is 65,504) the writing starts again in float32. A dtype that is given and too small is a `ValueError`. A
        writing that is broken off leaves no cache, also none that was there before.
        """
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
        ids = np.lib.format.open_memmap(folder / "input_ids.npy", "w+", np.dtype(np.int32), shape[:2])
        files = [
            np.lib.format.open_memmap(folder / f"layer_{layer}.npy", "w+", np.dtype(dtype), shape) for layer in layers
        ]
        with as_base(model), _without_blocks_above(model):
            for start in tqdm(range(0, rows, batch_size), "caching activations", unit="batch", leave=False):
                batch = slice(start, start + batch_size)
                ids[batch] = windows[batch]["input_ids"]
                tokens = torch.tensor(ids[batch], dtype=torch.long, device=model.device)
                found = model.model(input_ids=tokens, output_reconstructions=True, use_cache=False).reconstructions
                for file, layer in zip(files, layers, strict=True):
                    with np.errstate(over="ignore"):  # an infinity says as much
                        residual = found[layer].residual.float().cpu().numpy().astype(dtype)
                    if not np.isfinite(residual).all():
                        raise ResidualsTooLarge(
                            f'residuals of block {layer} are too large for {dtype}; use dtype="float32"'
                        )
                    file[batch] = residual
        for file in (ids, *files):
            file.flush()
        (folder / DESCRIPTION).write_text(json.dumps({"layers": layers}) + "\n", encoding="utf-8")
        return cls(folder)


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


class CachedResiduals(nn.Module):
    """The MFN layers of a model, in its place for `MFNTrainer`: they read residual streams from an
    [`ActivationCache`]. The layers are the model's own, so that it has learnt what they have."""

    def __init__(self, model: MFNForCausalLM) -> None:
        super().__init__()
        self.config: MFNConfig = model.config
        # parameters by names that contain ".mfn.", like those of the whole model
        self.blocks = nn.ModuleDict({str(n): nn.ModuleDict({"mfn": layer}) for n, layer in model.mfn_layers.items()})
        self.set_blend, self.set_k = model.set_blend, model.set_k

    @property
    def mfn_layers(self) -> dict[int, MFNLayer]:
        """As the model's own."""
        return {int(number): block.get_submodule("mfn") for number, block in self.blocks.items()}  # type: ignore[misc]

    def forward(
        self,
        residuals: Tensor,
        input_ids: Tensor | None = None,
        output_reconstructions: bool | ReconstructionRequest = True,
        **kwargs: Any,
    ) -> MFNModelOutput:
        """(B, L, T, d) residual streams -> each layer's reconstruction. Other arguments are those that the whole model
        would take, and mean nothing here."""
        request = output_reconstructions if isinstance(output_reconstructions, ReconstructionRequest) else None
        mfn_pass = MFNPass({}, None, {}, request)
        for place, layer in enumerate(self.mfn_layers.values()):
            layer(residuals[:, place].to(layer.encoder.weight.dtype), mfn_pass)
        return MFNModelOutput(reconstructions=mfn_pass.reconstructions)


__all__ = ["ActivationCache", "CachedResiduals"]
