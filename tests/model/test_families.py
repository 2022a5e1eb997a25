"""One claim a test, on a tiny random model of every family. `python -m benchmarks.interop.families` makes a table.

Equal logits and Figure 1 are tried on every family in the quick suite, the other claims on one family of each form.
"""

import copy

import pytest
import torch
from conftest import HIDDEN, enable_checkpointing, make_mfn, tokens
from family_bases import FORMS, NAMES, family_base, figure_1
from fresh_process import run_without_the_plugin
from peft import LoraConfig, get_peft_model
from tokenizers_for_tests import numbered_words
from trainings import arguments, rows

from modeling_mfn import Add, MFNForCausalLM, MFNTrainer, explain
from modeling_mfn.evaluation.measures.intervention_effects import exact_copy
from modeling_mfn.features.harvest.directions import final_norm, logit_effects, recording_scales
from modeling_mfn.model.families import family_of

CODES = ["stream", "update"]
UNEQUAL = [tokens(1, length, seed=length)["input_ids"][0] for length in (4, 11, 6)]


ALL_IN_TIME = [pytest.param(name, marks=[] if name in FORMS else pytest.mark.slow) for name in NAMES]
every_family = pytest.mark.parametrize("base", NAMES, indirect=True)


@pytest.fixture(params=ALL_IN_TIME)
def base(request):
    return family_base(request.param)


def padded(rows):
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), width, dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, width - len(row) :], mask[place, width - len(row) :] = row, 1
    return {"input_ids": ids, "attention_mask": mask}


@every_family
@pytest.mark.parametrize("codes", CODES)
def test_logits_at_alpha_0_equal_the_base_to_the_bit(base, codes):
    model = make_mfn(base, alpha=0.0, codes=codes)
    batch = padded(UNEQUAL)
    assert torch.equal(model(**batch).logits, base(**batch).logits)
    assert torch.equal(model(**batch, output_codes=True).logits, base(**batch).logits)
    in_training = []
    for either in (model.train(), base.train()):
        torch.manual_seed(0)  # dropout draws the same numbers
        in_training.append(either(**batch).logits)
    assert torch.equal(*in_training)


def test_back_to_the_base(base):
    again = make_mfn(base, codes="update").to_base()
    assert type(again) is type(base)
    assert torch.equal(again(**padded(UNEQUAL)).logits, base(**padded(UNEQUAL)).logits)


@torch.no_grad()
@every_family
@pytest.mark.parametrize(
    ("codes", "alpha", "blend_into"),
    [
        ("stream", 0.4, "residual"),
        ("stream", 1.0, "residual"),
        ("update", 0.4, "residual"),
        ("update", 1.0, "residual"),
        ("stream", 1.0, "mlp"),
    ],
)
def test_figure_1_by_hand(base, codes, alpha, blend_into):
    model = make_mfn(base.double(), alpha=alpha, codes=codes, blend_into=blend_into, layers=[1, 2])
    batch = tokens(2, 12) | {"use_cache": False}
    plain, ours = base(**batch).logits, model(**batch).logits
    with figure_1(base, model):
        expected = base(**batch).logits
    assert (expected - plain).abs().max() > 0.1
    torch.testing.assert_close(ours, expected, atol=1e-4, rtol=0)  # norms round to float32


@torch.no_grad()
def test_cache_left_padding_and_beams(base):
    if base.config._attn_implementation != "eager":  # which gives no number for padding in float64
        base = base.double()
    model = make_mfn(base, codes="update")
    length = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    for settings in (length, length | {"num_beams": 2}):
        batch = model.generate(**padded(UNEQUAL), **settings)
        assert torch.equal(batch, model.generate(**padded(UNEQUAL), **settings, use_cache=False))
    greedy = model.generate(**padded(UNEQUAL), **length)
    for place, row in enumerate(UNEQUAL):
        alone = model.generate(input_ids=row[None], attention_mask=torch.ones_like(row)[None], **length)
        assert torch.equal(greedy[place, -4:], alone[0, -4:])


@pytest.fixture(scope="module")
def saved(tmp_path_factory, request):
    """Saved models of the families that are tried, and the logits that they give where the plugin is not installed."""
    folder = tmp_path_factory.mktemp("families")
    of_this_module = (item for item in request.session.items if item.path == request.path)
    names = {item.callspec.params["name"] for item in of_this_module if "saved" in item.fixturenames}
    for name in names:
        make_mfn(family_base(name), codes="update").save_pretrained(folder / name)
    run_without_the_plugin(ELSEWHERE, folder, *names)
    return folder


ELSEWHERE = """
ids = torch.arange(3, 15)[None]
logits = {}
for name in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
    logits[name] = model(ids).logits.detach()
torch.save(logits, "logits.pt")
"""


@pytest.mark.parametrize("name", ALL_IN_TIME)
def test_save_and_load_with_and_without_the_plugin(name, saved):
    ids = torch.arange(3, 15)[None]
    expected = make_mfn(family_base(name), codes="update")(ids).logits
    loaded = MFNForCausalLM.from_pretrained(saved / name, experts_implementation="eager")  # which no file has
    assert torch.equal(loaded(ids).logits, expected)
    torch.testing.assert_close(torch.load(saved / "logits.pt")[name], expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing(base):
    model, batch = make_mfn(base.double(), codes="update"), tokens(2, 9)
    for module in model.train().modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "residual_dropout"):
            if hasattr(module, name):
                setattr(module, name, 0.0)
    gradients = []
    for again in (False, True):
        if again:
            enable_checkpointing(model, {"use_reentrant": False})
        model.zero_grad()
        model(**batch, labels=batch["input_ids"]).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-9, rtol=0, msg=name)


def test_lora(base):
    model, batch = make_mfn(base, codes="update"), tokens(2, 9)
    before = model(**batch).logits
    adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    assert torch.equal(adapted(**batch).logits, before)
    adapted(**batch, labels=batch["input_ids"]).loss.backward()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained
    assert not any("mfn" in name for name in trained)
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)
    changed = adapted(**batch).logits
    assert not torch.allclose(changed, before, atol=1e-3)
    torch.testing.assert_close(adapted.merge_and_unload()(**batch).logits, changed, atol=1e-3, rtol=0)


def test_one_training_step_with_all_losses(base, tmp_path):
    model = make_mfn(base, alpha=0.5, codes="update")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    losses = {f"lambda_{loss}": 0.1 for loss in ("recon", "rate", "comp", "stab", "util")}
    trainer = MFNTrainer(model, arguments(tmp_path, max_steps=1, **losses), train_dataset=rows(4))
    trainer.train()
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80))
    logged = trainer.state.log_history[0]
    assert all(torch.tensor(logged[f"{loss}_loss"]).isfinite() for loss in ("recon", "rate", "comp", "stab", "util"))
    same = {name for name, parameter in model.named_parameters() if torch.equal(parameter, before[name])}
    assert not {name for name in same if "expert" not in name}, same


def test_attribution_equals_central_differences(base):
    """Pushes single activations on all tokens, in a copy whose norms do not round to float32."""
    model = exact_copy(make_mfn(base.double(), codes="update"))
    torch.testing.assert_close(model(**tokens(1, 6)).logits, base_at(model, base), atol=1e-4, rtol=0)
    text = "w9 w33 w5 w71 w20 w9 w60"
    found = explain(model, numbered_words(), text, against="mean", trace=0, verify=0, top=2)
    config = model.config.text_config
    ids = torch.tensor([found.token_ids])

    def value():
        hidden = model.base_model(input_ids=ids).last_hidden_state[0, -1]
        head = model.lm_head.weight
        outputs = hidden @ (head[found.target.token_id] - head.mean(0))
        return (outputs / getattr(config, "logits_scaling", 1.0)).item()

    assert value() == pytest.approx(found.target.value, abs=1e-9)
    for layer in found.layers:
        for feature in layer.features:
            for position, activation, share in zip(
                feature.positions, feature.activations, feature.attributions, strict=True
            ):
                where = torch.zeros_like(ids, dtype=torch.bool)
                where[0, position] = True
                ends = []
                for step in (1e-3, -1e-3):
                    with model.steer({feature.name: Add(step)}, positions=where), torch.no_grad():
                        ends.append(value())
                slope = (ends[0] - ends[1]) / 2e-3
                # attention rounds to float32 in some families
                assert share == pytest.approx(activation * slope, rel=2e-3, abs=5e-4)


def base_at(model, base):
    """Logits of the model, made of the base's own code."""
    with torch.no_grad(), figure_1(base, model):
        return base(**tokens(1, 6), use_cache=False).logits


@torch.no_grad()
def test_the_atlas_effects_equal_those_of_the_norm_itself(base):
    """Finds gain and denominator by calling the final norm on long vectors, for which its epsilon is nothing."""
    model = make_mfn(base, codes="update")
    norm, seen = final_norm(model), {}

    def gained(vectors):
        """Returns the norm's gain times vectors, centred for LayerNorm."""
        if type(norm).__name__.endswith("LayerNorm"):
            vectors = vectors - vectors.mean(-1, keepdim=True)
        rms = vectors.square().mean(-1, keepdim=True).sqrt()
        return (norm(vectors / rms * 1e4) - norm(torch.zeros(HIDDEN))) * rms

    at_the_end = norm.register_forward_pre_hook(lambda _, arguments: seen.update(final=arguments[0]))
    for number, layer in model.mfn_layers.items():
        layer.register_forward_pre_hook(lambda own, given, n=number: seen.update({n: own.coded_part(*given).std(-1)}))
    with recording_scales(model) as scales:
        model(**tokens(2, 9))
    at_the_end.remove()
    denominator = gained(seen["final"]) / (norm(seen["final"]) - norm(torch.zeros(HIDDEN)))
    divisor = getattr(model.config.text_config, "logits_scaling", 1.0)
    for number, layer in model.mfn_layers.items():
        torch.testing.assert_close(scales[number], seen[number] / denominator.median(-1).values, atol=1e-4, rtol=1e-3)
        promoted, suppressed = logit_effects(model, number, 2.0, 96, 96)
        effects = 2.0 * gained(layer.directions()) @ model.lm_head.weight.T / divisor
        for found, expected in ((promoted, effects.sort(-1, descending=True)), (suppressed, effects.sort(-1))):
            torch.testing.assert_close(torch.from_numpy(found.scores), expected.values, atol=1e-4, rtol=1e-3)


@torch.no_grad()
def test_embedding_codes_add_up_to_the_first_stream(base):
    model = make_mfn(base, codes="update")
    seen, family = [], family_of(model.config.text_config)
    blocks_of_model = getattr(model.model.backbone, family.blocks)
    blocks_of_model[0].register_forward_pre_hook(lambda _, arguments, __: seen.append(arguments[0]), with_kwargs=True)
    codes = model(**tokens(2, 9), output_codes=True).embedding_codes
    tables = {"token": family.embedding, "position": family.positions}
    total = sum(code.to_dense() @ getattr(model.model.backbone, tables[name]).weight for name, code in codes.items())
    torch.testing.assert_close(total, seen[0], atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_in_one_graph(base):
    if "experts" in "".join(name for name, _ in base.named_parameters()):
        pytest.skip("transformers' experts choose rows by data, which breaks the graph of the base, too")
    model = make_mfn(base.double(), codes="update", alpha=0.5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**tokens(2, 9)).logits, model(**tokens(2, 9)).logits, atol=1e-9, rtol=0)


def test_what_no_entry_describes_is_refused():
    for name, settings, reason in (
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual is True in this stablelm model"),
        ("mixtral", {"output_router_logits": True}, "output_router_logits is True in this mixtral model"),
    ):
        config = copy.deepcopy(family_base(name).config)
        for setting, value in settings.items():
            setattr(config, setting, value)
        with pytest.raises(ValueError, match=reason):
            family_of(config)
    model = make_mfn(family_base("mixtral"))
    with pytest.raises(ValueError, match="output_router_logits is True"):
        model(**tokens(1, 4), output_router_logits=True)
    model.config.text_config.output_router_logits = True
    with pytest.raises(ValueError, match="output_router_logits is True in this mixtral model"):
        model(**tokens(1, 4))
    assert make_mfn(family_base("gemma2")).config._attn_implementation == "eager"  # it has no other
    with pytest.raises(ValueError, match="layers contains 0, and nothing is written to the stream before"):
        make_mfn(family_base("gpt_neox"), codes="update", layers=[0, 1])
    assert make_mfn(family_base("gpt_neox"), codes="update").config.layers == [1, 2]


def test_block_classes_can_be_pickled(base, tmp_path):
    model = make_mfn(base)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(**tokens(1, 5)).logits, model(**tokens(1, 5)).logits)
