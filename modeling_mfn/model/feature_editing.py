"""Editing of features: prune, compact, reset and merge them, and find duplicates."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers.utils import logging

from .checks import as_number, as_whole, check_type, is_whole, shown
from .configuration_mfn import MFNConfig
from .feature_names import format_feature
from .feature_rows import FeatureRows
from .feature_weights import FeatureWeights, WeightRows
from .features_digest import keeps_features
from .mfn_layer import MFNLayer
from .presets import depending_on, read_presets
from .twins import check_has_features

logger = logging.get_logger(__name__)


class FeatureEditing:
    """Methods of an MFN model that edit its features.

    They replace or overwrite weights, so make the trainer or the optimizer afterwards.
    """

    if TYPE_CHECKING:
        config: MFNConfig

        @property
        def mfn_layers(self) -> dict[int, MFNLayer]: ...

    @keeps_features
    @torch.no_grad()
    def prune_features(self, layer: int, indices: Iterable[int]) -> None:
        """Takes away the effect of features of one layer, as if each of them were ablated on every token.

        Pruned features still compete, as ablated ones do: a pruned feature among the K largest pre-activations keeps
        its place among the K, with value 0. With `coding_rounds` or `refine_steps`, others can
        make up for it. Directions of pruned features become 0. The config keeps their indices
        (`pruned_features`), so saved models have them pruned too, and no training revives them. A decoder with
        `shared_decoder=True` keeps the directions for the other layers. Presets go on without pruned features.
        [`reset_features`] undoes pruning.

        Args:
            layer: block index.
            indices: features, in any order; features that are already pruned are allowed.

        Raises:
            ValueError: on a layer or feature that does not exist.
        """
        chosen = self._chosen(layer, indices, pruned=True)
        if not self.config.shared_decoder:
            removed = set(self.config.removed_decoder_rows.get(str(layer), []))
            decoder = self._rows(layer, [feature for feature in chosen if feature not in removed]).decoder
            decoder.parameter[decoder.rows] = 0
        self._forget_norms(layer, chosen)
        self._record("pruned_features", layer, {*self._pruned(layer), *chosen})

    @keeps_features
    @torch.no_grad()
    def compact(self, keep_competition: bool = True) -> None:
        """Removes the weights of pruned features, from memory and from saved models.

        Names stay: the code still has m features, and `L6/1234` is the same feature as before.

        Args:
            keep_competition: remove only the decoder's rows. Encoder rows stay and compete for the K places, so logits
                stay the same on every input. If False, encoder rows go too, and other features take their places:
                logits stay the same on inputs where no pruned feature would be among the K.

        Raises:
            ValueError: with `shared_decoder=True`, as other layers use the rows; if a layer would be left without
                features, or with fewer than k that compete. Nothing is changed then.
        """
        check_type("keep_competition", keep_competition, bool)
        if self.config.shared_decoder:
            raise ValueError("the model has shared_decoder=True; compact() would take rows that other layers use")
        kept = {}
        for layer in map(int, self.config.pruned_features):
            kept[layer] = sorted(set(range(self.config.num_features)) - self._pruned(layer))
            least = 1 if keep_competition else self.config.k
            if len(kept[layer]) < least:
                raise ValueError(
                    f"layer {layer} has {len(kept[layer])} features that are not pruned; compact() must leave at "
                    f"least {least}" + ("" if keep_competition else ", which is k")
                )
            self._layer(layer)
        for layer, features in kept.items():
            mfn = self._layer(layer)
            encoder, bias, decoder = map(_only, self._rows(layer, features))
            mfn.decoder.weight = decoder
            self._record("removed_decoder_rows", layer, self._pruned(layer))
            if not keep_competition:
                mfn.encoder.weight, mfn.encoder.bias = encoder, bias
                self._record("removed_encoder_rows", layer, self._pruned(layer))

    @keeps_features
    @torch.no_grad()
    def reset_features(self, layer: int, indices: Iterable[int], generator: torch.Generator | None = None) -> None:
        """Starts features of one layer again, from random unit directions.

        Their encoder rows point along the directions and are a fifth as long as the layer's average, as for dead
        features in training. Pruned features are pruned no longer. `MFNTrainingArguments(trainable_features=...)` can
        then train these features alone. Presets stay, and a warning names presets that depend on these features.

        Args:
            layer: block index.
            indices: features.
            generator: generator on the CPU for the directions; by default PyTorch's own.

        Raises:
            ValueError: on a layer or feature that does not exist or was removed by [`compact`], and with
                `shared_decoder=True`, as the directions belong to other layers too.
        """
        chosen = self._chosen(layer, indices, pruned=True)
        self._refuse_shared("reset_features")
        if removed := set(chosen) & set(self.config.removed_decoder_rows.get(str(layer), [])):
            raise ValueError(f"L{layer}/{min(removed)} was removed by compact(); it cannot start again")
        directions = F.normalize(torch.randn(len(chosen), self.config.hidden_size, generator=generator), dim=-1)
        self._layer(layer).reset_features(torch.tensor(chosen, dtype=torch.long), directions)
        self._forget_norms(layer, chosen)
        self._record("pruned_features", layer, self._pruned(layer) - set(chosen))
        self._warn_of_presets(layer, chosen)

    @keeps_features
    @torch.no_grad()
    def merge_features(self, layer: int, keep: int, others: Iterable[int]) -> None:
        r"""Merges duplicates into one feature: `keep` takes over what all of them write, and the others are pruned.

        Let e_i be a feature's encoder row, b_i its bias, d_i its direction and z_i its activation. The kept feature
        gets the direction d = sum |e_i| d_i, brought to unit norm. It gets the encoder row sum (d_i . d) e_i and the
        bias sum (d_i . d) b_i. Where all features are active, its activation is then sum (d_i . d) z_i: their sum
        sum z_i d_i, projected onto d.

        The result is the same, to float tolerance, on tokens where all features are active and have equal directions,
        and where none is active. It is an approximation elsewhere. The parts of directions across d are lost. Where
        only some features were active, negative pre-activations of the others count too. A larger activation may win a
        place among the K. The others still compete, like all pruned features.

        Args:
            layer: block index.
            keep: feature that stays.
            others: features that it replaces.

        Raises:
            ValueError: on a feature that does not exist or is pruned, if `keep` is among the others or there are none,
                on a direction without a positive share in the mean one, and with `shared_decoder=True`.
        """
        merged = self._chosen(layer, others)
        (keep,) = self._chosen(layer, [keep])
        self._refuse_shared("merge_features")
        if not merged or keep in merged:
            raise ValueError(f"others is {merged}; give at least one feature, none of which is the kept one, {keep}")
        encoder, bias, decoder = self._rows(layer, [keep, *merged])
        encoders, biases, directions = (each.values.double() for each in (encoder, bias, decoder))
        mean = F.normalize(encoders.norm(dim=-1) @ directions, dim=-1)
        shares = directions @ mean
        if shares.min() <= 0:
            worst = [keep, *merged][int(shares.argmin())]
            raise ValueError(
                f"L{layer}/{worst} is not a duplicate: its direction has cosine {float(shares.min()):.2f} with the "
                "mean of those to merge, which must be above 0"
            )
        for place, kept in ((encoder, shares @ encoders), (bias, shares @ biases), (decoder, mean)):
            place.parameter[place.rows[0]] = kept.to(place.parameter)
        self._forget_norms(layer, [keep])
        self.prune_features(layer, merged)

    def _pruned(self, layer: int) -> set[int]:
        return set(self.config.pruned_features.get(str(layer), []))

    def _chosen(self, layer: int, indices: Iterable[int], pruned: bool = False) -> list[int]:
        """Returns each feature once, in the order given; `ValueError` if one is missing, or pruned and must not be."""
        values: Any = indices.tolist() if hasattr(indices, "tolist") else indices
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"features are {shown(values)}; give a list of indices")
        self.config.check_feature((layer, 0), pruned=True)
        chosen = []
        for index in values:
            if not is_whole(index):
                raise ValueError(f"features contain {shown(index)}; an index is a whole number")
            self.config.check_feature((layer, index), pruned)
            chosen.append(index)
        return list(dict.fromkeys(chosen))

    def _layer(self, layer: int) -> MFNLayer:
        mfn = self.mfn_layers[layer]
        if not isinstance(mfn, MFNLayer):
            raise ValueError(
                f"layer {layer} is wrapped in a {type(mfn).__name__}; merge the adapter into the model first"
            )
        if mfn.encoder.weight.is_meta:
            raise ValueError(f"the weights of layer {layer} are not in memory; load the model without offloading")
        return mfn

    def _rows(self, layer: int, features: list[int]) -> FeatureWeights:
        return self._layer(layer).rows_of(torch.tensor(features, dtype=torch.long))

    def _record(self, name: str, layer: int, features: set[int]) -> None:
        """Writes a layer's features into the config, and gives the layer the tables that follow from it."""
        mfn = self._layer(layer)
        recorded = {**getattr(self.config, name), str(layer): sorted(features)}
        setattr(self.config, name, {at: recorded[at] for at in sorted(recorded, key=int) if recorded[at]})
        rows = FeatureRows.of(self.config, layer)
        mfn.rows = rows if rows is None else rows.to(mfn.encoder.weight.device)

    def _forget_norms(self, layer: int, features: list[int]) -> None:
        """Forgets the norms that `bake` gave to directions that are gone."""
        gone = {format_feature(layer, index) for index in features}
        norms = self.config.direction_norms
        self.config.direction_norms = {name: norm for name, norm in norms.items() if name not in gone}

    def _warn_of_presets(self, layer: int, features: list[int]) -> None:
        """Warns of presets that were meant for the features before."""
        presets = read_presets(self.config.steering_presets, self.config.layers, self.config.num_features)
        for name, preset in presets.items():
            if changed := ", ".join(map(str, depending_on(preset, {str(layer): features}))):
                logger.warning(
                    f"preset {name!r} stays, but what it does to {changed} was made for the features before the reset"
                )

    def _refuse_shared(self, method: str) -> None:
        if self.config.shared_decoder:
            raise ValueError(f"the model has shared_decoder=True; {method} would change directions of other layers")


def _only(kept: WeightRows) -> nn.Parameter:
    return nn.Parameter(kept.values, requires_grad=kept.parameter.requires_grad)


class DuplicatePair(NamedTuple):
    """Two features of one layer that point the same way."""

    first: int
    second: int
    direction_cosine: float
    """Cosine of their directions."""
    encoder_cosine: float
    """Cosine of their encoder rows."""


@torch.no_grad()
def find_duplicates(
    model: FeatureEditing, layer: int, threshold: float = 0.95, block: int = 1024
) -> list[DuplicatePair]:
    """Finds pairs of features of one layer whose directions have at least this cosine, the most similar first.

    Pruned features are left out. A pair with a high cosine of encoders, too, is a candidate for `merge_features`. A
    pair with a low one writes the same for different reasons.

    Args:
        model: MFN model.
        layer: block index.
        threshold: least cosine, above 0 and at most 1.
        block: features compared with all others at once; memory grows with (block, m).

    Raises:
        ValueError: on a layer without features, or a threshold out of range.
    """
    check_has_features(model)
    model.config.check_feature((layer, 0), pruned=True)
    as_number("threshold", threshold, math.ulp(0.0), 1, "a cosine above 0 and at most 1")
    as_whole("block", block, 1)
    pruned = set(model.config.pruned_features.get(str(layer), []))
    kept = torch.tensor(sorted(set(range(model.config.num_features)) - pruned), dtype=torch.long)
    weights = model.mfn_layers[layer].rows_of(kept)
    encoders, directions = (F.normalize(each.values.float(), dim=-1) for each in (weights.encoder, weights.decoder))
    pairs = []
    for start in range(0, len(kept), block):
        cosines = directions[start : start + block] @ directions[start:].T
        first, second = (cosines >= threshold).triu(1).nonzero().T
        of_encoders = (encoders[start + first] * encoders[start + second]).sum(-1)
        columns = (kept[start + first.cpu()], kept[start + second.cpu()], cosines[first, second], of_encoders)
        pairs += [DuplicatePair(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
    return sorted(pairs, key=lambda pair: -pair.direction_cosine)


__all__ = [
    "DuplicatePair",
    "FeatureEditing",
    "find_duplicates",
]
