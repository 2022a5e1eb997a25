"""Names of the place of an MFN layer, in the vocabularies of other packages."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from ..model.configuration_mfn import MFNConfig
from ..model.families import family_of

LAYER = re.compile(r"[._](\d+)(?=[./,]|$)")


class HookPoint(NamedTuple):
    """One place of a model by its names."""

    transformer_lens: str
    """Hook of TransformerLens, such as `"blocks.6.hook_resid_mid"`."""
    transformers: str
    """Path of the module in the MFN model, such as `"model.backbone.h.6.mfn.hook_in"`."""
    short: str
    """Stream and block, such as `"resid_mid.6"`."""

    @property
    def sparsify(self) -> str:
        """Path of the module below the head, as sparsify names folders: `"backbone.h.6.mfn.hook_in"`."""
        return self.transformers.removeprefix("model.")


def stream_of(text_config: PreTrainedConfig) -> str:
    """Returns TransformerLens' name of the residual stream that an MFN layer of this base model codes."""
    return "resid_pre" if family_of(text_config).is_parallel(text_config) else "resid_mid"


def hook_point(text_config: PreTrainedConfig, layer: int) -> HookPoint:
    """Returns the names of an MFN layer's input.

    Args:
        text_config: config of the base model.
        layer: block index.
    """
    stream = stream_of(text_config)
    tap = f"model.backbone.{family_of(text_config).blocks}.{layer}.mfn.hook_in"
    return HookPoint(f"blocks.{layer}.hook_{stream}", tap, f"{stream}.{layer}")


def hook_name(config: MFNConfig, layer: int) -> str:
    """Returns the usual name of what an MFN layer codes: TransformerLens' for a stream.

    Updates are at no hook of TransformerLens; their name is the path of the module that they pass.
    """
    point = hook_point(config.text_config, layer)
    return point.transformer_lens if config.codes == "stream" else point.transformers


def is_at(hook: str | None, text_config: PreTrainedConfig, layer: int) -> bool:
    """Returns True if a name in any vocabulary is that of an MFN layer's input."""
    point = hook_point(text_config, layer)
    return hook in (*point, point.sparsify, *_names_by_the_block_before(text_config, layer))


def _names_by_the_block_before(text_config: PreTrainedConfig, layer: int) -> tuple[str, ...]:
    """Names of an MFN layer's input as the output of the block before, which it is in parallel families alone."""
    family = family_of(text_config)
    if layer == 0 or not family.is_parallel(text_config):
        return ()
    module = f"{family.blocks}.{layer - 1}"
    prefix = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)].base_model_prefix
    return f"blocks.{layer - 1}.hook_resid_post", module, f"{prefix}.{module}"


def layer_of(hook: str | None) -> int | None:
    """Returns the block index in a name; `None` if it has none."""
    found = LAYER.search(hook or "")
    return None if found is None else int(found[1])


def stated_hook(stated: Any, folder: str, codes: Any) -> str | None:
    """Returns the hook point that metadata state; otherwise the name of the SAE's folder, if that names a block.

    An SAE of an MFN layer that codes updates (`codes`) has another place than the stream, and the name says so.
    """
    hook = str(stated) if stated else None if layer_of(folder) is None else folder
    return f"{hook}, without the stream before" if hook and codes == "update" else hook


def block_of(hook: str | None, text_config: PreTrainedConfig) -> int | None:
    """Returns the block whose MFN layer has the input of this name; for other places, the block index in the name."""
    named = layer_of(hook)
    if named is not None and is_at(hook, text_config, named + 1):
        return named + 1
    return named


__all__ = ["HookPoint", "block_of", "hook_name", "hook_point", "is_at", "layer_of", "stated_hook", "stream_of"]
