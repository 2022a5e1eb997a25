"""`mfn serve`, driven by OpenAI's own client; and what it says without the packages that it needs."""

import os
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from socket import socket

import pytest
import torch
from conftest import make_base, make_mfn
from tokenizers_for_tests import numbered_words

from modeling_mfn import Ablate, Clamp
from modeling_mfn.cli.main import main

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
STARTUP = 120
"""Seconds in which the server must answer."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a model with two presets, and of a tokenizer with a chat template."""
    made = tmp_path_factory.mktemp("served")
    tokenizer = numbered_words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made / "model")
    model = make_mfn(make_base("llama-tied"))
    model.save_preset("loud", {"L0/3": Clamp(30.0), "L2/9": Clamp(30.0)})
    model.save_preset("quiet", {"L1/5": Clamp(20.0), "L0/1": Ablate()}, positions="generated")
    model.save_pretrained(made / "model")
    return str(made / "model"), model, tokenizer


@pytest.mark.parametrize("package", ["fastapi", "uvicorn", "openai"])
def test_a_missing_package_is_named_with_its_extra(folder, package, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SystemExit) as left:
        main(["serve", folder[0]])
    assert left.value.code == 2
    assert 'is not installed; pip install "modeling-mfn[serve]" brings it' in capsys.readouterr().err


@pytest.fixture(scope="module")
def client(folder):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    with socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "modeling_mfn", "serve", folder[0], "--port", str(port), "--device", "cpu"]
    server = subprocess.Popen(command, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(STARTUP):
            assert server.poll() is None
            try:
                urllib.request.urlopen(f"http://localhost:{port}/health")
                break
            except OSError:
                time.sleep(1)
        yield openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
    finally:
        server.terminate()
        server.wait()


def expected(folder, preset, prompt="w7 w30"):
    _, model, tokenizer = folder
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad(), model.steer(preset or {}):
        tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_streamed_chats_have_the_preset_that_their_model_s_name_has(folder, client):
    assert len({expected(folder, preset) for preset in ("", "loud", "quiet")}) == 3

    def chat(preset):
        chunks = client.chat.completions.create(
            model=f"{folder[0]}:{preset}" if preset else folder[0],
            messages=[{"role": "user", "content": "w7 w30"}],
            temperature=0,
            max_tokens=8,
            stream=True,
        )
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)

    asked = ["", "loud", "quiet"] * 4
    with ThreadPoolExecutor(6) as pool:  # requests with other presets run at the same time
        assert list(pool.map(chat, asked)) == [expected(folder, preset) for preset in asked]


def test_completions_and_the_list_of_models(folder, client):
    names = [folder[0], f"{folder[0]}:loud", f"{folder[0]}:quiet"]
    assert [model.id for model in client.models.list()] == names
    answer = client.completions.create(model=names[1], prompt="w7 w30", temperature=0, max_tokens=8)
    assert answer.choices[0].text == expected(folder, "loud")


def test_another_name_is_refused(folder, client):
    import openai

    for name in (f"{folder[0]}:shy", "gpt2"):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt="w7 w30", max_tokens=2)
        assert f"this server has {folder[0]}, {folder[0]}:loud, {folder[0]}:quiet" in caught.value.response.text
