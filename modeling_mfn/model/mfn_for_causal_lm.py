"""MFN models: a causal LM of transformers with a sparse feature layer inside its blocks."""

import os
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModel, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, can_return_tuple

from .autoencoders import Autoencoders
from .configuration_mfn import MFNConfig
from .conversion import convert, unwrap
from .families import UNSUPPORTED, family_of
from .mfn_block import mfn_block_class
from .mfn_layer import MFNLayer
from .mfn_pass import EMBEDDINGS, MFNPass
from .mfn_pretrained_model import MFNPreTrainedModel
from .model_outputs import CACHE, MFNCausalLMOutput, MFNModelOutput, one_cache
from .sparse_code import SparseCode
from .steering import edits_in_force, generating
from .unguided_training import tell_if_nothing_is_learnt


def _leave_embeddings(block: nn.Module, arguments: tuple[Tensor, ...], options: dict[str, Any]) -> None:
    """Keeps the input of block 0, the stream before the first MFN layer."""
    mfn_pass = options.get("mfn_pass")
    if mfn_pass is None:
        raise ValueError('the backbone was called on its own; with codes="update" call the MFN model around it')
    mfn_pass.leave_stream(EMBEDDINGS, arguments[0])
    mfn_pass.position_ids = options.get("position_ids")


class MFNModel(MFNPreTrainedModel):
    """The backbone with its MFN layers, without an LM head."""

    def __init__(self, config: MFNConfig) -> None:
        super().__init__(config)
        family = family_of(config.text_config)
        try:
            self.backbone = AutoModel.from_config(config.text_config)
        except KeyError as error:
            raise ValueError(f"text_config names {error}, such as an activation that transformers lacks") from error
        config._attn_implementation = self.backbone.config._attn_implementation  # some backbones lack that of a setting
        blocks = getattr(self.backbone, family.blocks)
        for layer in config.layers:
            blocks[layer].__class__ = mfn_block_class(family, config.text_config)
            blocks[layer].mfn = MFNLayer(config, layer)
        if config.codes == "update":
            blocks[0].register_forward_pre_hook(_leave_embeddings, with_kwargs=True)
        # device maps and FSDP look for the names of the block classes that are really there
        self.backbone._no_split_modules = {type(block).__name__ for block in blocks}
        decoders = [f"backbone.{family.blocks}.{layer}.mfn.decoder.weight" for layer in config.layers]
        self._tied_weights_keys = dict.fromkeys(decoders[1:], decoders[0]) if config.shared_decoder else {}
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_codes: bool = False,
        output_reconstructions: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MFNModelOutput:
        """Runs the model like its base. `output_codes` and `output_reconstructions` add each MFN layer's.

        `cache` is the newer name of `past_key_values`. Both work with every release of transformers.
        """
        cache = one_cache(past_key_values, cache)
        if kwargs.get("output_router_logits"):
            raise ValueError(f"output_router_logits is True; {UNSUPPORTED['output_router_logits']}")
        family_of(self.config.text_config)  # its settings may have been assigned
        request = kwargs.pop("reconstruction_request", None)  # private: further inputs of a training's feature losses
        if request is not None and request.perturb_embeddings is not None:
            if inputs_embeds is None:
                inputs_embeds, input_ids = self.get_input_embeddings()(input_ids), None
            inputs_embeds = request.perturb_embeddings(inputs_embeds)
        edits = edits_in_force(self, input_ids if inputs_embeds is None else inputs_embeds, cache)
        reconstructs = output_reconstructions or request is not None
        if self.training and not reconstructs and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            tell_if_nothing_is_learnt(self)
        streams: dict[int, Tensor] | None = {} if self.config.codes == "update" else None
        mfn_pass = MFNPass(edits, {} if output_codes else None, {} if reconstructs else None, request, streams)
        outputs = self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            mfn_pass=mfn_pass,
            return_dict=True,
            **{CACHE: cache},
            **kwargs,
        )
        mfn_pass.is_over = True
        return MFNModelOutput(
            last_hidden_state=outputs.last_hidden_state,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            codes=mfn_pass.codes,
            embedding_codes=self._embedding_codes(input_ids, outputs.last_hidden_state.shape[:2], mfn_pass)
            if output_codes
            else None,
            reconstructions=mfn_pass.reconstructions,
        )

    def _embedding_codes(
        self, input_ids: Tensor | None, shape: torch.Size, mfn_pass: MFNPass
    ) -> dict[str, SparseCode] | None:
        """Token and position of each token as codes (B, T, 1) of the embedding tables' rows."""
        if mfn_pass.streams is None:
            return None
        config = self.config.text_config
        family = family_of(config)
        tables = {
            "token": (input_ids, self.get_input_embeddings().get_parameter("weight"), family.embedding_scale(config))
        }
        if family.positions is not None:
            tables["position"] = (mfn_pass.position_ids, self.backbone.get_parameter(f"{family.positions}.weight"), 1.0)
        rows = {
            name: (ids.expand(shape)[..., None], table, scale)
            for name, (ids, table, scale) in tables.items()
            if ids is not None
        }
        return {
            name: SparseCode(ids, torch.full_like(ids, scale, dtype=table.dtype), len(table))
            for name, (ids, table, scale) in rows.items()
        }

    def get_input_embeddings(self) -> nn.Module:
        """Returns the backbone's token embedding."""
        return self.backbone.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the backbone's token embedding."""
        self.backbone.set_input_embeddings(value)

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        """Returns tied weights as transformers does, with the decoders that `shared_decoder=True` ties."""
        # transformers asks only whether embeddings are tied; decoders are shared either way
        return super().get_expanded_tied_weights_keys(all_submodels) | self._tied_weights_keys


class MFNForCausalLM(Autoencoders, MFNPreTrainedModel, GenerationMixin):
    """A causal language model whose blocks read the residual stream through their MFN layers."""

    publisher: ClassVar[Callable[..., Any] | None] = None
    """Function that `push_to_hub` calls with the model. The package sets it; it is None in the code that travels."""

    def __init__(self, config: MFNConfig) -> None:
        super().__init__(config)
        self.model = MFNModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        family = family_of(config.text_config)
        self.logits_form = family.logits
        self._tied_weights_keys = {"lm_head.weight": f"model.backbone.{family.embedding}.weight"}
        self.post_init()
        base_class = MODEL_FOR_CAUSAL_LM_MAPPING[type(config.text_config)]
        for plan in ("_tp_plan", "_pp_plan", "_fsdp_plan"):  # the head is spread over devices as the base's is
            if hasattr(self, plan):  # _fsdp_plan came with transformers 5.14
                getattr(self, plan).update(getattr(base_class, plan, None) or {})

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_codes: bool = False,
        output_reconstructions: bool = False,
        cache: Cache | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MFNCausalLMOutput:
        """Runs the model like its base. `output_codes` and `output_reconstructions` add each MFN layer's.

        `cache` is the newer name of `past_key_values`. Both work with every release of transformers.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_codes=output_codes,
            output_reconstructions=output_reconstructions,
            return_dict=True,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        outputs_of_head = self.lm_head(outputs.last_hidden_state[:, kept, :])
        logits = self.logits_form.of(outputs_of_head, self.config.text_config)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return MFNCausalLMOutput(
            loss=loss,
            logits=logits,
            **{CACHE: outputs.get(CACHE)},
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            codes=outputs.codes,
            embedding_codes=outputs.embedding_codes,
            reconstructions=outputs.reconstructions,
        )

    def generate(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """Generates as transformers does. Positions of steering are counted from the beginning of this prompt.

        Raises:
            ValueError: if codes or reconstructions are asked for, which `generate` has no place for.
        """
        settings = kwargs.get("generation_config") or self.generation_config
        for name in ("output_codes", "output_reconstructions"):
            if kwargs.get(name) or getattr(settings, name, False):
                raise ValueError(
                    f"generate cannot return what {name} asks for; call model(ids, {name}=True) on the generated ids"
                )
        embeddings, cache = (
            kwargs.get("inputs_embeds"),
            one_cache(kwargs.pop("past_key_values", None), kwargs.pop("cache", None)),
        )
        if cache is not None:
            kwargs[CACHE] = cache
        given = kwargs.get("input_ids") if inputs is None else inputs
        mask = None if cache is None else kwargs.get("attention_mask")
        with generating(self.base_model, given if embeddings is None else embeddings, mask):
            return super().generate(inputs, *args, **kwargs)

    def push_to_hub(self, repo_id: str, *, tokenizer: Any = None, atlas: Any = None, **options: Any) -> Any:
        """Uploads the model with its code, and with a model card where the package `modeling_mfn` is imported.

        Args:
            repo_id: `owner/name` on the Hub. Created if missing.
            tokenizer: Tokenizer to upload in the same commit.
            atlas: `FeatureAtlas` to upload as `features/` in the same commit. It replaces an earlier one.
            options: Arguments of transformers' `push_to_hub`: `private`, `revision`, `commit_message` and others.

        Returns:
            `huggingface_hub.CommitInfo` of the upload.

        Raises:
            ValueError: If a tokenizer or an atlas is given where the package is not imported.
        """
        if self.publisher is None:
            if tokenizer is not None or atlas is not None:
                raise ValueError("tokenizer and atlas need `import modeling_mfn`; without it, push them on their own")
            return super().push_to_hub(repo_id, **options)
        return self.publisher(repo_id, tokenizer=tokenizer, atlas=atlas, **options)

    @staticmethod
    def check_base(text_config: PreTrainedConfig) -> None:
        """Raises `ValueError` if models of this config cannot be converted."""
        family_of(text_config)

    @classmethod
    def from_base(
        cls,
        base: PreTrainedModel | str | os.PathLike[str],
        *,
        calibration: Mapping[str, Tensor] | None = None,
        base_kwargs: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> "MFNForCausalLM":
        """Converts a base model. At alpha = 0, the default, the result gives the base model's logits bit for bit.

        The conversion checks this on a few tokens. Weights are copied, so the base model stays as it is.

        Args:
            base: a causal LM of a supported family, its folder, or its id on the Hub.
            calibration: a batch for the model (`input_ids`, and `attention_mask` where rows are padded). It sets the
                biases and the scale of the MFN layers' encoders, which shortens training greatly.
            base_kwargs: arguments of `AutoModelForCausalLM.from_pretrained` for a folder or id: `dtype`, `revision`...
            settings: settings of [`MFNConfig`]: `num_features` or `expansion_factor`, `layers`, `k`, `alpha`... Here
                `codes` is `"update"` by default, which stays closer to the base than the default of the config.

        Returns:
            The MFN model in evaluation mode, on the base model's device and in its dtype.

        Raises:
            ValueError: on a setting that is unknown or out of range, or a base that cannot be converted.
        """
        return convert(cls, base, calibration=calibration, base_kwargs=base_kwargs, **settings)

    def to_base(self) -> PreTrainedModel:
        """Returns the backbone as a plain model of its own class, such as `LlamaForCausalLM`, without MFN layers.

        Its logits equal those of this model at alpha = 0 bit for bit, which is checked on a few tokens. What the model
        does at another alpha, and with steering, is lost. Weights are copied, so this model stays as it is.

        Raises:
            ValueError: if the model has PEFT adapters, or is compiled, quantised or spread over devices.
        """
        return unwrap(self, clone=True)


__all__ = [
    "MFNCausalLMOutput",
    "MFNConfig",
    "MFNForCausalLM",
    "MFNModel",
    "MFNPreTrainedModel",
    "SparseCode",
]
