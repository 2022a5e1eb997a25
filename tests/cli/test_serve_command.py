"""`mfn serve`, driven by OpenAI's own client; and what it says without the packages that it needs."""

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from socket import socket
from urllib.error import HTTPError

import pytest
import torch
from conftest import make_base, make_mfn
from tokenizers_for_tests import numbered_words

from modeling_mfn import Ablate, Add, Clamp, MFNConfig
from modeling_mfn.cli.main import main
from modeling_mfn.cli.served_models import ServedModels

TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"
STARTUP = 120
"""Seconds in which the server must answer."""
PRESETS = ["loud", "quiet", "x.gguf", "y", "y@main"]
"""Presets of the model. transformers takes some of these names apart."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Folder of a model with presets, one of them lost to pruning, and of a tokenizer with a chat template."""
    made = tmp_path_factory.mktemp("served")
    tokenizer = numbered_words()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(made / "model")
    model = make_mfn(make_base("llama-tied"))
    model.save_preset("loud", {"L0/3": Clamp(30.0), "L2/9": Clamp(30.0)})
    model.save_preset("quiet", {"L1/5": Clamp(20.0), "L0/1": Ablate()}, positions="generated")
    model.save_preset("x.gguf", {"L0/5": Clamp(30.0)})
    model.save_preset("y", {"L1/7": Add(10.0)})
    model.save_preset("y@main", {"L2/2": Clamp(30.0)})
    model.save_preset("lost", {"L0/6": Clamp(30.0)})
    model.prune_features(0, [6])
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


def expected(folder, preset):
    _, model, tokenizer = folder
    with model.steer(preset or {}):
        return generated(model, tokenizer)


@torch.no_grad()
def generated(model, tokenizer):
    inputs = tokenizer("w7 w30", return_tensors="pt")
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


def complete(client, name):
    answer = client.completions.create(model=name, prompt="w7 w30", temperature=0, max_tokens=8)
    return answer.model, answer.choices[0].text


def test_every_listed_name_is_answered_with_its_preset(folder, client):
    presets = {folder[0]: None} | {f"{folder[0]}:{preset}": preset for preset in PRESETS}
    assert [model.id for model in client.models.list()] == list(presets)
    texts = {name: expected(folder, preset) for name, preset in presets.items()}
    assert len(set(texts.values())) == len(texts)
    for name, text in texts.items():
        assert complete(client, name) == (name, text)


def test_names_may_have_the_revision_main(folder, client):
    for preset in (None, "loud", "x.gguf", "y@main"):
        name = f"{folder[0]}:{preset}@main" if preset else f"{folder[0]}@main"
        assert complete(client, name) == (name, expected(folder, preset))


def test_a_request_without_a_model_gets_the_plain_one(folder, client):
    import openai

    for name in (None, openai.omit):
        assert complete(client, name) == (folder[0], expected(folder, None))


def post(client, path, **body):
    """Posts to a path of the server that OpenAI's API lacks."""
    url = str(client.base_url).replace("/v1/", path)
    request = urllib.request.Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    return urllib.request.urlopen(request).read().decode()


def test_names_outlive_a_reset_and_one_copy_is_loaded_for_all_of_them_and_for_no_other(folder, client):
    post(client, "/reset")
    with pytest.raises(HTTPError, match="404"):
        post(client, "/load_model", model=f"{folder[0]}:shy.gguf")
    assert [model.id for model in client.models.list()][1:] == [f"{folder[0]}:{preset}" for preset in PRESETS]
    for name, cached in ((f"{folder[0]}:x.gguf", "false"), (f"{folder[0]}:loud", "true"), (folder[0], "true")):
        told = post(client, "/load_model", model=name)
        assert f'"status": "ready", "model": "{folder[0]}", "cached": {cached}' in told
    assert complete(client, folder[0]) == (folder[0], expected(folder, None))


def test_another_name_is_refused(folder, client):
    import openai

    for name in (f"{folder[0]}:shy", f"{folder[0]}:shy.gguf", f"{folder[0]}:lost", "gpt2", "gpt2:x.gguf", 5):
        with pytest.raises(openai.NotFoundError) as caught:
            client.completions.create(model=name, prompt="w7 w30", max_tokens=2)
        assert f"this server has {folder[0]}, {folder[0]}:loud, {folder[0]}:quiet" in caught.value.response.text
        if isinstance(name, str):
            with pytest.raises(HTTPError, match="404"):
                post(client, "/load_model", model=name)


def copy_with_active_preset(folder, place, preset):
    shutil.copytree(folder[0], place, dirs_exist_ok=True)
    config = MFNConfig.from_pretrained(place)
    config.active_preset = preset
    config.save_pretrained(place)


@pytest.mark.parametrize("active", ["quiet", "y"])
def test_the_plain_name_has_the_active_preset_and_other_names_their_own_alone(folder, active, tmp_path):
    pytest.importorskip("fastapi")
    copy_with_active_preset(folder, tmp_path, active)
    served = ServedModels(force_model=str(tmp_path), device="cpu")
    for preset in (None, "loud", "quiet", "y"):
        model, tokenizer = served.load_model_and_processor(f"{tmp_path}:{preset}" if preset else str(tmp_path))
        assert generated(model, tokenizer) == expected(folder, preset or active)


def test_an_active_preset_that_pruning_left_nothing_of_is_refused(folder, tmp_path, capsys):
    pytest.importorskip("fastapi")
    copy_with_active_preset(folder, tmp_path, "lost")
    with pytest.raises(SystemExit) as left:
        main(["serve", str(tmp_path)])
    assert left.value.code == 2
    assert "active_preset is 'lost', which has nothing left" in " ".join(capsys.readouterr().err.split())
