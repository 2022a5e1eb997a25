"""The transformer block with an MFN layer: the paper's Figure 1, for the blocks of every family."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig

from .families import FAMILIES, BlockParts, Family
from .mfn_layer import MFNLayer
from .mfn_pass import MFNPass


class MFNBlock:
    """A transformer block with an MFN layer between attention and MLP, Figure 1 of the paper.

    It is mixed into a block class of transformers and calls the children by that class's names. An existing block
    becomes one when its class changes.
    """

    parts: ClassVar[BlockParts]
    mfn: MFNLayer

    def forward(self, hidden_states: Tensor, *args: Any, mfn_pass: MFNPass | None = None, **kwargs: Any) -> Tensor:
        """Runs the block: (B, T, d) -> (B, T, d). Further arguments go to the attention."""
        h = hidden_states + self.written_by_attention(hidden_states, *args, **kwargs)
        features, residual = self.read(h, mfn_pass)
        return residual + self.written_by_mlp(features)

    def read(self, h: Tensor, mfn_pass: MFNPass | None) -> tuple[Tensor, Tensor]:
        """Returns the MFN layer's output for the residual stream h, and the stream to go on with, each (B, T, d)."""
        mfn_pass = mfn_pass or MFNPass()
        features = self.mfn(h, mfn_pass)
        mfn_pass.leave_stream(self.mfn.layer_index, features)
        return features, features if self.mfn.config.blend_into == "residual" else h

    def written_by_attention(self, stream: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Returns what attention adds to the residual stream that it reads: (B, T, d) -> (B, T, d)."""
        read = self._through(self.parts.attention_norm, stream)
        attended = getattr(self, self.parts.attention)(read, *args, **kwargs)[0]
        return self._scaled(self._through(self.parts.after_attention, attended))

    def written_by_mlp(self, stream: Tensor) -> Tensor:
        """Returns what the MLP adds to the residual stream that it reads: (B, T, d) -> (B, T, d)."""
        read = self._through(self.parts.mlp_norm, stream)
        return self._scaled(self._through(self.parts.after_mlp, getattr(self, self.parts.mlp)(read)))

    def _through(self, part: str | None, vectors: Tensor) -> Tensor:
        return vectors if part is None else getattr(self, part)(vectors)

    def _scaled(self, written: Tensor) -> Tensor:
        return written if self.parts.multiplier is None else written * getattr(self, self.parts.multiplier)


class MFNParallelBlock(MFNBlock):
    """A transformer block whose attention and MLP read the same stream, with an MFN layer before both."""

    def forward(self, hidden_states: Tensor, *args: Any, mfn_pass: MFNPass | None = None, **kwargs: Any) -> Tensor:
        """Runs the block: (B, T, d) -> (B, T, d). Further arguments go to the attention."""
        features, residual = self.read(hidden_states, mfn_pass)
        attended = self.written_by_attention(residual, *args, **kwargs)
        return self.written_by_mlp(features) + attended + residual


def mfn_block_class(family: Family, text_config: PreTrainedConfig) -> type[MFNBlock]:
    """Returns the class of a family's blocks with an MFN layer."""
    return _block_class(family.block, family.parts, family.is_parallel(text_config))


@cache
def _block_class(block: str, parts: BlockParts, parallel: bool) -> type[MFNBlock]:
    module, _, name = block.rpartition(".")
    base = getattr(import_module(f"transformers.models.{module}.modeling_{module}"), name)
    kind = MFNParallelBlock if parallel else MFNBlock
    members = {"parts": parts, "__module__": __name__, "__doc__": f"{name} of transformers with an MFN layer."}
    return type(f"{kind.__name__.removesuffix('Block')}{name}", (kind, base), members)


def __getattr__(name: str) -> type[MFNBlock]:
    """Makes a block class by its name, as `pickle` asks for it."""
    for family in FAMILIES.values():
        for parallel in (False, True):
            prefix = "MFNParallel" if parallel else "MFN"
            if name == prefix + family.block.rpartition(".")[2]:
                return _block_class(family.block, family.parts, parallel)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = ["MFNBlock", "MFNParallelBlock", "mfn_block_class"]
