"""Reading a text through a model's features; `FeatureAtlas.top` is the method that users call."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ..data.tokens import checked_text, token_text
from ..model.feature_names import format_feature
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.modes import evaluating
from ..model.sparse_code import SparseCode
from .atlas.feature_index import FeatureIndex
from .atlas.labels import Labels
from .atlas.text_reading import ActiveFeature, ReadToken, TextReading
from .harvest.directions import recording_scales, through_final_norm


@torch.no_grad()
def read_text(
    text: str,
    model: MFNForCausalLM,
    tokenizer: Any,
    k: int,
    features: FeatureIndex,
    labels: Labels,
    logit_scales: Mapping[int, float],
) -> TextReading:
    """Finds the features that are active on a text, and their effects on the next token.

    Args:
        text: The text to read.
        model: The model of the atlas.
        tokenizer: The model's tokenizer.
        k: Features per token.
        features: Features of the atlas.
        labels: Labels of the atlas.
        logit_scales: Layer -> scale that effects in the atlas were multiplied by, a mean over tokens.

    Raises:
        ValueError: If the text has no tokens or too many for the model, or k is less than 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    ids = _token_ids(text, model, tokenizer)
    with evaluating(model), recording_scales(model) as scales:
        out = model(input_ids=ids, output_codes=True, use_cache=False)
    following = out.logits[0].argmax(-1)
    tokens, next_tokens = ([token_text(tokenizer, token) for token in row.tolist()] for row in (ids[0], following))
    active: list[list[ActiveFeature]] = [[] for _ in tokens]
    for pair in strongest_pairs(features.table, out.codes, k):
        scale = float(scales[pair.layer][0, pair.position])
        direction = through_final_norm(model, model.mfn_layers[pair.layer].directions()[pair.feature])
        effect = pair.activation * scale * float(direction @ model.lm_head.weight[following[pair.position]].float())
        name = format_feature(pair.layer, pair.feature)
        label = labels.best(name)
        # the atlas' effects are those of an activation of 1 at the mean scale of all tokens
        factor = pair.activation * scale / logit_scales[pair.layer]
        promoted = next(iter(features.row(name)["promoted"]), None)
        active[pair.position].append(
            ActiveFeature(
                feature=name,
                label=None if label is None else label.label,
                activation=pair.activation,
                relative=pair.relative,
                effect=effect,
                promotes=promoted and promoted["token"],
                promotes_effect=promoted and promoted["effect"] * factor,
            )
        )
    rows = zip(ids[0].tolist(), tokens, next_tokens, active, strict=True)
    return TextReading(ReadToken(position, *row) for position, row in enumerate(rows))


class ActivePair(NamedTuple):
    """A feature that is active on a token."""

    position: int
    layer: int
    feature: int
    activation: float
    relative: float | None
    """Activation divided by the largest one in the atlas; `None` if the atlas never saw the feature active."""


def _token_ids(text: str, model: MFNForCausalLM, tokenizer: Any) -> torch.Tensor:
    ids: torch.Tensor = tokenizer(checked_text("text", text), return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise ValueError(f"the text {text!r} has no tokens")
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"the text has {ids.shape[1]} tokens; the model reads {limit} at most")
    return ids


def strongest_pairs(features: pa.Table, codes: Mapping[int, SparseCode], k: int) -> Iterator[ActivePair]:
    """Yields up to k active features per token, in the order of tokens, the largest relative activation first.

    Features that the atlas never saw active come last.

    Args:
        features: Table of features of an atlas.
        codes: Layer -> code (1, T, K) of one text.
        k: Features per token, of all layers together.
    """
    layers, indices = features["layer"].to_numpy(), features["index"].to_numpy()
    maxima = features["max_activation"].to_numpy()  # NaN where there is none
    columns: list[tuple[np.ndarray, ...]] = []
    for layer, code in codes.items():
        index, values = code.indices[0].cpu().numpy(), code.values[0].float().cpu().numpy()
        largest = np.full(code.num_features, np.nan)
        largest[indices[layers == layer]] = maxima[layers == layer]
        columns.append((np.full(index.shape, layer), index, values, values / largest[index]))
    layer_of, feature, value, relative = (np.concatenate(column, 1) for column in zip(*columns, strict=True))
    for position in range(len(value)):
        order = np.lexsort((-value[position], -np.nan_to_num(relative[position], nan=-1.0)))
        for at in order[value[position, order] > 0][:k].tolist():
            ratio = float(relative[position, at])
            yield ActivePair(
                position,
                int(layer_of[position, at]),
                int(feature[position, at]),
                float(value[position, at]),
                None if np.isnan(ratio) else ratio,
            )


__all__ = ["ActivePair", "read_text", "strongest_pairs"]
