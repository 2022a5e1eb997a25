"""Models whose weights accelerate keeps on the disk or aside: they run as they do in memory."""

import accelerate
import pytest
import torch
from conftest import make_mfn, tokens
from tokenizers_for_tests import numbered_words

from modeling_mfn import Clamp, FeatureAtlas, MFNForCausalLM, compare_features, explain, find_duplicates, perplexity

BATCH = tokens(2, 6)


@pytest.fixture(
    params=[{}, {"codes": "update", "coding_rounds": 2, "refine_steps": 1}, {"shared_decoder": True}],
    ids=["stream", "update", "shared"],
)
def model(request, family_base):
    model = make_mfn(family_base.double(), **request.param)
    model.prune_features(2, [5, 6])
    if not model.config.shared_decoder:
        model.compact()
    return model


def results(model):
    """All that a forward can give, and what follows from it."""
    with torch.no_grad():
        out = model(**BATCH, output_codes=True, output_reconstructions=True)
        with model.steer({(0, 3): Clamp(4.0), (2, 9): Clamp(3.0)}):
            steered = model(**BATCH).logits
            text = model.generate(**BATCH, max_new_tokens=3, do_sample=False)
        layer = model.mfn_layers[2]
        code = layer.encode(out.reconstructions[2].residual)
        outside = layer.reconstruct(code)
    reconstructed = [each.reconstructed for each in out.reconstructions.values()]
    codes = [each.to_dense() for each in (*out.codes.values(), *(out.embedding_codes or {}).values(), code)]
    return [out.logits, *codes, *reconstructed, steered, text, outside]


def part_of(model):
    return sum(parameter.nbytes for parameter in model.parameters()) // 3


WAYS = {
    "cpu_offload": lambda model, load, folder: accelerate.cpu_offload(load(), execution_device="cpu"),
    "disk_offload": lambda model, load, folder: accelerate.disk_offload(load(), folder, "cpu", offload_buffers=True),
    "device_map": lambda model, load, folder: load(device_map={"": "disk"}, offload_folder=folder),
    "auto": lambda model, load, folder: load(
        device_map="auto", max_memory={"cpu": part_of(model)}, offload_folder=folder
    ),
}


@pytest.mark.halved
@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_model_runs_as_in_memory(model, way, tmp_path):
    model.save_pretrained(tmp_path / "model")

    def load(**options):
        return MFNForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float64, **options)

    offloaded = WAYS[way](model, load, tmp_path / "offload")
    assert any(parameter.is_meta for parameter in offloaded.model.parameters())
    for ours, expected in zip(results(offloaded), results(model), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-10, rtol=0)
    assert any(parameter.is_meta for parameter in offloaded.model.parameters())


def test_what_reads_weights_of_an_offloaded_model_works_or_says_so_at_once(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    offloaded = MFNForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    assert offloaded.device == torch.device("cpu")
    rows = [{"input_ids": row.tolist()} for row in BATCH["input_ids"]]
    ours, expected = (perplexity(each, rows) for each in (offloaded, model))
    torch.testing.assert_close(ours, expected)
    assert compare_features(offloaded, model, rows, layer=0).directions.similarities.min() > 0.999
    assert find_duplicates(offloaded, 2, threshold=0.1) == find_duplicates(model, 2, threshold=0.1)
    for what, read in (
        ("explain", lambda: explain(offloaded, numbered_words(), "w9 w33 w5")),
        ("an atlas", lambda: FeatureAtlas.build(offloaded, numbered_words(), ["w9 w33 w5"])),
    ):
        with pytest.raises(ValueError, match=f"{what} needs all weights in memory"):
            read()
    for edit in (
        lambda: offloaded.prune_features(0, [1]),
        lambda: offloaded.reset_features(0, [1]),
        lambda: offloaded.bake({(0, 1): Clamp(1.0)}),
    ):
        with pytest.raises(ValueError, match=r"not in memory|coding_rounds|shared_decoder|is shared"):
            edit()
