"""Features that are pruned, removed, reset and merged, and which of them are duplicates."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils import logging

from .configuration_mfn import MFNConfig, check_feature
from .feature_names import format_feature
from .feature_rows import FeatureRows
from .mfn_layer import MFNLayer
from .presets import depending_on, read_presets

logger = logging.get_logger(__name__)


class FeatureEditing:
    """The methods of an MFN model that edit its features. They replace or overwrite weights: make the trainer, or the
    optimizer, afterwards."""

    if TYPE_CHECKING:
        config: MFNConfig

        @property
        def mfn_layers(self) -> dict[int, MFNLayer]: ...

    @torch.no_grad()
    def prune_features(self, layer: int, indices: Iterable[int]) -> None:
        """Features of one layer count for nothing from now on: logits are those with each of them ablated.

        As ablated ones, they still compete: one whose pre-activation is among the K largest takes its place among the
        K, with value 0 in the code. Their directions become 0, and the config keeps their indices
        (`pruned_features`), so that saved models have them pruned too, and no training revives them. What
        `shared_decoder=True` shares keeps its direction for the other layers. Presets go on without them.
        [`reset_features`] undoes it.

        Args:
            layer: block index.
            indices: features, in any order; those already pruned may be among them.

        Raises:
            ValueError: on a layer or feature that does not exist.
        """
        chosen = self._chosen(layer, indices, pruned=True)
        if not self.config.shared_decoder:
            removed = set(self.config.removed_decoder_rows.get(str(layer), []))
            directions, rows = self._rows(layer, [feature for feature in chosen if feature not in removed])[2]
            directions[rows] = 0
        self._forget_norms(layer, chosen)
        self._record("pruned_features", layer, {*self._pruned(layer), *chosen})

    @torch.no_grad()
    def compact(self, keep_competition: bool = True) -> None:
        """Removes the weights of pruned features, from memory and from what is saved. Names stay: the code still has
        m features, and `L6/1234` is the same one as before.

        Args:
            keep_competition: removes the decoder's rows alone. Encoder rows stay, since these features compete for
                places among the K: logits are the same on every input. Without it encoder rows go, too, and other
                features take the places: logits are the same wherever no pruned feature would be among the K.

        Raises:
            ValueError: with `shared_decoder=True`, whose rows other layers use; if a layer would be left without
                features, or with fewer than k that compete. Nothing is changed then.
        """
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
            encoder, bias, decoder = (_only(parameter, rows) for parameter, rows in self._rows(layer, features))
            mfn.decoder.weight = decoder
            self._record("removed_decoder_rows", layer, self._pruned(layer))
            if not keep_competition:
                mfn.encoder.weight, mfn.encoder.bias = encoder, bias
                self._record("removed_encoder_rows", layer, self._pruned(layer))

    @torch.no_grad()
    def reset_features(self, layer: int, indices: Iterable[int], generator: torch.Generator | None = None) -> None:
        """Features of one layer start again, from random unit directions; their encoders look along these, a fifth as
        long as the layer's average, as those of dead features that start again in training. Pruned ones are pruned no
        longer. `MFNTrainingArguments(trainable_features=...)` then trains them alone. Presets stay as they are, and a
        warning names those that depend on these features.

        Args:
            layer: block index.
            indices: features.
            generator: on the CPU, for the directions; by default PyTorch's own.

        Raises:
            ValueError: on a layer or feature that does not exist or was removed by [`compact`], and with
                `shared_decoder=True`, where a new direction would be that of other layers.
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

    @torch.no_grad()
    def merge_features(self, layer: int, keep: int, others: Iterable[int]) -> None:
        r"""Duplicates become one feature: `keep` takes over what all of them write, and the others are pruned.

        With e_i and b_i the encoder's row and bias of each, d_i its direction and z_i its activation, the kept feature
        gets the direction d = sum |e_i| d_i, brought to unit norm (weights are how strongly a feature speaks), the row
        sum (d_i . d) e_i and the bias sum (d_i . d) b_i. On a token on which all of them are active, its activation is
        then sum (d_i . d) z_i: what they wrote, sum z_i d_i, projected onto d.

        The result is the same, to float tolerance, on tokens where all are active and their directions are equal, and
        on those where none is, before and after. It is an approximation elsewhere: what the directions have across d
        is lost; on tokens where only some were active, the others' negative pre-activations count too; and a
        larger activation may win a place among the K. The others still compete, like all pruned features.

        Args:
            layer: block index.
            keep: the feature that stays.
            others: those that it replaces.

        Raises:
            ValueError: on a feature that does not exist or is pruned, if `keep` is among the others or there are none,
                on a direction without a positive share in the mean one, and with `shared_decoder=True`.
        """
        merged = self._chosen(layer, others)
        (keep,) = self._chosen(layer, [keep])
        self._refuse_shared("merge_features")
        if not merged or keep in merged:
            raise ValueError(f"others is {merged}; give at least one feature, none of which is the kept one, {keep}")
        (weight, read), (bias, _), (written, to) = self._rows(layer, [keep, *merged])
        encoders, biases, directions = weight[read].double(), bias[read].double(), written[to].double()
        mean = F.normalize(encoders.norm(dim=-1) @ directions, dim=-1)
        shares = directions @ mean
        if shares.min() <= 0:
            worst = [keep, *merged][int(shares.argmin())]
            raise ValueError(
                f"L{layer}/{worst} is no duplicate: its direction has cosine {float(shares.min()):.2f} with the mean "
                "of those to merge, which must be above 0"
            )
        weight[read[0]], bias[read[0]] = (shares @ encoders).to(weight), (shares @ biases).to(bias)
        written[to[0]] = mean.to(written)
        self._forget_norms(layer, [keep])
        self.prune_features(layer, merged)

    def _pruned(self, layer: int) -> set[int]:
        return set(self.config.pruned_features.get(str(layer), []))

    def _chosen(self, layer: int, indices: Iterable[int], pruned: bool = False) -> list[int]:
        """Each feature once, in the order given."""
        values: Any = indices.tolist() if hasattr(indices, "tolist") else indices
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise ValueError(f"features are {values!r}; give a list of indices")
        chosen = list(dict.fromkeys(values))
        for index in chosen:
            if isinstance(index, bool) or not isinstance(index, int):
                raise ValueError(f"features contain {index!r}; an index is a whole number")
            check_feature(self.config, layer, index, pruned)
        return chosen

    def _layer(self, layer: int) -> MFNLayer:
        mfn = self.mfn_layers[layer]
        if not isinstance(mfn, MFNLayer):
            raise ValueError(
                f"layer {layer} is wrapped in a {type(mfn).__name__}; merge the adapter into the model first"
            )
        if mfn.encoder.weight.is_meta:
            raise ValueError(f"the weights of layer {layer} are not in memory; load the model without offloading")
        return mfn

    def _rows(self, layer: int, features: list[int]) -> list[tuple[nn.Parameter, Tensor]]:
        return self._layer(layer).rows_of(torch.tensor(features, dtype=torch.long))

    def _record(self, name: str, layer: int, features: set[int]) -> None:
        """Writes a layer's features into the config, and gives the layer the tables that follow."""
        mfn = self._layer(layer)
        recorded = {**getattr(self.config, name), str(layer): sorted(features)}
        setattr(self.config, name, {at: recorded[at] for at in sorted(recorded, key=int) if recorded[at]})
        rows = FeatureRows.of(self.config, layer)
        mfn.rows = rows if rows is None else rows.to(mfn.encoder.weight.device)

    def _forget_norms(self, layer: int, features: list[int]) -> None:
        """What `bake` made of directions that are no longer there."""
        gone = {format_feature(layer, index) for index in features}
        norms = self.config.direction_norms
        self.config.direction_norms = {name: norm for name, norm in norms.items() if name not in gone}

    def _warn_of_presets(self, layer: int, features: list[int]) -> None:
        """What presets say was meant for the features that were there before."""
        presets = read_presets(self.config.steering_presets, self.config.layers, self.config.num_features)
        for name, preset in presets.items():
            if changed := ", ".join(map(str, depending_on(preset, {str(layer): features}))):
                logger.warning(f"preset {name!r} stays, but what it does to {changed} needs features that start again")

    def _refuse_shared(self, method: str) -> None:
        if self.config.shared_decoder:
            raise ValueError(f"the model has shared_decoder=True; {method} would change directions of other layers")


def _only(parameter: nn.Parameter, rows: Tensor) -> nn.Parameter:
    return nn.Parameter(parameter[rows], requires_grad=parameter.requires_grad)


class DuplicatePair(NamedTuple):
    """Two features of one layer that point the same way."""

    first: int
    second: int
    direction_cosine: float
    """Between their directions."""
    encoder_cosine: float
    """Between their rows of the encoder."""


@torch.no_grad()
def find_duplicates(
    model: FeatureEditing, layer: int, threshold: float = 0.95, block: int = 1024
) -> list[DuplicatePair]:
    """The pairs of features of one layer, pruned ones left out, whose directions have at least this cosine; the most
    similar first. A pair that is read alike, too, is a candidate for `merge_features`; one with a low
    cosine of encoders writes the same for different reasons.

    Args:
        model: an MFN model.
        layer: block index.
        threshold: least cosine, above 0 and at most 1.
        block: features that are compared with all others at once: (block, m) numbers are the most in memory.

    Raises:
        ValueError: on a layer without features, or a threshold out of range.
    """
    check_feature(model.config, layer, 0, pruned=True)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold is {threshold}; it must be a cosine above 0 and at most 1")
    pruned = set(model.config.pruned_features.get(str(layer), []))
    kept = torch.tensor(sorted(set(range(model.config.num_features)) - pruned), dtype=torch.long)
    (weight, read), _, (written, to) = model.mfn_layers[layer].rows_of(kept)
    encoders, directions = (F.normalize(rows.float(), dim=-1) for rows in (weight[read], written[to]))
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
