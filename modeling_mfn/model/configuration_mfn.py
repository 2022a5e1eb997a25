"""Configuration of an MFN model: the base model's own config, and the settings of its MFN layers."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import field
from typing import Any, ClassVar, Literal

from huggingface_hub.dataclasses import strict
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .base_settings import BaseSettings
from .feature_names import FeatureName, existing_feature, format_feature, is_among, is_whole
from .presets import read_presets
from .version import __version__

EDITS = ("pruned_features", "removed_decoder_rows", "removed_encoder_rows")
"""Fields that record edited features. Each holds a part of the one before."""


def check_alpha(alpha: float) -> float:
    """Returns the blend as a float; `ValueError` unless it is finite and in [0, 1]."""
    if not math.isfinite(alpha) or not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha is {alpha}; it must be a finite number from 0 (base model) to 1 (features only)")
    return float(alpha)


def check_k(k: int, num_features: int, removed: int = 0) -> int:
    """Returns the number of active features; `ValueError` unless 1 <= k <= num_features - removed."""
    if not is_whole(k) or not 1 <= k <= num_features - removed:
        less = f", less {removed} that compact() removed" if removed else ""
        raise ValueError(f"k is {k}; it must be a whole number from 1 to num_features ({num_features}){less}")
    return k


def check_layers(layers: str | list[int], num_blocks: int) -> list[int]:
    """Returns block indices in ascending order; "all" stands for every block.

    Raises:
        ValueError: on an index that is out of range, given twice, or not a whole number.
    """
    if layers == "all":
        return list(range(num_blocks))
    if isinstance(layers, str) or not layers:
        raise ValueError(
            f'layers is {layers!r}; it must be "all" or a list of block indices from 0 to {num_blocks - 1}'
        )
    for layer in layers:
        if not is_whole(layer) or not 0 <= layer < num_blocks:
            raise ValueError(f"layers contains {layer}; the base model has blocks 0 to {num_blocks - 1}")
        if layers.count(layer) > 1:
            raise ValueError(f"layers contains {layer} twice; each block can have one MFN layer")
    return sorted(layers)


def check_features(name: str, features: Any, layers: list[int], num_features: int) -> dict[str, list[int]]:
    """Returns feature indices by layer: each list ascending, without repetition, keys as strings, as JSON has them.

    Raises:
        ValueError: on a layer or a feature that does not exist.
    """
    checked = {}
    for layer, indices in (features or {}).items():
        if not str(layer).isdigit() or int(layer) not in layers:
            raise ValueError(f"{name} has layer {layer}; layers with features are {layers}")
        for index in indices:
            if not is_whole(index) or not 0 <= index < num_features:
                raise ValueError(f"{name} has L{layer}/{index}; features are 0 to {num_features - 1}")
        if indices:
            checked[str(int(layer))] = sorted(set(indices))
    return checked


@strict
class MFNConfig(BaseSettings, PreTrainedConfig):
    r"""
    Configuration of [`MFNModel`] and [`MFNForCausalLM`].

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            Config of the base model. It is copied; an instance that is passed in stays as it is.
        layers (`"all"` or `list[int]`, *optional*, defaults to `"all"`):
            Blocks that get an MFN layer, counted from 0.
        num_features (`int`, *optional*):
            m, features of each MFN layer. Give this or `expansion_factor`.
        expansion_factor (`int`, *optional*):
            m / d. Only an argument: the config keeps `num_features`.
        k (`int`, *optional*, defaults to 32):
            K of eq. 1, the most active features per token. `MFNForCausalLM.set_k` changes it.
        alpha (`float`, *optional*, defaults to 0.0):
            Blend of eq. 3; 0 is the base model, 1 lets only features through. `MFNForCausalLM.set_blend` changes it.
        codes (`"stream"` or `"update"`, *optional*, defaults to `"stream"`):
            Vector that an MFN layer codes: the residual stream h, or u = h - s. u is the sum of what attention and MLP
            have written since the last MFN layer. s is the stream that this layer left. Before the first MFN layer, s
            is the input of block 0.
        coding_rounds (`int`, *optional*, defaults to 1):
            Rounds in which a token's K features are chosen. In the first the encoder chooses. In each further round
            K / `coding_rounds` features are added that fit best what the code leaves of the input (see `pursuit.py`).
            1 is eq. 1: the encoder chooses all. More rounds than K count as K.
        refine_steps (`int`, *optional*, defaults to 0):
            Steps after each round that move the values of the chosen features towards their least-squares fit. 0 keeps
            the encoder's values, as eq. 1 has them.
        blend_into (`"residual"` or `"mlp"`, *optional*, defaults to `"residual"`):
            Target of eq. 3: the residual stream itself, so that MLP and skip path read only features, or just the
            MLP's input.
        input_norm (`"layer"` or `"none"`, *optional*, defaults to `"layer"`):
            `"layer"` standardises each token's residual before encoding and undoes this after decoding. `"none"`
            encodes the residual as it is.
        decoder_bias (`bool`, *optional*, defaults to `True`):
            Learnt constant in eq. 2: h_hat = D z + b.
        shared_decoder (`bool`, *optional*, defaults to `False`):
            One decoder D for all MFN layers (section 8 of the paper); encoders and biases stay their own.
        steering_presets (`dict`, *optional*, defaults to `{}`):
            Named interventions, as JSON (see `presets.py`). `model.save_preset` writes them, `model.steer` takes them.
        direction_norms (`dict[str, float]`, *optional*, defaults to `{}`):
            Feature, as `"L6/1234"` -> norm of its decoder direction, where the norm is not 1. `model.bake` writes
            these norms, and training keeps them.
        pruned_features (`dict[str, list[int]]`, *optional*, defaults to `{}`):
            Layer -> features without effect. `MFNForCausalLM.prune_features` adds to them.
        removed_decoder_rows, removed_encoder_rows (`dict[str, list[int]]`, *optional*, defaults to `{}`):
            Pruned features whose weights `MFNForCausalLM.compact` removed; the layer has so many rows less.
        mfn_version (`str`, *optional*):
            Version of this package that wrote the config. One of a newer major version is refused.
    """

    model_type = "mfn"
    sub_configs = {"text_config": AutoConfig}
    has_no_defaults_at_init = True
    base_model_fsdp_plan: ClassVar[dict[Any, str]] = {}  # the backbone, a model of its own, brings its plans

    # Any: fields take other types than they keep; __post_init__ checks them
    text_config: Any = None
    layers: Any = "all"
    num_features: Any = None
    k: int = 32
    alpha: float | int = 0.0
    codes: Literal["stream", "update"] = "stream"
    coding_rounds: int = 1
    refine_steps: int = 0
    blend_into: Literal["residual", "mlp"] = "residual"
    input_norm: Literal["layer", "none"] = "layer"
    decoder_bias: bool = True
    shared_decoder: bool = False
    steering_presets: Any = field(default_factory=dict)
    direction_norms: Any = field(default_factory=dict)
    pruned_features: Any = None
    removed_decoder_rows: Any = None
    removed_encoder_rows: Any = None
    mfn_version: str = __version__

    def __post_init__(self, expansion_factor: int | None = None, **kwargs: Any) -> None:
        if int(self.mfn_version.split(".")[0]) > int(__version__.split(".")[0]):
            raise ValueError(
                f"this model was written by modeling_mfn {self.mfn_version}, newer than the installed {__version__}; "
                "upgrade modeling_mfn to load it"
            )
        self.text_config = _own_text_config(self.text_config)
        kwargs = self.share_with_base(kwargs)
        self.layers = check_layers(self.layers, self.text_config.num_hidden_layers)
        self.num_features = _resolve_num_features(self.num_features, expansion_factor, self.text_config.hidden_size)
        for name in EDITS:
            setattr(self, name, check_features(name, getattr(self, name), self.layers, self.num_features))
        _check_removed(self)
        check_k(self.k, self.num_features, self.most_removed)
        self.alpha = check_alpha(self.alpha)
        _check_choice("codes", self.codes, ("stream", "update"))
        for name, least in (("coding_rounds", 1), ("refine_steps", 0)):
            if not is_whole(getattr(self, name)) or getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be a whole number of at least {least}")
        _check_choice("blend_into", self.blend_into, ("residual", "mlp"))
        _check_choice("input_norm", self.input_norm, ("layer", "none"))
        read_presets(self.steering_presets, self.layers, self.num_features)
        _check_norms(self.direction_norms, self.layers, self.num_features)
        # the base class sets text_config's attention and flag to its own; start from those that text_config has
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        kwargs.setdefault("output_attentions", self.text_config.output_attentions)
        super().__post_init__(**kwargs)

    @property
    def codes_by_pursuit(self) -> bool:
        """True if codes depend on the directions of features, and not on the encoder alone."""
        return self.coding_rounds > 1 or self.refine_steps > 0

    @property
    def expansion_factor(self) -> float:
        """Features per hidden unit, m / d."""
        return self.num_features / self.text_config.hidden_size

    @property
    def most_removed(self) -> int:
        """Largest number of features that no longer compete in one layer; k can be at most the rest."""
        return max(map(len, self.removed_encoder_rows.values()), default=0)

    @classmethod
    def paper(cls, text_config: dict | PreTrainedConfig, **settings: Any) -> MFNConfig:
        """Makes a config with every setting of the paper, before the keyword arguments, which are the class's own.

        Eq. 1 reads the residual itself, eq. 2 has no bias, and eq. 3 replaces `h_MLP`, the MLP's input alone.
        """
        literal = {"input_norm": "none", "decoder_bias": False, "blend_into": "mlp"}
        return cls(text_config=text_config, **(literal | settings))

    def check_feature(self, feature: FeatureName, pruned: bool = False) -> tuple[int, int]:
        """Returns (layer, index) of a feature that a model of this config has.

        Args:
            feature: (layer, index) or `"L6/1234"`.
            pruned: accept a pruned feature.

        Raises:
            ValueError: if the feature does not exist, or is pruned and must not be.
        """
        layer, index = existing_feature(feature, self.layers, self.num_features)
        if not pruned and is_among((layer, index), self.pruned_features):
            raise ValueError(f"{format_feature(layer, index)} is pruned and has no effect; choose another feature")
        return layer, index


def _check_removed(config: MFNConfig) -> None:
    """Checks that only pruned features have no direction, and only features without a direction have no encoder."""
    for inner, outer in itertools.pairwise(EDITS[::-1]):
        for layer, features in getattr(config, inner).items():
            if more := set(features) - set(getattr(config, outer).get(layer, [])):
                raise ValueError(f"{inner} has L{layer}/{min(more)}, which is not in {outer}")
    if config.shared_decoder and config.removed_decoder_rows:
        raise ValueError("shared_decoder is True, so removed_decoder_rows must be empty: other layers use these rows")


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}")


def _check_norms(norms: Any, layers: list[int], num_features: int) -> None:
    for feature, norm in norms.items():
        existing_feature(feature, layers, num_features)
        if not math.isfinite(norm) or norm < 0:
            raise ValueError(f"direction_norms gives {feature} the norm {norm}; it must be finite and at least 0")


def _own_text_config(text_config: dict | PreTrainedConfig | None) -> PreTrainedConfig:
    if isinstance(text_config, PreTrainedConfig):
        return copy.deepcopy(text_config)
    if isinstance(text_config, dict) and text_config.get("model_type") in CONFIG_MAPPING:
        return CONFIG_MAPPING[text_config["model_type"]](**text_config)
    raise ValueError(
        f"text_config is {text_config!r}; it must be the base model's config, or a dict of it with its model_type"
    )


def _resolve_num_features(num_features: int | None, expansion_factor: int | None, hidden_size: int) -> int:
    if (num_features is None) == (expansion_factor is None):
        raise ValueError(
            f"num_features is {num_features} and expansion_factor is {expansion_factor}; give exactly one of them"
        )
    features = num_features if num_features is not None else expansion_factor * hidden_size  # type: ignore[operator]
    if features != int(features) or features < 1:
        raise ValueError(f"num_features is {features}; it must be a whole number of at least 1")
    return int(features)


__all__ = ["MFNConfig"]
