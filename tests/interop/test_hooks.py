"""Names of the place of an MFN layer."""

import pytest
from conftest import make_mfn
from family_bases import family_base

from modeling_mfn.interop.hooks import block_of, hook_name, hook_point, is_at


@pytest.mark.parametrize(
    ("family", "blocks", "stream"),
    [
        ("llama", "layers", "resid_mid"),
        ("gpt2", "h", "resid_mid"),
        ("gpt_neox", "layers", "resid_pre"),
        ("gpt_neox-sequential", "layers", "resid_mid"),
    ],
)
def test_the_place_is_named_in_three_vocabularies(family, blocks, stream):
    for codes in ("stream", "update"):
        model = make_mfn(family_base(family), codes=codes, layers=[2])
        point = hook_point(model.config.text_config, 2)
        tap = f"model.backbone.{blocks}.2.mfn.hook_in"
        assert point == (f"blocks.2.hook_{stream}", tap, f"{stream}.2")
        assert model.get_submodule(tap) is model.mfn_layers[2].hook_in
        assert hook_name(model.config, 2) == (point.transformer_lens if codes == "stream" else tap)


def test_the_output_of_a_parallel_block_is_the_input_of_the_next_mfn_layer():
    parallel, sequential = (family_base(name).config for name in ("gpt_neox", "gpt_neox-sequential"))
    for name in ("blocks.1.hook_resid_post", "layers.1", "gpt_neox.layers.1"):
        assert [layer for layer in range(4) if is_at(name, parallel, layer)] == [2]
        assert not any(is_at(name, sequential, layer) for layer in range(4))
        assert (block_of(name, parallel), block_of(name, sequential)) == (2, 1)
    assert block_of("blocks.1.hook_resid_pre", parallel) == 1
    assert block_of("layers.1.mlp", parallel) == 1
