"""Tables between features and rows of weights, for layers with pruned or removed features. Names of features stay."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .configuration_mfn import MFNConfig
from .sparse_code import SparseCode


class FeatureRows(nn.Module):
    """Tables between the features and the rows of one MFN layer.

    They follow from the config, so no checkpoint holds them. A layer without pruned features has no tables.
    """

    pruned: Tensor
    """(m,) bool, features without effect."""
    encoder_names: Tensor | None
    """(rows of the encoder,) int64, each row's feature, ascending; `None` where row and feature are equal."""
    decoder_rows: Tensor | None
    """(m,) int64, each feature's row of the decoder, 0 if it has none; `None` where row and feature are equal."""

    def __init__(self, config: MFNConfig, layer: int) -> None:
        super().__init__()
        self.config = config
        self.layer = layer
        for name, table in self._tables().items():
            if table is None:  # accelerate cannot offload a buffer without a value
                setattr(self, name, None)
            else:
                self.register_buffer(name, table, persistent=False)

    @classmethod
    def of(cls, config: MFNConfig, layer: int) -> FeatureRows | None:
        """Makes the tables of a layer, or returns `None` if it has no pruned features."""
        return cls(config, layer) if str(layer) in config.pruned_features else None

    def _tables(self) -> dict[str, Tensor | None]:
        def kept(removed: dict[str, list[int]]) -> Tensor:
            there = torch.ones(self.config.num_features, dtype=torch.bool, device="cpu")
            there[removed.get(str(self.layer), [])] = False
            return there

        config, layer = self.config, str(self.layer)
        with_encoder, with_direction = kept(config.removed_encoder_rows), kept(config.removed_decoder_rows)
        rows = (with_direction.cumsum(0) - 1).masked_fill(~with_direction, 0)
        return {
            "pruned": ~kept(config.pruned_features),
            "encoder_names": with_encoder.nonzero().flatten() if layer in config.removed_encoder_rows else None,
            "decoder_rows": rows if layer in config.removed_decoder_rows else None,
        }

    @torch.no_grad()
    def fill(self) -> None:
        """Writes the tables again, after loading put empty memory in their place."""
        for name, table in self._tables().items():
            if table is not None:
                getattr(self, name).copy_(table)

    def name(self, pairs: SparseCode) -> SparseCode:
        """Turns pairs (..., K) by row of the encoder into pairs by feature. Pruned ones get value 0 and no gradient."""
        names = pairs.indices if self.encoder_names is None else self.encoder_names[pairs.indices]
        return SparseCode(names, pairs.values.masked_fill(self.pruned[names], 0), self.config.num_features)

    def locate(self, code: SparseCode) -> SparseCode:
        """Turns pairs (..., K) by feature into pairs by row of the decoder."""
        return code if self.decoder_rows is None else code._replace(indices=self.decoder_rows[code.indices])

    def find(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the rows (R,) in the encoder and (R,) in the decoder of features (R,) that have both."""
        encoder = features if self.encoder_names is None else torch.searchsorted(self.encoder_names, features)
        return encoder, features if self.decoder_rows is None else self.decoder_rows[features]

    def tie(self, directions: Tensor) -> Tensor:
        """Returns starting rows of the encoder: the decoder's, in the encoder's order."""
        by_name = directions if self.decoder_rows is None else directions[self.decoder_rows]
        return by_name if self.encoder_names is None else by_name[self.encoder_names]


__all__ = ["FeatureRows"]
