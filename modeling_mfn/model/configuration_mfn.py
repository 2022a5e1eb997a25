"""Configuration of an MFN model: the base model's own config, and the settings of its MFN layers."""

import copy
import re
from collections.abc import Iterable, Mapping
from dataclasses import field, fields
from typing import Any, ClassVar, Literal

from huggingface_hub.errors import StrictDataclassFieldValidationError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

from .base_settings import BaseSettings
from .checks import as_number, as_whole, check_type, is_whole, naming, shown
from .feature_names import FeatureName, existing_feature, format_feature, is_among
from .setting_checks import CHECKS, EDITS
from .version import __version__

MAX_BLOCKS = 10_000
"""Largest number of blocks, so that a damaged config cannot ask for any amount of memory."""


class MFNConfig(BaseSettings, PreTrainedConfig):
    r"""
    Configuration of [`MFNModel`] and [`MFNForCausalLM`].

    Args:
        text_config (`PreTrainedConfig` or `dict`):
            Config of the base model. It is copied; an instance that is passed in stays as it is.
        layers (`"all"` or `list[int]`, *optional*, defaults to `"all"`):
            Blocks that get an MFN layer, counted from 0. In a block whose attention and MLP read the same stream, as
            in GPT-NeoX, the layer stands before both. With `codes="update"` block 0 of such a model has none, because
            nothing is written before it.
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
        active_preset (`str`, *optional*):
            Preset that steers the model without a call of `model.steer`, also in tools that only load a folder. It acts
            in evaluation mode. Training refuses it, and readers of features such as `explain` go without it.
        direction_norms (`dict[str, float]`, *optional*, defaults to `{}`):
            Feature, as `"L6/1234"` -> norm of its decoder direction, where the norm is not 1. `model.bake` writes
            these norms, and training keeps them.
        pruned_features (`dict[str, list[int]]`, *optional*, defaults to `{}`):
            Layer -> features without effect. `MFNForCausalLM.prune_features` adds to them.
        removed_decoder_rows, removed_encoder_rows (`dict[str, list[int]]`, *optional*, defaults to `{}`):
            Pruned features whose weights `MFNForCausalLM.compact` removed; the layer has so many rows less.
        other_sites (`dict[str, str]`, *optional*, defaults to `{}`):
            Layer -> hook point of the SAE that its weights are from, where the SAE was trained at another place than
            the layer's (`from_saes`). The model card warns of it.
        weights_digest (`str`, *optional*):
            Digest of the weights that this config was saved with. `from_pretrained` refuses other weights next to it.
        features_digest (`str`, *optional*):
            Digest of the weights as the last training left them, which names the features. Casts, edits and shards keep
            it. An atlas with another name is of other features.
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
    steering_presets: dict = field(default_factory=dict)
    active_preset: str | None = None
    direction_norms: dict = field(default_factory=dict)
    pruned_features: Any = None
    removed_decoder_rows: Any = None
    removed_encoder_rows: Any = None
    other_sites: dict[str, str] = field(default_factory=dict)
    weights_digest: str | None = None
    features_digest: str | None = None
    mfn_version: str = __version__

    def __post_init__(self, expansion_factor: float | None = None, **kwargs: Any) -> None:
        _check_version(self.mfn_version)
        self.text_config = _own_text_config(self.text_config)
        for dtype in (self.dtype, kwargs.get("torch_dtype"), self.text_config.dtype):
            _check_dtype(dtype)
        if self.text_config.hidden_size < 2:
            raise ValueError(
                f"hidden_size is {self.text_config.hidden_size}; MFN layers need a residual stream of 2 or more"
            )
        as_whole("num_hidden_layers", self.text_config.num_hidden_layers, 1, MAX_BLOCKS)
        kwargs = self.share_with_base(kwargs)
        check_type("id2label", self.id2label, dict | None)
        self.num_features = _resolve_num_features(self.num_features, expansion_factor, self.text_config.hidden_size)
        self._check_settings(CHECKS)
        # the base class sets text_config's implementations and flag to its own; start from those that text_config has
        kwargs.setdefault("attn_implementation", self.text_config._attn_implementation)
        kwargs.setdefault("experts_implementation", self.text_config._experts_implementation)
        kwargs.setdefault("output_attentions", self.text_config.output_attentions)
        super().__post_init__(**kwargs)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute. A setting that the constructor would refuse is a `ValueError` and changes nothing."""
        if name in TYPES:
            check_type(name, value, TYPES[name])
        if name in CHECKS and "_name_or_path" in self.__dict__:  # the constructor is through
            before = {each: self.__dict__[each] for each in CHECKS}
            try:
                self.__dict__[name] = value
                self._check_settings([name] if name not in NEEDED_BY_OTHERS else CHECKS)
            except ValueError:
                self.__dict__.update(before)
                raise
        else:
            try:
                super().__setattr__(name, value)
            except StrictDataclassFieldValidationError as error:  # transformers' own check of a setting of its own
                raise ValueError(f"{name} is {shown(value)}; {error.__cause__}") from error

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Reads a config as transformers does. An error names the folder or id."""
        with naming(pretrained_model_name_or_path):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> tuple[dict, dict]:
        """Reads a config as transformers does; `ValueError` if it is that of a model without MFN layers."""
        try:
            found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (RecursionError, TypeError) as error:  # nested too deeply, or no mapping
            raise ValueError(f"the config of {pretrained_model_name_or_path} is damaged: {error}") from error
        check_type(f"the config of {pretrained_model_name_or_path}", found, dict)
        kind = found.get("model_type")
        if kind is None:
            raise ValueError(f"the config of {pretrained_model_name_or_path} has no model_type")
        if kind != cls.model_type:
            raise ValueError(
                f"{pretrained_model_name_or_path} is a {shown(kind)} model without MFN layers; convert it first: "
                f"mfn convert {pretrained_model_name_or_path} OUTPUT --expansion-factor 8"
            )
        return found, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Makes a config as transformers does. Settings among the keyword arguments are checked together."""
        check_type("config_dict", config_dict, dict)
        given = {name: kwargs.pop(name) for name in (*TYPES, *CHECKS) if name in kwargs}
        return super().from_dict(config_dict | given, **kwargs)

    def get_text_config(self, decoder: bool | None = None, encoder: bool | None = None) -> "MFNConfig":
        """Returns this config, which has the settings of its base: the model has no part that reads anything but text.

        vLLM takes a model whose text config is another one for multimodal.
        """
        return self

    def _check_settings(self, names: Iterable[str]) -> None:
        """Checks settings, each in terms of those before it in `CHECKS`, and keeps them in their final form."""
        for name in names:
            self.__dict__[name] = CHECKS[name](self, self.__dict__[name])

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
    def paper(cls, text_config: dict | PreTrainedConfig, **settings: Any) -> "MFNConfig":
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


def check_structure(config: MFNConfig, layers: Mapping[int, Any]) -> None:
    """Checks that a config still says what a model was made with, as settings can be assigned.

    Raises:
        ValueError: if a setting that fixes the weights is another one.
    """
    if config.layers != sorted(layers):
        raise ValueError(f"layers is {config.layers}, and the model was made with {sorted(layers)}; set it back")
    for at, layer in layers.items():
        m = len(layer.encoder.weight) + len(config.removed_encoder_rows.get(str(at), []))
        has_bias = layer.decoder.bias is not None
        for name, made in {"num_features": m, "decoder_bias": has_bias}.items():
            if getattr(config, name) != made:
                raise ValueError(f"{name} is {getattr(config, name)}, and layer {at} was made with {made}; set it back")


def _check_version(version: str) -> None:
    major = re.match(r"[0-9]{1,9}(?=[.])", version)
    if major is None:
        raise ValueError(f"mfn_version is {shown(version)}; it must be a version such as {__version__}")
    if int(major[0]) > int(__version__.split(".")[0]):
        raise ValueError(
            f"this model was written by modeling_mfn {version}, newer than the installed {__version__}; "
            "upgrade modeling_mfn to load it"
        )


def _check_dtype(dtype: Any) -> None:
    if dtype is None:
        return
    import torch  # which configs do not need otherwise, and takes seconds

    named = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(named, torch.dtype):
        raise ValueError(f"dtype is {shown(dtype)}; it must be a type of torch, such as bfloat16")


def _own_text_config(text_config: Any) -> PreTrainedConfig:
    if isinstance(text_config, PreTrainedConfig):
        return copy.deepcopy(text_config)
    model_type = text_config.get("model_type") if isinstance(text_config, dict) else None
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"text_config is {shown(text_config)}; it must be the base model's config, or a dict of it with its "
            "model_type"
        )
    try:
        return CONFIG_MAPPING[model_type](**text_config)
    except Exception as error:  # each config of transformers has its own
        raise ValueError(f"text_config is not the config of a {model_type} model: {error}") from error


def _resolve_num_features(num_features: Any, expansion_factor: Any, hidden_size: int) -> int:
    if (num_features is None) == (expansion_factor is None):
        raise ValueError(
            f"num_features is {shown(num_features)} and expansion_factor is {shown(expansion_factor)}; give exactly "
            "one of them"
        )
    if num_features is None:
        num_features = as_number("expansion_factor", expansion_factor) * hidden_size
    elif not is_whole(num_features):
        num_features = as_number("num_features", num_features)
    return as_whole("num_features", int(num_features) if num_features == int(num_features) else num_features, 1)


TYPES = {
    each.name: each.type
    for each in fields(MFNConfig)
    if each.name in MFNConfig.__annotations__ and each.name not in {"text_config", *CHECKS}
}
"""Settings for which the type says all."""

NEEDED_BY_OTHERS = {"num_features", "layers", "steering_presets", *EDITS}
"""Settings with which others must fit."""

__all__ = ["MFNConfig"]
