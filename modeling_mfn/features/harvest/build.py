"""From a model and a data set to its atlas."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch.distributed as dist

from ...data.tokens import token_text
from ...model.configuration_mfn import __version__
from ...model.modeling_mfn import MFNForCausalLM
from ...utils.processes import process_index, world_size
from ..atlas.atlas import FeatureAtlas
from ..atlas.schema import HISTOGRAM_EDGES, SCHEMA_VERSION
from .directions import logit_effects, nearest_features
from .harvest import harvest
from .state import HarvestState
from .statistics import ExampleLimits
from .tables import example_table, feature_table, layer_figures, mean_scale

NEIGHBOURS = 8
"""Nearest, and most co-active, features that the atlas names."""


EFFECTS = 10
"""Promoted, and suppressed, tokens that it names."""


def build_atlas(
    model: MFNForCausalLM,
    tokenizer: Any,
    dataset: Any,
    *,
    tokens: int | None = None,
    batch_size: int = 8,
    skip_first: int = 1,
    examples: ExampleLimits | None = None,
    state_folder: str | os.PathLike[str] | None = None,
    resume: bool = False,
    save_every: int = 2048,
    progress: bool = True,
) -> FeatureAtlas:
    """Makes the atlas of a model in one pass over a data set.

    The model runs as it is, at its alpha and under the `steer` context that is in force. Memory does not grow with the
    data: a feature has counters, a histogram, and a limited number of examples with their context (some 20 kB in all,
    with the default limits). Under `accelerate launch` each process takes every P-th batch, and all of them return the
    same atlas, the one of a single process to the bit.

    Args:
        model: an MFN model with an LM head, on the device that it is to run on.
        tokenizer: the model's tokenizer.
        dataset: a data set, or any iterable, of windows of one length T: `input_ids` (T,), with `attention_mask` (T,)
            where rows are padded, and with `source`, the name of the corpus that a row is from, for counts by source.
            `modeling_mfn.data.pack` makes such windows.
        tokens: windows are taken until they have this many tokens; all by default.
        batch_size: windows at once.
        skip_first: tokens at the start of each window that are left out of all statistics. The first token's residual
            is like no other token's, since attention rests on it: features that fire on it would seem to fire on a
            T-th of all text, with activations far above all others.
        examples: how many examples a feature has, and how much context.
        state_folder: where the state is kept, so that a harvest that is broken off can go on; it is removed in the end.
        resume: go on from the state in `state_folder`, if there is one, with the same model, data and settings, in as
            many processes. The result is the same to the bit.
        save_every: windows between two savings of the state.
        progress: show a progress bar.

    Raises:
        ValueError: on data or settings that cannot be, or a state that is another harvest's.
    """
    limits = examples or ExampleLimits()
    _check(model, tokens, batch_size, skip_first, save_every, limits)
    folder = None if state_folder is None else Path(state_folder)
    state = harvest(
        model,
        dataset,
        limits=limits,
        tokens=tokens,
        batch_size=batch_size,
        skip_first=skip_first,
        state_folder=folder,
        resume=resume,
        save_every=save_every,
        progress=progress,
    )
    if not state.tokens:
        raise ValueError(f"no token is left to count: windows have at most {skip_first} tokens, and these are skipped")
    atlas = _assemble(state, model, tokenizer, skip_first)
    if folder is not None:
        if world_size() > 1:
            dist.barrier()  # none is left that may still need it
        if process_index() == 0:
            shutil.rmtree(folder, ignore_errors=True)
    return atlas


def _check(
    model: Any, tokens: int | None, batch_size: int, skip_first: int, save_every: int, limits: ExampleLimits
) -> None:
    if not isinstance(model, MFNForCausalLM):
        raise ValueError(f"model is a {type(model).__name__}; an atlas is made of an MFNForCausalLM")
    smallest = {"tokens": 1, "batch_size": 1, "skip_first": 0, "save_every": 1}
    given = {"tokens": tokens, "batch_size": batch_size, "skip_first": skip_first, "save_every": save_every}
    given |= {f"examples.{name}": number for name, number in limits._asdict().items()}
    smallest |= {"examples.top": 1, "examples.stratum": 1}
    for name, number in given.items():
        if number is not None and number < smallest.get(name, 0):
            raise ValueError(f"{name} is {number}; it must be at least {smallest.get(name, 0)}")


def _assemble(state: HarvestState, model: MFNForCausalLM, tokenizer: Any, skip_first: int) -> FeatureAtlas:
    state.sort_sources()
    pruned = getattr(model.config, "pruned_features", None) or {}
    vocabulary = min(len(tokenizer), model.config.vocab_size)

    def texts(ids: np.ndarray) -> list[str]:
        return [token_text(tokenizer, int(token)) for token in ids]

    features, examples, figures = [], [], {}
    for layer, statistics in state.layers.items():
        gone = [int(feature) for feature in pruned.get(str(layer), [])]
        effects = logit_effects(model, layer, mean_scale(statistics, state.tokens), EFFECTS, vocabulary)
        nearest = nearest_features(model, layer, NEIGHBOURS)
        features.append(feature_table(layer, statistics, state.tokens, gone, effects, nearest, texts, NEIGHBOURS))
        examples.append(example_table(layer, statistics, state.window, list(state.sources), texts))
        figures[str(layer)] = layer_figures(statistics, state.tokens, gone)
    config = model.config
    metadata = {
        "schema_version": SCHEMA_VERSION,
        "mfn_version": __version__,
        "model": {
            "name_or_path": public_name(config.name_or_path),
            "layers": list(config.layers),
            "num_features": config.num_features,
            "k": config.k,
            "alpha": config.alpha,
        },
        "data": {
            "sources": [{"name": name, "tokens": count} for name, count in state.sources.items()],
            "tokens": state.tokens,
            "windows": state.windows,
            "window": state.window,
            "skip_first": skip_first,
        },
        "histogram_edges": [float(edge) for edge in HISTOGRAM_EDGES],
        "layers": figures,
    }
    return FeatureAtlas(metadata, pa.concat_tables(features), pa.concat_tables(examples))


def public_name(name_or_path: str) -> str | None:
    """The id on the Hub; of a folder its last part, since an atlas is made to be shared."""
    name = str(name_or_path or "")
    return (Path(name).absolute().name if os.path.isdir(name) or Path(name).is_absolute() else name) or None


__all__ = [
    "build_atlas",
    "public_name",
]
