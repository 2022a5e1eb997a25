"""From a model and a data set to the tables of its atlas."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from ...data.tokens import token_text
from ...model.features_digest import name_features_of
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.offloading import check_in_memory
from ...model.twins import check_has_features, is_a
from ...model.version import __version__
from ..atlas.schema import HISTOGRAM_EDGES, SCHEMA_VERSION
from ..public_names import public_name
from .directions import logit_effects, nearest_features
from .harvest import HarvestOptions, Skipped, harvest
from .state import HarvestState
from .tables import layer_examples, layer_features, layer_figures, mean_scale

NEIGHBOURS = 8
"""Nearest features, and most co-active features, in an atlas per feature."""
EFFECTS = 10
"""Promoted tokens, and suppressed tokens, in an atlas per feature."""


class AtlasTables(NamedTuple):
    """Content of an atlas without labels."""

    metadata: dict[str, Any]
    """Content of `atlas.json`."""
    features: pa.Table
    """One row per feature, as in `features.parquet`."""
    examples: pa.Table
    """One row per example, as in `examples.parquet`."""


def harvest_tables(model: MFNForCausalLM, tokenizer: Any, dataset: Any, options: HarvestOptions) -> AtlasTables:
    """Makes the tables of an atlas in one pass over a data set; see `FeatureAtlas.build` for arguments and errors."""
    check_has_features(model)
    if not is_a(model, MFNForCausalLM):
        raise ValueError(f"model is a {type(model).__name__}; an atlas is made of an MFNForCausalLM")
    check_in_memory(model, "an atlas")
    options.check()
    features_digest = name_features_of(model)
    state = harvest(model, dataset, options)
    if not state.tokens:
        raise ValueError(
            f"no token is left to count: all are among the first {options.skip_first} of their window (skip_first), or "
            f"are {sorted(options.skip_tokens)} (skip_tokens)"
        )
    state.sort_sources()
    tables = _tables(state, model, tokenizer, options.skipped)
    tables.metadata["model"]["features_digest"] = features_digest
    return tables


def _tables(state: HarvestState, model: MFNForCausalLM, tokenizer: Any, skipped: Skipped) -> AtlasTables:
    vocabulary = min(len(tokenizer), model.config.vocab_size)

    def texts(ids: np.ndarray) -> list[str]:
        return [token_text(tokenizer, int(token)) for token in ids]

    features, examples, figures = [], [], {}
    for layer, statistics in state.layers.items():
        pruned = [int(feature) for feature in model.config.pruned_features.get(str(layer), [])]
        effects = logit_effects(model, layer, mean_scale(statistics, state.tokens), EFFECTS, vocabulary)
        nearest = nearest_features(model, layer, NEIGHBOURS)
        features.append(layer_features(layer, statistics, state.tokens, pruned, effects, nearest, texts, NEIGHBOURS))
        examples.append(layer_examples(layer, statistics, state.window, list(state.sources), texts))
        figures[str(layer)] = layer_figures(statistics, state.tokens, pruned)
    metadata = _metadata(state, model.config, skipped, figures)
    return AtlasTables(metadata, pa.concat_tables(features), pa.concat_tables(examples))


def _metadata(state: HarvestState, config: Any, skipped: Skipped, figures: dict[str, Any]) -> dict[str, Any]:
    return {
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
            "skip_first": skipped.first,
            "skip_tokens": sorted(skipped.tokens),
        },
        "histogram_edges": [float(edge) for edge in HISTOGRAM_EDGES],
        "layers": figures,
    }


__all__ = ["AtlasTables", "harvest_tables"]
