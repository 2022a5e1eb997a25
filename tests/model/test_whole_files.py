"""A model is saved whole, and a mixture of two models is refused. What an atlas belongs to outlives casts and edits."""

import copy
import os
import pickle
import resource
import shutil

import pytest
import torch
from conftest import make_mfn, tokens
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_mfn import Clamp, MFNConfig, MFNForCausalLM, MFNModel
from modeling_mfn.model.weights_digest import digest_of_folder, digest_of_model


class Killed(BaseException):
    """Stands for a kill between two renames."""


def load(folder):
    return MFNForCausalLM.from_pretrained(folder)


@torch.no_grad()
def logits(model):
    return model(**tokens(2, 9)).logits


@pytest.fixture
def two(family_base):
    """Two models of the same shapes, with other weights, k and alpha."""
    return make_mfn(family_base), make_mfn(family_base, seed=12, k=5, alpha=0.5)


@pytest.mark.halved
@pytest.mark.parametrize(("old_size", "new_size"), [("1GB", "1GB"), ("1GB", "30kB"), ("30kB", "1GB"), ("20kB", "30kB")])
def test_a_save_that_is_killed_leaves_no_mixture(two, tmp_path, monkeypatch, old_size, new_size):
    """After a kill at any rename the older model loads, or one sentence says what to do. The next save is whole."""
    old, new = two
    real = os.replace
    for survived in (0, 1, 2, 3, 5, 20, 100):
        folder, calls = tmp_path / str(survived), []
        old.save_pretrained(folder, max_shard_size=old_size)

        def replace(*paths, calls=calls, survived=survived):
            if len(calls) == survived:
                raise Killed
            calls.append(paths)
            real(*paths)

        try:
            with monkeypatch.context() as patched:
                patched.setattr(os, "replace", replace)
                new.save_pretrained(folder, max_shard_size=new_size)
        except Killed:
            if survived:
                with pytest.raises(ValueError, match=r"was killed between two renames: move the files of .*\.saved"):
                    load(folder)
            else:
                assert torch.equal(logits(load(folder)), logits(old))
                assert load(folder).config.k == 8
            new.save_pretrained(folder, max_shard_size=new_size)
        else:
            assert survived > len(calls) > 20
        assert torch.equal(logits(load(folder)), logits(new))
        assert {path.name for path in folder.glob(".*")} == set()
    again = tmp_path / "again"
    new.save_pretrained(again, max_shard_size=new_size)
    assert {path.name for path in folder.iterdir()} == {path.name for path in again.iterdir()}


def test_a_full_disk_leaves_the_older_model(two, tmp_path):
    old, new = two
    old.save_pretrained(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(OSError, match=f"could not be saved in {tmp_path}, which is as it was"):
            new.save_pretrained(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_config_next_to_other_weights_is_refused(two, tmp_path):
    old, new = two
    old.save_pretrained(tmp_path / "old")
    new.save_pretrained(tmp_path / "new", max_shard_size="30kB")
    shutil.copy(tmp_path / "new" / "config.json", tmp_path / "old" / "config.json")
    told, found = new.config.weights_digest, old.config.weights_digest
    for model_class in (MFNForCausalLM, MFNModel):
        with pytest.raises(ValueError, match=rf"config\.json is of other weights \({told}\).*\({found}\)"):
            model_class.from_pretrained(tmp_path / "old")
    shard = sorted((tmp_path / "new").glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    next(iter(weights.values())).view(-1)[0] += 1
    save_file(weights, shard, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="is of other weights"):
        load(tmp_path / "new")


def test_a_config_that_is_edited_or_saved_on_its_own_is_accepted(two, tmp_path):
    model, _ = two
    model.save_pretrained(tmp_path)
    config = MFNConfig.from_pretrained(tmp_path)
    config.k, config.alpha = 3, 0.25
    config.save_pretrained(tmp_path)
    assert (load(tmp_path).config.k, load(tmp_path).config.alpha) == (3, 0.25)


def test_a_missing_tensor_is_an_error(two, tmp_path):
    model, _ = two
    model.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    gone = next(name for name in weights if name.endswith("mfn.encoder.bias"))
    del weights[gone]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = MFNConfig.from_pretrained(tmp_path)
    config.weights_digest = None  # as in a folder of an earlier version
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the weights of .* lack {gone};"):
        load(tmp_path)
    assert MFNForCausalLM.from_pretrained(tmp_path, output_loading_info=True)[1]["missing_keys"] == {gone}


def test_features_keep_their_name_until_they_are_trained(two, tmp_path):
    """Shards, casts, edits and a change of mode leave the features as they are. A training does not."""
    model, _ = two
    model.save_pretrained(tmp_path / "model")
    name = model.config.features_digest
    assert name == model.config.weights_digest == digest_of_folder(tmp_path / "model") == digest_of_model(model)

    def saved(model, **options):
        model.save_pretrained(tmp_path / "again", **options)
        return load(tmp_path / "again")

    sharded = saved(load(tmp_path / "model"), max_shard_size="30kB")
    assert sharded.config.weights_digest == sharded.config.features_digest == name
    cast = saved(load(tmp_path / "model").to(torch.bfloat16))
    assert cast.config.weights_digest != name
    assert cast.config.features_digest == name
    edited = load(tmp_path / "model")
    edited.prune_features(0, [3, 4])
    edited.compact()
    edited.bake({"L1/5": Clamp(2.0)})
    assert saved(edited).config.features_digest == name
    unchanged = load(tmp_path / "model").train()
    assert saved(unchanged).config.features_digest == name
    trained = load(tmp_path / "model").train()
    with torch.no_grad():
        trained.mfn_layers[0].encoder.bias += 0.1
    first = saved(trained.eval()).config.features_digest
    assert first not in (None, name)
    assert first == digest_of_folder(tmp_path / "again")


def one_step(model, optimizer, **options):
    """Trains as a loop does that never calls `model.train()`."""
    optimizer = optimizer((each for each in model.parameters() if each.requires_grad), **options)
    model(**tokens(2, 9), labels=tokens(2, 9)["input_ids"]).loss.backward()
    optimizer.step()


@pytest.mark.halved
@pytest.mark.parametrize("fused", [False, True])  # torch does not count the changes of fused optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loop_in_evaluation_mode_is_a_training(two, tmp_path, fused, dtype):
    two[1].save_pretrained(tmp_path / "model")
    model = MFNForCausalLM.from_pretrained(tmp_path / "model", dtype=dtype)
    before = model.config.features_digest
    for unchanged in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).float()):
        assert unchanged.features_digest == before
    for trained in (copy.deepcopy(model), model):
        one_step(trained, torch.optim.AdamW, lr=0.01, fused=fused)
        name = trained.features_digest
        assert name not in (None, before)
        assert copy.deepcopy(trained).features_digest == name == digest_of_model(trained)
        trained.prune_features(0, [3])
        assert trained.features_digest != before
        trained.save_pretrained(tmp_path / "trained")
        assert load(tmp_path / "trained").features_digest == trained.features_digest == digest_of_model(trained)


def test_one_feature_that_a_loop_trains_is_noticed(two, tmp_path):
    model, _ = two
    model.save_pretrained(tmp_path)
    before = model.features_digest
    model.requires_grad_(False)
    weight = model.mfn_layers[0].encoder.weight.requires_grad_()
    with torch.no_grad():
        weight[7, 1] += 1e-3
    assert model.features_digest not in (None, before)


def test_a_merged_adapter_gives_features_another_name(two, tmp_path):
    model, _ = two
    model.save_pretrained(tmp_path)
    before = model.features_digest
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, init_lora_weights=False)
    adapted = get_peft_model(load(tmp_path), settings)
    assert adapted.unload().features_digest == before
    adapted = get_peft_model(load(tmp_path), settings)
    assert adapted.merge_and_unload().features_digest not in (None, before)


def test_an_adapter_next_to_its_model_leaves_the_model(two, tmp_path):
    model, _ = two
    model.save_pretrained(tmp_path)
    expected = logits(model)
    adapted = load(tmp_path)
    adapted.add_adapter(LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2))
    adapted.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()
    for file in tmp_path.glob("adapter_*"):
        file.unlink()
    assert torch.equal(logits(load(tmp_path)), expected)


def test_features_of_an_adapter_have_a_name_of_their_own(two, tmp_path):
    model, other = two
    model.save_pretrained(tmp_path / "model")
    settings = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=2, modules_to_save=["mfn"])
    adapted = get_peft_model(load(tmp_path / "model"), settings)
    for layer, trained in zip(adapted.mfn_layers.values(), other.mfn_layers.values(), strict=True):
        with torch.no_grad():
            layer.encoder.weight.copy_(trained.encoder.weight)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = PeftModel.from_pretrained(load(tmp_path / "model"), tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    names = [load(tmp_path / name).config.features_digest for name in ("model", "merged")]
    assert None not in names
    assert names[0] != names[1]


def test_code_of_the_first_version_does_not_stay(two, tmp_path):
    (tmp_path / "modeling_mfn.py").write_text("")
    two[0].save_pretrained(tmp_path)
    assert not (tmp_path / "modeling_mfn.py").exists()


def test_a_variant_stands_next_to_the_weights(two, tmp_path):
    model, _ = two
    expected = logits(model)
    model.save_pretrained(tmp_path)
    model.to(torch.bfloat16).save_pretrained(tmp_path, variant="half")
    whole = MFNForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(whole), expected)
    half = MFNForCausalLM.from_pretrained(tmp_path, variant="half", dtype="auto")
    weights = dict(half.named_parameters())
    assert all(torch.equal(weights[name], parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize(("name", "value"), [("layers", [0]), ("num_features", 90), ("decoder_bias", False)])
def test_a_model_is_not_saved_with_settings_of_another(two, tmp_path, name, value):
    model, _ = two
    made = getattr(model.config, name)
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=rf"^{name} is .* made with"):
        model.save_pretrained(tmp_path / "model")
    setattr(model.config, name, made)
    model.save_pretrained(tmp_path / "model")
