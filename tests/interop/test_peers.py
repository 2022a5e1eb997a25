"""SAEs out and in, by SAELens and sparsify themselves (make test-peers)."""

import runpy

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from test_openai_example import EXAMPLE

from benchmarks.interop import parity
from modeling_mfn import MFNForCausalLM, export_saes

pytestmark = [
    pytest.mark.peers,
    pytest.mark.filterwarnings("default::DeprecationWarning", "default::FutureWarning"),
]
TOLERANCE = 1e-5


@pytest.mark.parametrize("case", parity.CASES, ids=lambda case: case.title)
def test_codes_and_reconstructions_are_the_peers_own(case, tmp_path):
    found = parity.differences(case, tmp_path)
    assert found.other_active_sets == 0
    assert max(found.codes, found.reconstructions) < TOLERANCE


def test_a_layer_in_memory_is_the_one_on_disk(tmp_path):
    from sae_lens import SAE, TopKSAE

    model = make_mfn(make_base("gpt2-tied"))
    made = model.to_saelens(1)
    loaded = SAE.load_from_disk(export_saes(model, tmp_path)[1])
    assert isinstance(made, TopKSAE)
    assert made.cfg.to_dict() == loaded.cfg.to_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    made.W_enc.data.zero_()
    assert model.mfn_layers[1].encoder.weight.any()


@pytest.mark.parametrize("codes", ["stream", "update"])
def test_saelens_reads_the_tap_of_a_model_at_alpha_0(codes):
    from sae_lens.load_model import HookedProxyLM

    model = make_mfn(make_base("llama-tied"), codes=codes, alpha=0.0)
    sae = model.to_saelens(1)
    batch = tokens(2, 8)
    hooked = HookedProxyLM(model, None, hook_names=[sae.cfg.metadata.hf_hook_name])
    with torch.no_grad():
        _, cache = hooked.run_with_cache(batch["input_ids"])
        expected = model(**batch, output_codes=True).codes[1].to_dense()
        found = sae.encode(cache[sae.cfg.metadata.hf_hook_name])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_sparsify_loads_all_layers_at_once_and_finds_their_modules(tmp_path):
    from sparsify import SparseCoder
    from sparsify.utils import resolve_widths

    model = make_mfn(make_base("gpt2-tied"), input_norm="none")
    export_saes(model, tmp_path, "sparsify")
    saes = SparseCoder.load_many(str(tmp_path), local=True)
    assert resolve_widths(model, list(saes)) == dict.fromkeys(saes, model.config.hidden_size)
    assert len(saes) == 3


def test_a_topk_sae_that_sparsify_trained_comes_in(tmp_path):
    """Its own trainer, on the tap of an MFN model at alpha 0, writes the folder."""
    from datasets import Dataset
    from sparsify import SaeConfig, SparseCoder, TrainConfig, Trainer

    base = make_base("gpt2-tied")
    model = make_mfn(base, layers=[1], alpha=0.0)
    rows = Dataset.from_dict({"input_ids": tokens(16, 32)["input_ids"].tolist()}).with_format("torch")
    config = TrainConfig(
        SaeConfig(num_latents=64, k=4), batch_size=4, hookpoints=["backbone.h.1.mfn.hook_in"], log_to_wandb=False,
        save_dir=str(tmp_path), run_name="run", lr=1e-3,
    )  # fmt: skip
    Trainer(config, rows, model).fit()
    place = tmp_path / "run" / "backbone.h.1.mfn.hook_in"
    made = MFNForCausalLM.from_saes(base, {1: place}, alpha=1.0)
    h = torch.randn(32, model.config.hidden_size)
    code = made.mfn_layers[1].encode(h)
    theirs = SparseCoder.load_from_disk(place)(h)
    torch.testing.assert_close(made.mfn_layers[1].reconstruct(code), theirs.sae_out, rtol=1e-5, atol=1e-5)


def test_the_example_names_releases_of_saelens():
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    example = runpy.run_path(EXAMPLE)
    for width, release in example["RELEASES"].items():
        known = get_pretrained_saes_directory()[f"gpt2-small-resid-mid-v5-{width}"]
        assert known.repo_id == release
        wanted = {f"blocks.{layer}.hook_resid_mid": example["folder_of"](width, layer) for layer in range(12)}
        assert known.saes_map == wanted
