"""Names of the place of an MFN layer."""

import pytest
from conftest import make_mfn
from family_bases import family_base

from modeling_mfn.interop.hooks import hook_name, hook_point


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
