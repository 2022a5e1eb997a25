"""The example that makes an MFN GPT-2 of OpenAI's SAEs, on a small GPT-2 with 12 blocks and SAEs in the same files."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_base
from dense_peers import openai, saelens
from local_hub import LocalHub
from test_export import of_layer, stream
from test_from_saes import SAELENS, openai_file, saelens_folder
from tokenizers_for_tests import make_tokenizer

from modeling_mfn import MFNForCausalLM

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "gpt2_from_openai_saes.py")
BLOCKS, K = 12, 32


@pytest.fixture
def base(tmp_path):
    tokenizer = make_tokenizer()
    model = make_base("gpt2-tied", n_layer=BLOCKS, vocab_size=len(tokenizer)).double()
    model.save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    return str(tmp_path / "gpt2")


def test_openais_files_become_a_model_of_12_blocks(base, tmp_path, monkeypatch, capsys):
    settings = {"activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    states = [openai_file(tmp_path, layer, seed=layer, **settings)[1] for layer in range(BLOCKS)]
    monkeypatch.chdir(tmp_path)
    given = ["--base", base, "--output", "out", "--saes", "resid_post_attn_v5_32k/autoencoders", "--text", "a line"]
    monkeypatch.setattr("sys.argv", ["example", *given])
    runpy.run_path(EXAMPLE, run_name="__main__")
    printed = capsys.readouterr().out
    assert printed.count("strongest features of the last token") == BLOCKS
    model = MFNForCausalLM.from_pretrained("out", dtype=torch.float64)
    config = model.config
    assert (config.layers, config.k, config.alpha, config.input_norm) == (list(range(BLOCKS)), K, 1.0, "layer")
    assert (config.codes, config.other_sites, config.direction_norms) == ("stream", {}, {})
    for layer, state in enumerate(states):
        for own, theirs in zip(of_layer(model.mfn_layers[layer], stream()), openai(state, stream()), strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)


def test_one_command_downloads_them_from_the_hub(base, tmp_path):
    """The repository has the files of SAELens' release, with a config as SAELens 3 wrote it."""
    example = runpy.run_path(EXAMPLE)
    files, written = {}, {}
    for layer in (3, 11):
        change = {"before_6": True, "hook_name": f"blocks.{layer}.hook_resid_mid"}
        name = example["folder_of"]("128k", layer)
        place, config, tensors = saelens_folder(tmp_path / name, unit=True, seed=layer, **change)
        written[layer] = config | {"architecture": "topk", "k": SAELENS["k"]}, tensors
        files |= {f"{name}/{file.name}": file.read_bytes() for file in place.iterdir()}
    with LocalHub() as hub:
        hub.add(example["RELEASES"]["128k"], files | {"v5_128k_layer_0/sae_weights.safetensors": b"not asked for"})
        command = [EXAMPLE, "--base", base, "--output", "out", "--width", "128k", "--layers", "3", "11"]
        environment = os.environ | hub.environment(tmp_path / "home")
        subprocess.run([sys.executable, *command, "--text", "a line"], cwd=tmp_path, env=environment, check=True)
        assert sorted(hub.downloads()) == sorted(files)
    model = MFNForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float64)
    assert model.config.layers == [3, 11]
    for layer, (config, tensors) in written.items():
        expected = saelens(config, tensors, stream())
        for own, theirs in zip(of_layer(model.mfn_layers[layer], stream()), expected, strict=True):
            torch.testing.assert_close(own, theirs, rtol=1e-9, atol=1e-9)
