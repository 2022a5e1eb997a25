"""A model that was loaded as custom code before the plugin: the package treats it like its own."""

from pathlib import Path

import pytest
from conftest import make_base, make_mfn
from fresh_process import run_before_the_plugin

SCRIPT = """
twin = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
sys.path.append(sys.argv[2])

import modeling_mfn
from atlas_data import windows, word_tokenizer
from modeling_mfn import Clamp, FeatureAtlas, MFNForCausalLM, MFNTrainer, label_features
from trainings import arguments, rows

assert type(twin).__module__.startswith("transformers_modules."), type(twin)
own = MFNForCausalLM.from_pretrained(sys.argv[1])
assert type(own) is MFNForCausalLM
for name, weight in twin.to_base().state_dict().items():
    assert torch.equal(weight, own.to_base().state_dict()[name]), name
settings = {"max_steps": 3, "lambda_rate": 0.1, "lambda_comp": 0.1, "lambda_stab": 0.1, "mfn_learning_rate": 1e-2}
atlases, loads = [], []
for number, model in enumerate((twin, own)):
    trainer = MFNTrainer(model, arguments(f"out-{number}", **settings), train_dataset=rows(16), eval_dataset=rows(8))
    trainer.train()
    trainer.save_model()
    loads.append(trainer.evaluate()["eval_loss"])
    for layer in model.mfn_layers.values():
        torch.testing.assert_close(layer.decoder.weight.norm(dim=-1), torch.ones(80))
    atlas = FeatureAtlas.build(model, word_tokenizer(), windows(), progress=False)
    label_features(atlas, model, word_tokenizer(), windows(), {"fives": ["w5", "w50"]}, min_occurrences=1)
    with model.steer({(0, 5): Clamp(2.0)}):
        model(torch.tensor([[5, 6]]))
    atlases.append(atlas)
assert loads[0] == loads[1]
for (name, ours), theirs in zip(twin.state_dict().items(), own.state_dict().values(), strict=True):
    assert torch.equal(ours, theirs), name
assert atlases[0].features.equals(atlases[1].features)
again = MFNForCausalLM.from_pretrained("out-0")
assert torch.equal(again.lm_head.weight, own.lm_head.weight)
"""


@pytest.mark.halved
@pytest.mark.parametrize("base", ["llama-tied", "gpt2-tied"])
def test_a_model_of_remote_code_is_trained_and_described_like_our_own(base, tmp_path):
    make_mfn(make_base(base), alpha=0.0, k=6, codes="update").save_pretrained(tmp_path / "model")
    run_before_the_plugin(SCRIPT, tmp_path, tmp_path / "model", Path(__file__).parent)
