"""Which features fire on a text, token by token, and what they do to the next token."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.table import Table

from ..data.tokens import token_text
from ..model.feature_names import format_feature
from ..model.modeling_mfn import MFNForCausalLM
from ..model.modes import evaluating
from ..model.sparse_code import SparseCode
from ..utils.display import for_terminal
from .atlas.atlas import FeatureAtlas
from .harvest.directions import recording_scales, through_final_norm


@dataclass(frozen=True)
class ActiveFeature:
    """A feature on one token. Effects are in logits, on the direct path to the LM head: the activation times the
    feature's direction through the final norm, whose denominator is that of this token, and the LM head; as in
    `docs/atlas.md`, but for this token rather than on average. What later blocks make of the feature comes on top."""

    feature: str
    """Its name, `L6/1234`."""
    label: str | None
    activation: float
    relative: float | None
    """The activation over the largest one in the atlas; `None` if the atlas never saw it active."""
    effect: float
    """On the next token that the model holds likeliest."""
    promotes: str | None
    """The token whose logit it raises most, as the atlas has it."""
    promotes_effect: float | None
    """On that token."""


@dataclass(frozen=True)
class ReadToken:
    """A token of the text and the features that are active on it."""

    position: int
    token_id: int
    token: str
    next_token: str
    """The one that the model holds likeliest."""
    features: list[ActiveFeature]
    """The largest relative activation first."""


class TextReading(list[ReadToken]):
    """The tokens of a text."""

    def to_records(self) -> list[dict[str, Any]]:
        """The same as JSON has it."""
        return [asdict(token) for token in self]

    def __rich__(self) -> Table:
        table = Table("token", "feature", "label", "activation", "of max", "next token", "promotes")
        for token in self:
            for place, active in enumerate(token.features):
                first = place == 0
                relative = "" if active.relative is None else f"{active.relative:.0%}"
                following = for_terminal(token.next_token, 16).append(f" {active.effect:+.2f}")
                promotes = for_terminal(active.promotes or "", 16)
                if active.promotes_effect is not None:
                    promotes.append(f" {active.promotes_effect:+.2f}")
                table.add_row(
                    for_terminal(token.token if first else "", 24),
                    active.feature,
                    for_terminal(active.label or "", 32),
                    f"{active.activation:.3g}",
                    relative,
                    following,
                    promotes,
                    end_section=place == len(token.features) - 1,
                )
        return table


@torch.no_grad()
def read_text(atlas: FeatureAtlas, text: str, model: MFNForCausalLM, tokenizer: Any, k: int = 5) -> TextReading:
    """The features that are active on a text; `FeatureAtlas.top` has the arguments."""
    if k < 1:
        raise ValueError(f"k is {k}; it must be at least 1")
    ids = tokenizer(text, return_tensors="pt")["input_ids"].to(model.device)
    if not ids.numel():
        raise ValueError(f"the text {text!r} has no tokens")
    limit = getattr(model.config.text_config, "max_position_embeddings", None)
    if limit is not None and ids.shape[1] > limit:
        raise ValueError(f"the text has {ids.shape[1]} tokens; the model reads {limit} at most")
    with evaluating(model), recording_scales(model) as scales:
        out = model(input_ids=ids, output_codes=True, use_cache=False)
    following = out.logits[0].argmax(-1)
    tokens = [token_text(tokenizer, token) for token in ids[0].tolist()]
    next_tokens = [token_text(tokenizer, token) for token in following.tolist()]
    active: list[list[ActiveFeature]] = [[] for _ in tokens]
    known: dict[str, dict[str, Any]] = {}
    for pair in _strongest(atlas, out.codes, k):
        unit = pair.activation * float(scales[pair.layer][0, pair.position])
        direction = through_final_norm(model, model.mfn_layers[pair.layer].directions()[pair.feature])
        effect = unit * float(direction @ model.lm_head.weight[following[pair.position]].float())
        name = format_feature(pair.layer, pair.feature)
        if name not in known:
            known[name] = _described(atlas, pair)
        of_unit = known[name].get("promotes_effect")
        figures = known[name] | {"promotes_effect": None if of_unit is None else of_unit * unit}
        active[pair.position].append(
            ActiveFeature(name, activation=pair.activation, relative=pair.relative, effect=effect, **figures)
        )
    rows = zip(ids[0].tolist(), tokens, next_tokens, active, strict=True)
    return TextReading(ReadToken(position, *row) for position, row in enumerate(rows))


class _Pair(NamedTuple):
    position: int
    layer: int
    feature: int
    activation: float
    relative: float | None


def _strongest(atlas: FeatureAtlas, codes: Mapping[int, SparseCode], k: int) -> Iterator[_Pair]:
    """The k active features of each token, in the order of tokens, the largest relative activation first; features that
    the atlas never saw active come last."""
    layers, features = atlas.features["layer"].to_numpy(), atlas.features["index"].to_numpy()
    maxima = atlas.features["max_activation"].to_numpy()  # NaN where there is none
    columns: list[tuple[np.ndarray, ...]] = []
    for layer, code in codes.items():
        indices, values = code.indices[0].cpu().numpy(), code.values[0].float().cpu().numpy()
        largest = np.full(code.num_features, np.nan)
        largest[features[layers == layer]] = maxima[layers == layer]
        columns.append((np.full(indices.shape, layer), indices, values, values / largest[indices]))
    layer_of, index, values, relative = (np.concatenate(column, 1) for column in zip(*columns, strict=True))
    for position in range(len(values)):
        order = np.lexsort((-values[position], -np.nan_to_num(relative[position], nan=-1.0)))
        for at in order[values[position, order] > 0][:k].tolist():
            ratio = float(relative[position, at])
            shown = None if np.isnan(ratio) else ratio
            yield _Pair(
                position, int(layer_of[position, at]), int(index[position, at]), float(values[position, at]), shown
            )


def _described(atlas: FeatureAtlas, pair: _Pair) -> dict[str, Any]:
    """What the atlas knows of a feature, its effect on the token that it promotes most for what is 1 after the final
    norm's division."""
    name = format_feature(pair.layer, pair.feature)
    label, promoted = atlas.labels.best(name), atlas.row(name)["promoted"]
    described: dict[str, Any] = {"label": label.label if label else None, "promotes": None}
    if promoted:
        # the atlas' effects are those of an activation of 1 at the mean scale of all tokens
        scale = atlas.metadata["layers"][str(pair.layer)]["logit_scale"]
        described |= {"promotes": promoted[0]["token"], "promotes_effect": promoted[0]["effect"] / scale}
    return described


__all__ = ["ActiveFeature", "ReadToken", "TextReading", "read_text"]
