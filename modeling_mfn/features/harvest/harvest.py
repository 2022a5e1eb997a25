"""One pass of a model over a data set that gathers what an atlas holds."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from tqdm.auto import tqdm

from ...data.text import TextWindows
from ...data.windows import Columns, column_batches, first_length, padded_inputs, sources_of
from ...model.checks import as_whole, is_whole, shown
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.modes import evaluating
from ...model.version import __version__
from ...utils.processes import join_processes
from ..atlas.records import ExampleLimits
from .directions import recording_scales
from .firings import TOKEN_LIMIT, TokenBatch
from .state import RESUME_OR_BEGIN, HarvestState, merge_processes, own_file

FINGERPRINT_DIGITS = 12


class Skipped(NamedTuple):
    """Tokens of a window that are not counted."""

    first: int
    """Number of tokens at its start."""
    tokens: tuple[int, ...] = ()
    """Token ids, wherever they stand."""

    def counted(self, ids: np.ndarray, attended: np.ndarray) -> np.ndarray:
        """Returns a mask of the tokens that count, from ids and a mask of those that are not padding, (B, T) each."""
        return attended & (attended.cumsum(1) > self.first) & ~np.isin(ids, self.tokens)


class HarvestOptions(NamedTuple):
    """Options of a harvest; `FeatureAtlas.build` describes them."""

    tokens: int | None = None
    batch_size: int = 8
    skip_first: int = 1
    skip_tokens: tuple[int, ...] = ()
    examples: ExampleLimits = ExampleLimits()
    state_folder: Path | None = None
    resume: bool = False
    save_every: int = 2048
    progress: bool = True

    @property
    def skipped(self) -> Skipped:
        """Tokens that are not counted."""
        return Skipped(self.skip_first, self.skip_tokens)

    def check(self) -> None:
        """Raises `ValueError` if a number is too small."""
        given = {name: getattr(self, name) for name in ("tokens", "batch_size", "skip_first", "save_every")}
        given |= {f"examples.{name}": number for name, number in self.examples._asdict().items()}
        may_be_zero = ("skip_first", "examples.before", "examples.after")
        for name, number in given.items():
            least = 0 if name in may_be_zero else 1
            if number is not None or name != "tokens":
                as_whole(name, number, least)
        if not isinstance(self.skip_tokens, Iterable):
            raise ValueError(f"skip_tokens is {shown(self.skip_tokens)}; it must be a list of token ids")
        for token in self.skip_tokens:
            if not is_whole(token) or token < 0:
                raise ValueError(f"skip_tokens has {token!r}; token ids are whole numbers of at least 0")


def harvest(model: MFNForCausalLM, dataset: Any, options: HarvestOptions) -> HarvestState:
    """Gathers the statistics of all features of a model over a data set.

    Process p of P takes every batch whose number is p modulo P. A batch is the same for any number of processes, so
    that the result is the same, bit for bit.
    """
    process = join_processes()
    windows, length = first_length(dataset)
    settings = _settings(model, dataset, length, options)
    state = HarvestState(model.config.layers, model.config.num_features, options.examples, length)
    file = None
    if options.state_folder is not None:
        file = own_file(options.state_folder, options.resume)
        if file.exists():
            state.load(file, settings)
    limit = None if options.tokens is None else -(-options.tokens // length)
    batches = column_batches(windows, length, options.batch_size, limit)
    _skip_counted(state, batches, options.state_folder)
    bar = tqdm(
        total=min(len(windows), limit or len(windows)) if isinstance(windows, Dataset) else limit,
        initial=state.batches * options.batch_size,
        desc="harvesting",
        unit="window",
        disable=not options.progress or not process.is_main_process,
        leave=False,
    )
    saved = state.windows
    with bar, evaluating(model), torch.no_grad(), recording_scales(model) as scales:
        for batch in batches:
            number, state.batches = state.batches, state.batches + 1
            state.digest = extend_digest(state.digest, batch)
            if number % process.num_processes == process.process_index:
                count_batch(state, model, batch, number * options.batch_size, options.skipped, scales)
            bar.update(len(batch["input_ids"]))
            if file is not None and state.windows - saved >= options.save_every:
                state.save(file, settings)
                saved = state.windows
    if file is not None:
        state.save(file, settings)
    return merge_processes(state)


def count_batch(
    state: HarvestState,
    model: MFNForCausalLM,
    batch: Columns,
    first_window: int,
    skipped: Skipped,
    scales: dict[int, torch.Tensor],
) -> None:
    """Runs the model on a batch of windows and adds the activity of its features to the state.

    Args:
        state: State of the harvest.
        model: MFN model in evaluation mode, inside `recording_scales`.
        batch: Windows by column.
        first_window: Number of the batch's first window in the data.
        skipped: Tokens that are not counted.
        scales: Dictionary that `recording_scales` yields.
    """
    tokens, codes = run_windows(model, batch, first_window, skipped, state.source_places(sources_of(batch)))
    state.add(tokens, codes, {layer: scale.flatten().cpu().numpy() for layer, scale in scales.items()})


def run_windows(
    model: MFNForCausalLM, batch: Columns, first_window: int, skipped: Skipped, sources: np.ndarray
) -> tuple[TokenBatch, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Runs the model on a batch of windows.

    Returns:
        The tokens of the batch; and per layer the indices and values of its code, (B T, K) each.
    """
    ids = np.array(batch["input_ids"], np.int64)
    attended = np.array(batch.get("attention_mask", np.ones_like(ids)), bool)
    if (first_window + len(ids)) * ids.shape[1] > TOKEN_LIMIT:
        raise ValueError(f"the data has more than {TOKEN_LIMIT} tokens; limit them by tokens=")
    inputs = {"input_ids": torch.from_numpy(ids).to(model.device)}
    if not attended.all():
        mask = torch.from_numpy(attended.astype(np.int64)).to(model.device)
        inputs = padded_inputs(inputs["input_ids"], mask)
    codes = model.model(**inputs, output_codes=True, use_cache=False).codes
    counted = skipped.counted(ids, attended)
    pairs = {}
    for layer, code in codes.items():
        indices, values = code.indices.flatten(0, -2), code.values.flatten(0, -2).float()
        pairs[layer] = indices.cpu().numpy(), values.cpu().numpy()
    return TokenBatch(first_window, ids.astype(np.int32), attended, counted, sources), pairs


def extend_digest(digest: str, batch: Columns) -> str:
    """Digest of all windows up to a batch, from the digest of the windows before; "" is the digest of no window."""
    parts = [np.array(batch[name], np.int64) for name in ("input_ids", "attention_mask") if name in batch]
    content = [digest.encode(), *(part.tobytes() for part in parts), json.dumps(sources_of(batch)).encode()]
    return hashlib.sha256(b" ".join(content)).hexdigest()


def _settings(model: MFNForCausalLM, dataset: Any, window: int, options: HarvestOptions) -> dict[str, Any]:
    """Everything that must be equal for a harvest to be resumed, as JSON."""
    settings = {
        "model": _fingerprint(model),
        "window": window,
        "tokens": options.tokens,
        "batch_size": options.batch_size,
        "skip_first": options.skip_first,
        "skip_tokens": sorted(options.skip_tokens),
        "examples": list(options.examples),
    }
    return settings | (dataset.settings if isinstance(dataset, TextWindows) else {})


def _fingerprint(model: MFNForCausalLM) -> str:
    """Digest of the config and of the MFN layers' weights, which differ from one training to another."""
    digest = hashlib.sha256(f"{__version__} {model.config.to_json_string()}".encode())
    for layer in model.mfn_layers.values():
        for parameter in layer.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:FINGERPRINT_DIGITS]


def _skip_counted(state: HarvestState, batches: Iterator[Columns], folder: Path | None) -> None:
    """Reads past the batches that a resumed state has counted; raises `ValueError` if their text is different now."""
    digest = ""
    for batch in islice(batches, state.batches):
        digest = extend_digest(digest, batch)
    if digest != state.digest:
        raise ValueError(f"the harvest in {folder} was of other text; {RESUME_OR_BEGIN}")


__all__ = ["HarvestOptions", "Skipped", "count_batch", "extend_digest", "harvest", "run_windows"]
