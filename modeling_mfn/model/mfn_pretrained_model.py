"""Base class of MFN models: what transformers asks of an architecture, and the settings of all MFN layers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .configuration_mfn import MFNConfig
from .families import family_of
from .feature_editing import FeatureEditing
from .feature_weights import FeatureDecoder
from .features_digest import FeaturesDigest
from .mfn_layer import MFNLayer
from .peft_copies import AdapterCopy, show_settings
from .setting_checks import check_alpha, check_k
from .steerable import SteerableModel
from .whole_files import WholeFiles


@contextmanager
def _plain_class(model: nn.Module) -> Iterator[None]:
    """Gives a model its own class back while it is saved: FSDP makes a subclass, whose name and code would be saved."""
    from torch.distributed.fsdp import FSDPModule

    sharded = type(model)
    if isinstance(model, FSDPModule):
        model.__class__ = sharded.__bases__[-1]
    try:
        yield
    finally:
        model.__class__ = sharded


class MFNPreTrainedModel(SteerableModel, FeatureEditing, FeaturesDigest, WholeFiles, PreTrainedModel):
    """Base class of MFN models: MFN layers, editing, steering, and what transformers asks of an architecture."""

    config_class = MFNConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _skip_keys_device_placement = ["cache", "past_key_values"]

    @property
    def config(self) -> MFNConfig:
        """The model's config. With PEFT adapters its alpha and k are those of the adapter or model in force."""
        if AdapterCopy.any_own and hasattr(self.base_model, "backbone"):
            show_settings(self._config, list(self._layers(self._config).values()))
        return self._config

    @config.setter
    def config(self, config: MFNConfig) -> None:
        self._config = config

    @property
    def device(self) -> torch.device:
        """Device of the model's inputs: that of its weights, or where accelerate brings offloaded ones."""
        device = super().device
        if device.type != "meta" or not hasattr(self, "_hf_hook"):
            return device
        return torch.device(getattr(self._hf_hook, "execution_device", None) or "cpu")

    def initialize_weights(self) -> None:
        """Sets starting weights of MFN layers and backbone that no checkpoint gave."""
        # The backbone would initialise MFN layers as if they were its own modules, so they come first.
        self.initialise_mfn_layers()
        # The backbone comes next, on its own. As a part of a model with custom code, its modules without parameters
        # would count as done, and GPT-2 rescales its projections from such a module.
        self.base_model.backbone.initialize_weights()
        super().initialize_weights()

    def initialise_mfn_layers(self) -> None:
        """Sets starting weights of MFN layers that have none yet: random unit directions, encoders tied to them."""
        directions = None
        for layer in (module for module in self.modules() if isinstance(module, MFNLayer)):
            if layer.rows is not None:
                layer.rows.fill()
            if not getattr(layer, "_is_hf_initialized", False):
                layer.initialise(directions)
                for module in layer.modules():
                    module._is_hf_initialized = True  # type: ignore[assignment]
            if self.config.shared_decoder:
                directions = layer.decoder.weight

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Saves a model as transformers does, with the code that loads it where this package is not installed."""
        # a saved folder works with every Auto class, whichever of the two models wrote it
        self.config.auto_map = {
            "AutoConfig": "configuration_mfn.MFNConfig",
            "AutoModel": "mfn_for_causal_lm.MFNModel",
            "AutoModelForCausalLM": "mfn_for_causal_lm.MFNForCausalLM",
        }
        with _plain_class(self):
            super().save_pretrained(*args, **kwargs)

    def _adjust_bias(self, output_embeddings: nn.Module, input_embeddings: Tensor) -> None:
        # tying a weight resizes the module's bias to the weight's rows: right for an LM head, wrong for a decoder
        if not isinstance(output_embeddings, FeatureDecoder):
            super()._adjust_bias(output_embeddings, input_embeddings)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # the backbone's; transformers looks for experts in the source of this module

    @property
    def mfn_layers(self) -> dict[int, MFNLayer]:
        """MFN layers by block index, in order."""
        return self._layers(self.config)

    def _layers(self, config: MFNConfig) -> dict[int, MFNLayer]:
        blocks = getattr(self.base_model.backbone, family_of(config.text_config).blocks)
        return {layer: blocks[layer].mfn for layer in config.layers}

    def set_blend(self, alpha: float) -> None:
        """Sets alpha of eq. 3, in [0, 1], for all MFN layers and in the config."""
        self._change_settings(check_alpha(alpha), self.config.k)

    def set_k(self, k: int) -> None:
        """Sets K of eq. 1, from 1 to num_features, for all MFN layers and in the config."""
        self._change_settings(self.config.alpha, check_k(k, self.config.num_features, self.config.most_removed))

    def _change_settings(self, alpha: float, k: int) -> None:
        for layer in self.mfn_layers.values():
            if layer.own is not None:  # belongs to an adapter, or to a model with adapters
                layer.take(alpha, k)
        self.config.alpha, self.config.k = alpha, k


__all__ = ["MFNPreTrainedModel"]
