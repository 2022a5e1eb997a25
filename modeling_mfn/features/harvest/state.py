"""State of a harvest: everything gathered so far, in a form that is saved, resumed and merged."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch
from accelerate.utils import broadcast

from ...utils.files import write_whole
from ...utils.processes import join_processes, wait_for_processes
from ...utils.readers import parse_json, readable
from ..atlas.records import ExampleLimits
from ..atlas.schema import HARVEST_FILES
from .firings import TokenBatch
from .statistics import LayerStatistics

MAX_SOURCES = 256
"""Largest number of different values in the column `source`; each takes one count per feature."""
RESUME_OR_BEGIN = "resume it with the settings and data that it was begun with, or begin it anew (--overwrite)"
"""End of the messages about a state of another harvest."""


@dataclass
class _Progress:
    """Progress of a harvest."""

    sources: list[tuple[str | None, int]]
    windows: int
    batches: int
    digest: str


class HarvestState:
    """Statistics of all layers, tokens of each source, and the progress of the harvest."""

    def __init__(self, layers: list[int], num_features: int, limits: ExampleLimits, window: int) -> None:
        self.layers = {layer: LayerStatistics(num_features, limits) for layer in layers}
        self.num_features = num_features
        self.limits = limits
        self.window = window
        """T, tokens per window."""
        self.sources: dict[str | None, int] = {}
        """Name of each source -> its counted tokens, in the order in which sources appeared."""
        self.windows = 0
        """Windows that were counted by this process."""
        self.batches = 0
        """Batches of the whole data set that this process has passed, those of other processes included."""
        self.digest = ""
        """Digest of the windows in the batches passed."""

    @property
    def tokens(self) -> int:
        """Tokens counted so far."""
        return sum(self.sources.values())

    def source_places(self, names: list[str | None]) -> np.ndarray:
        """Places of sources in the list of sources, (B,) int32; new ones are appended.

        Raises:
            ValueError: If there are more than `MAX_SOURCES` sources.
        """
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
        """Adds a batch.

        Args:
            batch: B windows of T tokens.
            codes: Layer -> indices and values of its code, (B T, K) each.
            scales: Layer -> (B T,) scale of each token, as `recording_scales` records it.

        Raises:
            ValueError: If an activation is not finite.
        """
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
        """Adds the state of a harvest of other windows."""
        names = list(dict.fromkeys([*self.sources, *other.sources]))
        self._order_sources(names)
        other._order_sources(names)
        for name, tokens in other.sources.items():
            self.sources[name] += tokens
        for layer, statistics in self.layers.items():
            statistics.merge(other.layers[layer])
        self.windows += other.windows

    def sort_sources(self) -> None:
        """Sorts sources by name, so that their order does not depend on the order of the data."""
        self._order_sources(sorted(self.sources, key=lambda name: name or ""))

    def _order_sources(self, names: list[str | None]) -> None:
        places = np.array([names.index(name) for name in self.sources], np.int64)
        for statistics in self.layers.values():
            statistics.expect_sources(len(self.sources))
            statistics.reorder_sources(places)
            statistics.expect_sources(len(names))
        self.sources = {name: self.sources.get(name, 0) for name in names}

    def to_bytes(self, settings: Mapping[str, Any]) -> bytes:
        """Everything in the format of safetensors, with the settings of the harvest as metadata."""
        arrays = {
            f"{layer}.{name}": np.ascontiguousarray(array)
            for layer, statistics in self.layers.items()
            for name, array in statistics.arrays().items()
        }
        progress = {"sources": list(self.sources.items()), "windows": self.windows}
        progress |= {"batches": self.batches, "digest": self.digest}
        arrays["progress"] = np.frombuffer(json.dumps(progress).encode(), np.uint8)
        arrays["checksum"] = _checksum(arrays)
        return safetensors.numpy.save(arrays, {"settings": json.dumps(settings)})

    def restore(self, data: bytes) -> None:
        """Replaces everything by the content of `to_bytes`; `ValueError` if that was changed since."""
        arrays = safetensors.numpy.load(data)
        if not np.array_equal(arrays.pop("checksum", None), _checksum(arrays)):
            raise ValueError("its numbers are not those that were saved")
        progress = parse_json(arrays.pop("progress").tobytes(), _Progress)
        self.sources = dict(progress.sources)
        self.windows, self.batches, self.digest = progress.windows, progress.batches, progress.digest
        for layer, statistics in self.layers.items():
            own = {n.partition(".")[2]: a for n, a in arrays.items() if n.partition(".")[0] == str(layer)}
            statistics.restore(own)

    def save(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Writes the state to a file; if writing is interrupted, the earlier file stays."""
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, self.to_bytes(settings))

    def load(self, file: Path, settings: Mapping[str, Any]) -> None:
        """Reads a file that `save` wrote.

        Raises:
            ValueError: If the file is damaged, or its harvest had other settings.
        """
        with readable(file), safetensors.safe_open(file, "np") as opened:
            found = parse_json(opened.metadata()["settings"], dict[str, Any])
        for name, value in settings.items():
            if found.get(name) != value:
                raise ValueError(
                    f"the harvest in {file.parent} had {name} {found.get(name)}, this one has {value}; "
                    f"{RESUME_OR_BEGIN}"
                )
        with readable(file):
            self.restore(file.read_bytes())


def _checksum(arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """CRC-32 of arrays with their names, (1,) uint32."""
    found = 0
    for name in sorted(arrays):
        found = zlib.crc32(np.ascontiguousarray(arrays[name]).data, zlib.crc32(name.encode(), found))
    return np.array([found], np.uint32)


def own_file(folder: Path, resume: bool) -> Path:
    """File in which this process keeps its state.

    Raises:
        ValueError: If `folder` has a state and `resume` is false, or a state of another number of processes.
    """
    process = join_processes()
    ending = f"-of-{process.num_processes:05d}.safetensors"
    found = sorted(folder.glob(HARVEST_FILES))
    if found and not resume:
        raise ValueError(f"{folder} holds an interrupted harvest; resume it (--resume), or begin it anew (--overwrite)")
    if others := [file for file in found if not file.name.endswith(ending)]:
        processes = int(others[0].stem.rpartition("-")[2])
        raise ValueError(
            f"the harvest in {folder} had {processes} processes, this one has {process.num_processes}; "
            f"{RESUME_OR_BEGIN}"
        )
    # no process may take another's first saved state for an earlier harvest's
    wait_for_processes("the start of the harvest")
    return folder / f"harvest-{process.process_index:05d}{ending}"


def merge_processes(state: HarvestState) -> HarvestState:
    """Merges the states of all processes; every process gets the same result.

    States travel as bytes of safetensors, so that nothing is unpickled.
    """
    process = join_processes()
    if process.num_processes == 1:
        return state
    wait_for_processes("the end of its part of the harvest")
    merged = _empty_like(state)
    for rank in range(process.num_processes):
        data = state.to_bytes({}) if rank == process.process_index else b""
        length = broadcast(torch.tensor([len(data)], device=process.device), rank)
        payload = torch.empty(int(length), dtype=torch.uint8, device=process.device)
        if data:
            payload.copy_(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        other = _empty_like(state)
        other.restore(broadcast(payload, rank).cpu().numpy().tobytes())
        merged.merge(other)
    return merged


def _empty_like(state: HarvestState) -> HarvestState:
    return HarvestState(list(state.layers), state.num_features, state.limits, state.window)


__all__ = ["MAX_SOURCES", "RESUME_OR_BEGIN", "HarvestState", "merge_processes", "own_file"]
