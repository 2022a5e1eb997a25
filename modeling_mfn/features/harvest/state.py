"""What a harvest has gathered so far, as one object that is saved, resumed from, and merged with that of others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
import torch.distributed as dist

from ...utils.files import write_whole
from ...utils.processes import process_index, world_size
from .firings import TokenBatch
from .statistics import ExampleLimits, LayerStatistics

MAX_SOURCES = 256
"""Different values of the column `source`, each of which takes a count a feature."""
RESUME_OR_BEGIN = "resume it with what it was begun with, or begin it anew (--overwrite)"
"""How the message ends where a state is another harvest's."""


class HarvestState:
    """The statistics of all layers, the tokens of each source, and how far the harvest is."""

    def __init__(self, layers: list[int], num_features: int, limits: ExampleLimits, window: int) -> None:
        self.layers = {layer: LayerStatistics(num_features, limits) for layer in layers}
        self.num_features = num_features
        self.limits = limits
        self.window = window
        """T, tokens a window."""
        self.sources: dict[str | None, int] = {}
        """Name of each source -> its counted tokens, in the order in which they came."""
        self.windows = 0
        self.batches = 0
        """Of the whole data set, those of other processes too, that this one is past."""
        self.digest = ""
        """Of the windows in these batches."""

    @property
    def tokens(self) -> int:
        """Tokens that were counted."""
        return sum(self.sources.values())

    def source_places(self, names: list[str | None]) -> np.ndarray:
        """The places of sources in the list of them, which new ones join: (B,) int32. `ValueError` if there are more
        than `MAX_SOURCES`."""
        for name in names:
            self.sources.setdefault(name, 0)
        if len(self.sources) > MAX_SOURCES:
            raise ValueError(
                f"column source has more than {MAX_SOURCES} different values; let it name corpora, not documents"
            )
        place = {name: at for at, name in enumerate(self.sources)}
        return np.array([place[name] for name in names], np.int32)

    def add(
        self,
        batch: TokenBatch,
        codes: Mapping[int, tuple[np.ndarray, np.ndarray]],
        scales: Mapping[int, np.ndarray],
    ) -> None:
        """Counts a batch in, of which `codes` are a layer's indices and values (B T, K), and `scales` (B T,) what
        `LayerStatistics.add` says. `ValueError` if an activation is not finite."""
        for layer, (_, values) in codes.items():
            if not np.isfinite(values).all():
                raise ValueError(f"an activation of layer {layer} is not finite; run the model in a wider precision")
        names = list(self.sources)
        for place, counted in zip(batch.sources, batch.counted.sum(1), strict=True):
            self.sources[names[place]] += int(counted)
        for layer, (indices, values) in codes.items():
            self.layers[layer].add(batch, indices, values, scales[layer], len(names))
        self.windows += len(batch.input_ids)

    def merge(self, other: HarvestState) -> None:
        """Adds what was gathered from other windows."""
        names = list(dict.fromkeys([*self.sources, *other.sources]))
        self._order_sources(names)
        other._order_sources(names)
        for name, tokens in other.sources.items():
            self.sources[name] += tokens
        for layer, statistics in self.layers.items():
            statistics.merge(other.layers[layer])
        self.windows += other.windows

    def sort_sources(self) -> None:
        """Puts sources in the order of their names, whatever the order of the data was."""
        self._order_sources(sorted(self.sources, key=lambda name: name or ""))

    def _order_sources(self, names: list[str | None]) -> None:
        places = np.array([names.index(name) for name in self.sources], np.int64)
        for statistics in self.layers.values():
            statistics.expect_sources(len(self.sources))
            statistics.reorder_sources(places)
            statistics.expect_sources(len(names))
        self.sources = {name: self.sources.get(name, 0) for name in names}

    def to_bytes(self, settings: Mapping[str, Any]) -> bytes:
        """All of it in the format of safetensors, with the settings that it was gathered with."""
        arrays = {
            f"{layer}.{name}": np.ascontiguousarray(array)
            for layer, statistics in self.layers.items()
            for name, array in statistics.arrays().items()
        }
        progress = {"sources": list(self.sources.items()), "windows": self.windows}
        progress |= {"batches": self.batches, "digest": self.digest}
        return safetensors.numpy.save(arrays, {"progress": json.dumps(progress), "settings": json.dumps(settings)})

    def restore(self, data: bytes) -> None:
        """Becomes the state whose bytes these are."""
        progress = json.loads(_header(data)["progress"])
        self.sources = dict(progress["sources"])
        self.windows, self.batches, self.digest = (progress[name] for name in ("windows", "batches", "digest"))
        arrays = safetensors.numpy.load(data)
        for layer, statistics in self.layers.items():
            own = {n.partition(".")[2]: a for n, a in arrays.items() if n.partition(".")[0] == str(layer)}
            statistics.restore(own)

    def save(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Writes it beside `file`, then in its place: a process that is killed meanwhile leaves the earlier one."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, self.to_bytes(settings))

    def load(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Reads what `save` wrote; `ValueError` if that was another harvest."""
        try:
            data = file.read_bytes()
            found = json.loads(_header(data)["settings"])
        except (OSError, KeyError, ValueError, safetensors.SafetensorError) as error:
            raise ValueError(f"{file} is no state of a harvest: {error}") from error
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"the harvest in {file.parent} had {name} {found.get(name)}, this one has {value}; "
                    f"{RESUME_OR_BEGIN}"
                )
        self.restore(data)


def own_file(folder: Path, resume: bool) -> Path:
    """The file in which this process keeps its state. `ValueError` if `folder` has a state that is not to be resumed,
    or one of another number of processes."""
    ending = f"-of-{world_size():05d}.safetensors"
    found = sorted(folder.glob("harvest-*-of-*.safetensors"))
    if found and not resume:
        raise ValueError(
            f"{folder} holds a harvest that was broken off; resume it (--resume), or begin it anew (--overwrite)"
        )
    if others := [file for file in found if not file.name.endswith(ending)]:
        processes = int(others[0].stem.rpartition("-")[2])
        raise ValueError(
            f"the harvest in {folder} had {processes} processes, this one has {world_size()}; {RESUME_OR_BEGIN}"
        )
    if world_size() > 1:
        dist.barrier()  # what a process saves from now on is not taken for an earlier harvest's by another
    return folder / f"harvest-{process_index():05d}{ending}"


def _header(data: bytes) -> dict[str, str]:
    """The metadata of bytes in the format of safetensors: 8 bytes of the header's length, then the header, JSON."""
    length = int.from_bytes(data[:8], "little")
    metadata: dict[str, str] = json.loads(data[8 : 8 + length])["__metadata__"]
    return metadata


def merge_processes(state: HarvestState, device: torch.device) -> HarvestState:
    """The states of all processes as one, the same in each of them; as bytes, since nothing is to be unpickled."""
    if world_size() == 1:
        return state
    merged: HarvestState | None = None
    for rank in range(dist.get_world_size()):
        data = state.to_bytes({}) if rank == dist.get_rank() else b""
        length = torch.tensor([len(data)], device=device)
        dist.broadcast(length, rank)
        payload = torch.empty(int(length), dtype=torch.uint8, device=device)
        if data:
            payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        dist.broadcast(payload, rank)
        other = HarvestState(list(state.layers), state.num_features, state.limits, state.window)
        other.restore(payload.cpu().numpy().tobytes())
        if merged is None:
            merged = other
        else:
            merged.merge(other)
    assert merged is not None
    return merged
