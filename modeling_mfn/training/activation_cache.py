"""Cached residual streams, and MFN layers trained on them: the backbone reads the text once for any number of passes.

    cache = ActivationCache.write(model, windows, "cache")
    MFNTrainer(CachedResiduals(model), arguments, train_dataset=cache).train()  # with alpha_end=0, lambda_util=0

At alpha 0, with a frozen backbone and without dropout, this equals training inside the whole model.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..model.configuration_mfn import MFNConfig
from ..model.families import family_of
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.mfn_layer import MFNLayer
from ..model.mfn_pass import MFNPass, ReconstructionRequest
from ..model.model_outputs import MFNModelOutput
from ..model.modes import as_base
from ..model.twins import check_has_features
from ..utils.files import allocate, read_json, write_whole
from ..utils.readers import readable

DESCRIPTION = "activations.json"
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids")
"""Columns of the windows that the model takes."""
KEPT_COLUMNS = ("input_ids", "attention_mask")
"""Columns of the windows that are kept in the cache."""

SAMPLED = 16
"""Windows of an array that its digest is made of."""


class ResidualsTooLarge(ValueError):
    """Residual streams that do not fit into the dtype of a cache."""


@dataclass
class _Description:
    """Content of `activations.json`."""

    layers: list[int]
    columns: list[Literal["input_ids", "attention_mask"]] = field(default_factory=lambda: ["input_ids"])
    digests: dict[str, str] = field(default_factory=dict)
    """Digest of each array; a cache of an earlier version has none."""


def _open(file: Path, dimensions: int, digests: Mapping[str, str]) -> np.ndarray:
    """Opens an array on disk."""
    with readable(file):
        array: np.ndarray = np.load(file, mmap_mode="r")
        if array.ndim != dimensions or array.dtype.kind not in "if":
            raise ValueError(f"it has {array.ndim} dimensions of {array.dtype}; there must be {dimensions}, of numbers")
        if digests.get(file.stem, own := _digest(array)) != own:
            raise ValueError(f"it is not the file that {DESCRIPTION} was written with; write the cache again")
    return array


def _digest(array: np.ndarray) -> str:
    """Digest of type, shape and some windows of an array: whole arrays are too large to be read at each opening."""
    windows = np.ascontiguousarray(array[:: max(len(array) // SAMPLED, 1)])
    return f"{array.dtype} {array.shape} {zlib.crc32(windows.data):08x}"


class ActivationCache(torch.utils.data.Dataset):
    """Residual streams (T, d) as each MFN layer reads them in windows of text, one memory-mapped file per layer.

    A row has `input_ids` (T,), `residuals` (L, T, d) in the order of `layers`, and `attention_mask` (T,) if the windows
    had one. [`CachedResiduals`] takes these rows.

    Raises:
        ValueError: The folder has no cache, one of its files is damaged, or its description names anything but a
            cache's own files.
    """

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        description = read_json(folder / DESCRIPTION, _Description)
        if description is None:
            raise ValueError(f"{folder} holds no cached activations: it has no {DESCRIPTION}")
        self.layers = description.layers
        self._columns = {name: _open(folder / f"{name}.npy", 2, description.digests) for name in description.columns}
        self._residuals = [_open(folder / f"layer_{at}.npy", 3, description.digests) for at in self.layers]
        shapes = {file.shape[:2] for file in (*self._columns.values(), *self._residuals)}
        if len(shapes) > 1 or not self._residuals or "input_ids" not in self._columns:
            raise ValueError(
                f"{folder} has the layers {self.layers} and the columns {description.columns} of windows "
                f"{sorted(shapes)}; there must be a layer and input_ids, all of the same windows"
            )

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
        """Runs the model at alpha = 0 over windows of text and stores the input of each MFN layer.

        The model runs only up to its last MFN layer. Residual streams at padding are stored as 0. If writing is
        interrupted, no cache is left in the folder, not even an older one.

        Args:
            model: Model whose MFN layers will be trained.
            windows: Windows of T tokens each, with `input_ids` and optionally `attention_mask` and `position_ids`.
            folder: Folder of the cache.
            batch_size: Windows per forward pass.
            dtype: Type of the stored numbers. The default is float16, which takes L x d x 2 bytes per token. If numbers
                are above its limit of 65,504, writing starts again in float32.

        Raises:
            ValueError: The data set is streamed, the windows differ in length, or a given dtype is too small.
            OSError: The disk has too little space for the whole cache. No part of it is written then.
        """
        check_has_features(model)
        if not hasattr(windows, "__len__"):
            raise ValueError(
                f"windows is of type {type(windows).__name__}, whose length is not known; a cache is made of a data "
                "set that is not streamed"
            )
        if not len(windows):
            raise ValueError("the data set has no windows; a cache needs some")
        if dtype is None:
            try:
                return cls.write(model, windows, folder, batch_size, "float16")
            except ResidualsTooLarge:
                return cls.write(model, windows, folder, batch_size, "float32")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / DESCRIPTION).unlink(missing_ok=True)  # without a description nothing loads: it is written last
        columns, residuals = _new_files(model.config, windows, folder, dtype)
        with as_base(model), _without_blocks_above(model), _residuals(model) as read:
            for start in tqdm(range(0, len(windows), batch_size), "caching activations", unit="batch", leave=False):
                batch = slice(start, start + batch_size)
                inputs = _inputs(windows[batch], columns["input_ids"].shape[1], model.device)
                model.model(**inputs, use_cache=False)
                for name, file in columns.items():
                    file[batch] = inputs[name].cpu().numpy()
                padding = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])) == 0
                for layer, file in residuals.items():
                    file[batch] = _as_stored(read[layer], padding, layer, dtype)
        for file in (*columns.values(), *residuals.values()):
            file.flush()
        digests = {name: _digest(file) for name, file in columns.items()}
        digests |= {f"layer_{layer}": _digest(file) for layer, file in residuals.items()}
        description = {"layers": model.config.layers, "columns": list(columns), "digests": digests}
        write_whole(folder / DESCRIPTION, json.dumps(description) + "\n")
        return cls(folder)


def _new_files(
    config: MFNConfig, windows: Dataset, folder: Path, dtype: str
) -> tuple[dict[str, np.memmap], dict[int, np.memmap]]:
    """Opens a file per kept column, and one per MFN layer."""
    shape = (len(windows), len(windows[0]["input_ids"]))
    made: list[Path] = []

    def new(name: str, kind: str, shape: tuple[int, ...]) -> np.memmap:
        made.append(folder / f"{name}.npy")
        mapped = np.lib.format.open_memmap(made[-1], "w+", np.dtype(kind), shape)
        with open(made[-1], "r+b") as file:  # a map of a file without space would kill the process when it is written
            allocate(file.fileno(), made[-1].stat().st_size)
        return mapped

    try:
        columns = {name: new(name, "int32", shape) for name in KEPT_COLUMNS if name in windows[0]}
        return columns, {layer: new(f"layer_{layer}", dtype, (*shape, config.hidden_size)) for layer in config.layers}
    except OSError as error:
        for file in made:
            file.unlink(missing_ok=True)
        size = np.prod(shape) * config.hidden_size * np.dtype(dtype).itemsize * len(config.layers)
        raise OSError(f"{folder} cannot take {size:,} bytes of residual streams: {error.strerror}") from error


def _inputs(windows: Mapping[str, Sequence[Any]], length: int, device: torch.device) -> dict[str, Tensor]:
    """Returns the model's inputs, (B, T) each, from B windows that must all have T tokens."""
    columns = {name: windows[name] for name in MODEL_INPUTS if name in windows}
    for row in chain.from_iterable(columns.values()):
        if len(row) != length:
            raise ValueError(
                f"a window has {len(row)} tokens and the first one {length}; windows of a cache must all "
                "be of one length, with padding under an attention_mask where texts are shorter"
            )
    return {name: torch.as_tensor(rows, dtype=torch.long, device=device) for name, rows in columns.items()}


def _as_stored(residual: Tensor, padding: Tensor, layer: int, dtype: str) -> np.ndarray:
    """Returns residual streams (B, T, d) in the dtype of the cache, 0 at padding (B, T)."""
    given = residual.float().masked_fill(padding[..., None], 0).cpu().numpy()
    if not np.isfinite(given).all():
        raise ValueError(f"residuals of block {layer} are not finite; a weight is not, or is far too large")
    with np.errstate(over="ignore"):  # the check below reports it
        stored = given.astype(dtype)
    if not np.isfinite(stored).all():
        raise ResidualsTooLarge(f'residuals of block {layer} are too large for {dtype}; use dtype="float32"')
    return stored


@contextmanager
def _without_blocks_above(model: MFNForCausalLM) -> Iterator[None]:
    """Removes the blocks above the last MFN layer for a moment."""
    backbone, name = model.model.backbone, family_of(model.config.text_config).blocks
    blocks = getattr(backbone, name)
    setattr(backbone, name, blocks[: model.config.layers[-1] + 1])
    try:
        yield
    finally:
        setattr(backbone, name, blocks)


@contextmanager
def _residuals(model: MFNForCausalLM) -> Iterator[dict[int, Tensor]]:
    """Yields layer -> what it codes (B, T, d) in the last forward. At alpha 0, layers have an input, too."""
    found: dict[int, Tensor] = {}

    def hook(number: int) -> Callable[..., None]:
        return lambda layer, arguments: found.update({number: layer.coded_part(*arguments)})

    handles = [layer.register_forward_pre_hook(hook(number)) for number, layer in model.mfn_layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


class CachedResiduals(nn.Module):
    """Wraps the MFN layers of a model so that `MFNTrainer` trains them on an [`ActivationCache`].

    The layers are shared with the model. After training, the model has what they learned.
    """

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
        """Reconstructs cached residual streams (B, L, T, d) with each MFN layer.

        `input_ids` and `attention_mask` are accepted because rows of the cache have them. They change nothing here; the
        losses of the Trainer read the mask.
        """
        mfn_pass = MFNPass(reconstructions={}, request=reconstruction_request)
        for place, layer in enumerate(self.mfn_layers.values()):
            layer(residuals[:, place].to(layer.encoder.weight.dtype), mfn_pass)
        return MFNModelOutput(reconstructions=mfn_pass.reconstructions)


__all__ = ["ActivationCache", "CachedResiduals"]
