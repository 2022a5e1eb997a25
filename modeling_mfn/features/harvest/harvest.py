"""One pass of a model over a data set, from which the atlas is made."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from datasets import Dataset
from tqdm.auto import tqdm

from ...data.text import TextWindows
from ...data.windows import Columns, column_batches, first_length, padded_inputs, sources_of
from ...model.configuration_mfn import __version__
from ...model.modeling_mfn import MFNForCausalLM
from ...model.modes import evaluating
from ...utils.processes import process_index, world_size
from .directions import recording_scales
from .firings import TOKEN_LIMIT, TokenBatch
from .state import RESUME_OR_BEGIN, HarvestState, merge_processes, own_file
from .statistics import ExampleLimits


def harvest(
    model: MFNForCausalLM,
    dataset: Dataset | Iterable[dict[str, Any]],
    *,
    limits: ExampleLimits,
    tokens: int | None = None,
    batch_size: int = 8,
    skip_first: int = 1,
    state_folder: Path | None = None,
    resume: bool = False,
    save_every: int = 2048,
    progress: bool = True,
) -> HarvestState:
    """Gathers the statistics of all features; `build_atlas` has the arguments. Batch b is the share of process b mod P,
    so that each batch is the same however many processes there are, and the result is the same to the bit."""
    device = PartialState().device  # joins the processes of `accelerate launch`, if they are not yet
    rank, processes = process_index(), world_size()
    of_texts = dataset.settings if isinstance(dataset, TextWindows) else {}
    dataset, window = first_length(dataset)
    settings = {
        "model": _fingerprint(model),
        "window": window,
        "tokens": tokens,
        "batch_size": batch_size,
        "skip_first": skip_first,
        "examples": list(limits),
    } | of_texts
    state = HarvestState(model.config.layers, model.config.num_features, limits, window)
    file = None
    if state_folder is not None:
        file = own_file(state_folder, resume)
        if file.exists():
            state.load(file, settings)

    limit = None if tokens is None else -(-tokens // window)
    batches = column_batches(dataset, window, batch_size, limit)
    read = ""
    for rows in islice(batches, state.batches):
        read = digest_on(read, rows)
    if read != state.digest:
        raise ValueError(f"the harvest in {state_folder} was of other text; {RESUME_OR_BEGIN}")
    bar = tqdm(
        total=limit if not isinstance(dataset, Dataset) else min(len(dataset), limit or len(dataset)),
        initial=state.batches * batch_size,
        desc="harvesting",
        unit="window",
        disable=not progress or rank > 0,
        leave=False,
    )
    saved = state.windows
    with bar, evaluating(model), torch.no_grad(), recording_scales(model) as scales:
        for rows in batches:
            number, state.batches = state.batches, state.batches + 1
            state.digest = digest_on(state.digest, rows)
            if number % processes == rank:
                count_in(state, model, rows, number * batch_size, skip_first, scales)
            bar.update(len(rows["input_ids"]))
            if file is not None and state.windows - saved >= save_every:
                state.save(file, settings)
                saved = state.windows
    if file is not None:
        state.save(file, settings)
    return merge_processes(state, device)


def count_in(
    state: HarvestState,
    model: MFNForCausalLM,
    rows: Columns,
    first_window: int,
    skip_first: int,
    scales: dict[int, torch.Tensor],
) -> None:
    """Runs the model on a batch of windows, of which `first_window` is the first, and adds what its features do to the
    state; `scales` is what `recording_scales` yields."""
    batch, pairs = run_windows(model, rows, first_window, skip_first, state.source_places(sources_of(rows)))
    state.add(batch, pairs, {layer: scale.flatten().cpu().numpy() for layer, scale in scales.items()})


def run_windows(
    model: MFNForCausalLM, rows: Columns, first_window: int, skip_first: int, sources: np.ndarray
) -> tuple[TokenBatch, dict[int, tuple[np.ndarray, np.ndarray]]]:
    """Runs the model on a batch of windows: what they are, and each layer's code, indices and values (B T, K)."""
    ids = np.array(rows["input_ids"], np.int64)
    attended = np.array(rows.get("attention_mask", np.ones_like(ids)), bool)
    if (first_window + len(ids)) * ids.shape[1] > TOKEN_LIMIT:
        raise ValueError(f"the data has more than {TOKEN_LIMIT} tokens; limit them by tokens=")
    inputs = {"input_ids": torch.from_numpy(ids).to(model.device)}
    if not attended.all():
        mask = torch.from_numpy(attended.astype(np.int64)).to(model.device)
        inputs = padded_inputs(inputs["input_ids"], mask)
    codes = model.model(**inputs, output_codes=True, use_cache=False).codes
    counted = attended & (attended.cumsum(1) > skip_first)
    pairs = {}
    for layer, code in codes.items():
        indices, values = code.indices.flatten(0, -2), code.values.flatten(0, -2).float()
        pairs[layer] = indices.cpu().numpy(), values.cpu().numpy()
    return TokenBatch(first_window, ids.astype(np.int32), attended, counted, sources), pairs


def digest_on(digest: str, rows: Columns) -> str:
    """The digest of all windows up to a batch, from that of the windows before it; of none, it is empty."""
    parts = [np.array(rows[name], np.int64) for name in ("input_ids", "attention_mask") if name in rows]
    content = [digest.encode(), *(part.tobytes() for part in parts), json.dumps(sources_of(rows)).encode()]
    return hashlib.sha256(b" ".join(content)).hexdigest()


def _fingerprint(model: MFNForCausalLM) -> str:
    """Of the config and of the MFN layers' weights: enough to tell one training's model from another's."""
    digest = hashlib.sha256(f"{__version__} {model.config.to_json_string()}".encode())
    for layer in model.mfn_layers.values():
        for parameter in layer.parameters():
            digest.update(parameter.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()[:12]
