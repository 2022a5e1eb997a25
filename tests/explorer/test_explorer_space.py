"""The Docker Space of the examples: its app runs as a process with a small model, and its files fit together."""

import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from explored_model import save
from huggingface_hub import SpaceCard

pytest.importorskip("uvicorn")

from modeling_mfn.explorer.server.app import listen

ROOT = Path(__file__).parents[2]
SPACE = ROOT / "examples" / "space"


def test_the_space_s_files_fit_together():
    card = SpaceCard.load(SPACE / "README.md")
    assert (card.data.sdk, card.data.app_port) == ("docker", 7860)
    docker = (SPACE / "Dockerfile").read_text()
    assert f"EXPOSE {card.data.app_port}" in docker
    assert "USER user" in docker
    assert 'CMD ["python", "app.py"]' in docker
    assert re.search(r"^modeling-mfn\[serve\]$", (SPACE / "requirements.txt").read_text(), re.MULTILINE)


def ask(address, path, body=None, method=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(
        f"{address}{path}", data, {"Content-Type": "application/json", "Host": "owner-name.hf.space"}, method=method
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read().decode()


def test_the_app_serves_a_model_to_everybody_and_saves_nothing(tmp_path):
    save(tmp_path / "model")
    before = {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()}
    with listen("localhost", 0) as free:
        port = free.getsockname()[1]
    environment = os.environ | {"MFN_MODEL": str(tmp_path / "model"), "PORT": str(port), "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(
        [sys.executable, str(SPACE / "app.py")], env=environment, cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    try:
        assert server.stdout.readline() == f"the explorer of {tmp_path / 'model'} is at port {port}\n"
        address = f"http://127.0.0.1:{port}"
        status, headers, _ = ask(address, "/data/site.js")
        assert status == 200
        assert "frame-ancestors https://huggingface.co https://*.hf.space" in headers["content-security-policy"]
        assert "x-frame-options" not in headers
        session = json.loads(ask(address, "/api/session")[2])
        assert session["writable"] is False
        assert session["limits"]["new_tokens"] == 64
        status, _, told = ask(address, "/api/generate", {"prompt": "we go", "max_new_tokens": 3})
        assert status == 200
        assert json.loads(told.splitlines()[-1])["done"] is True
        assert ask(address, "/api/generate", {"prompt": "we go", "max_new_tokens": 65})[0] == 422
        assert ask(address, "/api/labels/0/1", {"label": "x"}, "PUT")[0] == 403
        assert ask(address, "/api/presets/x", {"interventions": {}}, "PUT")[0] == 403
    finally:
        server.terminate()
        server.wait(60)
    assert {file: file.read_bytes() for file in (tmp_path / "model").rglob("*") if file.is_file()} == before
