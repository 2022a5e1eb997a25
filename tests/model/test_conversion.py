"""Conversion of base models: initial MFN layers, and errors that name the refused value and the allowed ones."""

import copy

import pytest
import torch
from conftest import GPT2, make_base, make_mfn, tokens
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from modeling_mfn import MFNConfig, MFNForCausalLM
from modeling_mfn.model.finite import non_finite_weight

SIZE = {"num_features": 40, "k": 4}


def test_from_a_folder_as_from_a_model(family_base, tmp_path):
    family_base.save_pretrained(tmp_path)
    models = []
    for base in (family_base, tmp_path, str(tmp_path)):
        torch.manual_seed(0)
        models.append(MFNForCausalLM.from_base(base, **SIZE, alpha=1.0))
    first, *others = (model(**tokens(2, 8)).logits for model in models)
    assert all(torch.equal(first, other) for other in others)
    low = MFNForCausalLM.from_base(tmp_path, **SIZE, base_kwargs={"dtype": torch.bfloat16})
    assert {parameter.dtype for parameter in low.parameters()} == {torch.bfloat16}


def test_layers_start_with_unit_norm_rows_and_tied_encoders(family_base):
    model = MFNForCausalLM.from_base(family_base, expansion_factor=3, k=4)
    assert model.config.num_features == 96
    assert model.config.expansion_factor == 3
    directions = [layer.decoder.weight for layer in model.mfn_layers.values()]
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(96))
        assert torch.equal(layer.encoder.weight, layer.decoder.weight)
        assert not layer.encoder.bias.any()
        assert not layer.decoder.bias.any()
    assert not torch.equal(directions[0], directions[1])
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_calibration_centres_the_code_on_the_batch(family_base):
    """Compares the biases with the mean standardised residual stream that hooks read from the base, without padding."""
    base = family_base.double()
    seen = {}
    blocks = base.model.layers if isinstance(base, LlamaForCausalLM) else base.transformer.h
    norm = "post_attention_layernorm" if isinstance(base, LlamaForCausalLM) else "ln_2"
    for index, block in enumerate(blocks):
        getattr(block, norm).register_forward_pre_hook(lambda _, args, index=index: seen.update({index: args[0]}))
    batch = tokens(3, 8) | {"attention_mask": torch.ones(3, 8, dtype=torch.long)}
    batch["attention_mask"][1, :4] = 0
    model = MFNForCausalLM.from_base(base, **SIZE, codes="stream", alpha=0.6, calibration=batch)
    assert model.config.alpha == 0.6
    base(**batch)
    for index, layer in model.mfn_layers.items():
        h = seen[index][batch["attention_mask"].bool()]
        centre = ((h - h.mean(-1, keepdim=True)) / (h.std(-1, keepdim=True) + 1e-5)).mean(0)
        torch.testing.assert_close(layer.decoder.bias, centre, atol=1e-10, rtol=0)
        torch.testing.assert_close(layer.encoder.bias, -layer.encoder.weight @ centre, atol=1e-10, rtol=0)


def test_the_papers_literal_settings(family_base):
    config = MFNConfig.paper(family_base.config, num_features=40, k=4)
    literal = (config.input_norm, config.decoder_bias, config.blend_into, config.alpha)
    assert literal == ("none", False, "mlp", 0.0)
    assert MFNConfig.paper(family_base.config, num_features=40, blend_into="residual").blend_into == "residual"
    model = MFNForCausalLM(config)
    assert all(layer.decoder.bias is None for layer in model.mfn_layers.values())


def test_the_config_copies_the_bases_and_reads_through_to_it(family_base):
    config = MFNConfig(text_config=family_base.config, num_features=40)
    config.vocab_size = 7
    assert (config.text_config.vocab_size, family_base.config.vocab_size) == (7, 96)
    assert config.get_text_config() is config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 3, 4)
    assert MFNConfig(**MFNConfig(text_config=family_base.config, num_features=40).to_dict()).to_dict()["k"] == 32


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SIZE | {"k": 0}, r"k is 0; .* 1 to num_features \(40\)"),
        (SIZE | {"k": 41}, r"k is 41; .* 1 to num_features \(40\)"),
        (SIZE | {"alpha": -0.01}, r"alpha is -0\.01; .* 0 .* 1"),
        (SIZE | {"alpha": 1.5}, r"alpha is 1\.5"),
        (SIZE | {"alpha": float("nan")}, "alpha is nan"),
        (SIZE | {"alpha": float("inf")}, "alpha is inf"),
        (SIZE | {"layers": [0, 3]}, "layers contains 3; the base model has blocks 0 to 2"),
        (SIZE | {"layers": [-1]}, "layers contains -1"),
        (SIZE | {"layers": [1, 1]}, "layers contains 1 twice"),
        (SIZE | {"layers": []}, r"layers is \[\]"),
        (SIZE | {"layers": "some"}, "layers is 'some'"),
        ({"k": 4}, "num_features is None and expansion_factor is None; give exactly one"),
        (SIZE | {"expansion_factor": 2}, "num_features is 40 and expansion_factor is 2; give exactly one"),
        ({"num_features": 0}, "num_features is 0"),
        (SIZE | {"num_feature": 3}, "unknown setting 'num_feature'.*num_features"),
        (SIZE | {"blend_into": "attention"}, "blend_into is 'attention'; it must be one of residual, mlp"),
        (SIZE | {"input_norm": "batch"}, "input_norm is 'batch'; it must be one of layer, none"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        MFNForCausalLM.from_base(make_base("llama-tied"), **settings)


def test_bad_bases(tmp_path):
    llama = make_base("llama-tied")
    sizes = {"vocab_size": 96, "hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    opt = OPTForCausalLM(OPTConfig(**sizes))
    with pytest.raises(ValueError, match="'opt' is not supported; supported are arcee, ernie4_5"):
        MFNForCausalLM.from_base(opt, **SIZE)
    opt.save_pretrained(tmp_path / "opt")
    (tmp_path / "opt" / "model.safetensors").unlink()  # the family is checked before weights are read
    with pytest.raises(ValueError, match="'opt' is not supported"):
        MFNForCausalLM.from_base(tmp_path / "opt", **SIZE)
    with pytest.raises(ValueError, match="is an MFN model itself"):
        MFNForCausalLM.from_base(make_mfn(llama), **SIZE)
    with pytest.raises(ValueError, match="LlamaModel has no language-modelling head"):
        MFNForCausalLM.from_base(AutoModel.from_config(llama.config), **SIZE)
    with pytest.raises(ValueError, match="is neither a folder nor"):
        MFNForCausalLM.from_base(tmp_path / "nowhere", **SIZE)
    with pytest.raises(ValueError, match="cross-attention"):
        MFNForCausalLM.from_base(GPT2LMHeadModel(GPT2Config(**GPT2, add_cross_attention=True)), **SIZE)
    with pytest.raises(ValueError, match="base_kwargs"):
        MFNForCausalLM.from_base(llama, **SIZE, base_kwargs={"dtype": "float32"})
    with torch.device("meta"):
        empty = LlamaForCausalLM(llama.config)
    with pytest.raises(ValueError, match="lies on meta"):
        MFNForCausalLM.from_base(empty, **SIZE)


def test_what_holds_a_base_says_what_to_give(family_base, tmp_path):
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family_base.config.model_type]
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=[target])
    family_base.save_pretrained(tmp_path / "base")
    fresh, again = (AutoModelForCausalLM.from_pretrained(tmp_path / "base") for _ in range(2))
    adapted = get_peft_model(fresh, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    again.add_adapter(settings)
    in_place = copy.deepcopy(family_base)
    in_place.compile()
    for base, advice in (
        (adapted, "merge_and_unload"),
        (adapted.base_model.model, "merge_and_unload"),
        (again, "merge_and_unload"),
        (tmp_path / "adapter", "adapter is a PEFT adapter; .* merge_and_unload returns"),
        (torch.compile(family_base), "compiled .*compile the result"),
        (in_place, "compiled .*compile the result"),
        (torch.nn.DataParallel(family_base), "wrapped in DataParallel; give .* its .module"),
        (family_base.config, "Config, which has no weights; give its model"),
        (family_base.state_dict(), "OrderedDict; it must be a causal LM of transformers, its folder, or its id"),
        (None, "NoneType; it must be a causal LM of transformers"),
    ):
        with pytest.raises(ValueError, match=advice):
            MFNForCausalLM.from_base(base, **SIZE)


class Packed(torch.Tensor):
    """A weight of quantisation that says that it is float32, as torchao's do, and can do nothing else."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype, device=weight.device)

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.detach.default:
            return args[0]
        raise NotImplementedError(f"{function} of a packed weight")


@pytest.mark.parametrize("pack", [Packed, lambda weight: weight.to(torch.float8_e4m3fn), lambda weight: weight.char()])
def test_quantised_models_are_refused_both_ways(pack):
    base = make_base("llama-tied")
    model = make_mfn(base)
    for name, each in (("base model", base), ("MFN model", model)):
        blocks = each.model.layers if each is base else each.model.backbone.layers
        projection = blocks[1].mlp.up_proj
        projection.weight = torch.nn.Parameter(pack(projection.weight.detach()), requires_grad=False)
        assert non_finite_weight(each) is None
        with pytest.raises(ValueError, match=f"the {name} is quantised; give it in float32"):
            MFNForCausalLM.from_base(base, **SIZE) if each is base else model.to_base()


@pytest.fixture
def mesh():
    """Device mesh of this process alone."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_sharded_models_are_refused_both_ways(mesh):
    base = make_base("llama-tied")
    model = make_mfn(base)
    for sharded in (base, model):
        fully_shard(sharded, mesh=mesh)
    with pytest.raises(ValueError, match="base model is sharded over processes"):
        MFNForCausalLM.from_base(base, **SIZE)
    with pytest.raises(ValueError, match="MFN model is sharded over processes"):
        model.to_base()


def test_truncated_weights_of_the_base_are_named(tmp_path):
    make_base("gpt2-tied").save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=f"weights of {tmp_path} are truncated"):
        MFNForCausalLM.from_base(tmp_path, **SIZE)


def test_a_base_whose_forward_is_not_its_familys_is_refused():
    base = make_base("llama-tied")
    base.model.layers[1].register_forward_hook(lambda module, args, output: 1.01 * output)
    with pytest.raises(RuntimeError, match="does not give the logits of its base"):
        MFNForCausalLM.from_base(base, **SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_back_to_the_base_is_the_base_bit_for_bit(base, dtype):
    base = base.to(dtype)
    base.config.dtype, base.generation_config.max_new_tokens = dtype, 5
    base.set_attn_implementation("eager")
    model = make_mfn(base)
    again = model.to_base()
    assert type(again) is type(base)
    assert again.config.to_dict() == base.config.to_dict()
    assert again.generation_config.to_dict() == base.generation_config.to_dict()
    assert again.config._attn_implementation == "eager"
    assert (again.lm_head.weight is again.get_input_embeddings().weight) == base.config.tie_word_embeddings
    for theirs, ours in zip(*(tensors(each) for each in (base, again)), strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert all(ours[name].dtype == theirs[name].dtype for name in theirs)
    assert not {each.data_ptr() for each in again.parameters()} & {each.data_ptr() for each in model.parameters()}


def tensors(model):
    return model.state_dict(), dict(model.named_buffers())


def test_a_trained_backbone_becomes_a_plain_checkpoint(family_base, tmp_path):
    """The weights have moved, features are pruned and the vocabulary has grown; the plain model is that of alpha 0."""
    model = make_mfn(family_base)
    model.resize_token_embeddings(110, mean_resizing=False)
    model.prune_features(0, [1, 2])
    model.compact()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    batch, at_1 = tokens(2, 9), model(**tokens(2, 9)).logits
    base = model.train().requires_grad_(False).to_base()
    assert not base.training
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert model.training
    assert model.config.alpha == 1.0
    assert torch.equal(model.eval()(**batch).logits, at_1)
    base.save_pretrained(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(family_base)
    assert loaded.config.architectures == [type(family_base).__name__]
    model.set_blend(0.0)
    assert torch.equal(loaded(**batch).logits, model(**batch).logits)
    assert not torch.equal(loaded(**batch).logits, at_1)


def test_models_that_cannot_go_back_say_why(family_base):
    model = make_mfn(family_base)
    target = {"llama": "q_proj", "gpt2": "c_attn"}[family_base.config.model_type]
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules=[target])
    adapted = get_peft_model(copy.deepcopy(model), settings)
    in_place = copy.deepcopy(model)
    in_place.compile()
    with torch.device("meta"):
        empty = MFNForCausalLM(model.config)
    for given, reason in (
        (adapted, "MFN model is a .* with PEFT adapters; merge them .* merge_and_unload"),
        (in_place, "MFN model is a compiled MFNForCausalLM"),
        (empty, "MFN model lies on meta"),
    ):
        with pytest.raises(ValueError, match=reason):
            given.to_base()
    merged = adapted.merge_and_unload().to_base()
    assert torch.equal(merged.state_dict()["lm_head.weight"], family_base.state_dict()["lm_head.weight"])
    model.lm_head.register_forward_hook(lambda module, args, output: 2 * output)
    with pytest.raises(RuntimeError, match="does not give the logits of its base"):
        model.to_base()
