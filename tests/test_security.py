"""The threats of SECURITY.md: each names the tests of its protection, and some of these tests are here."""

import hashlib
import os
import pickle
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_mfn
from trainings import train
from transformers import AutoModelForCausalLM

from benchmarks.reliability.readers import FILES
from modeling_mfn import MFNForCausalLM
from modeling_mfn.demo.assets import download

ROOT = Path(__file__).parent.parent


def test_every_threat_names_tests_that_exist():
    rows = [line.split("|")[1:-1] for line in (ROOT / "SECURITY.md").read_text().splitlines() if line.startswith("| ")]
    head, _, *threats = rows
    assert [cell.strip() for cell in head] == ["threat", "protection", "tests"]
    for threat, _, tests in threats:
        files = re.findall(r"`(.+?)`", tests)
        assert files, threat
        assert all((ROOT / "tests" / file).is_file() for file in files), threat


class Attack:
    """Object whose pickle runs a command when it is read."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("reader", FILES)
def test_no_reader_unpickles(reader, tmp_path):
    whole, trace = tmp_path / "whole", tmp_path / "trace"
    whole.mkdir()
    FILES[reader].make(whole)
    for file in [path for path in sorted(whole.rglob("*")) if path.is_file()]:
        hostile = tmp_path / "hostile"
        shutil.copytree(whole, hostile)
        (hostile / file.relative_to(whole)).write_bytes(pickle.dumps(Attack(trace)))
        try:
            FILES[reader].read(hostile)
        except FILES[reader].refusals:
            pass
        assert not trace.exists()
        shutil.rmtree(hostile)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_files_of_torch_run_nothing(name, tmp_path):
    """transformers reads them with `weights_only=True`."""
    trace, settings = tmp_path / "trace", {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    model = make_mfn(make_base("gpt2-tied"))
    train(tmp_path / "out", model, **settings)
    checkpoint = tmp_path / "out" / "checkpoint-1"
    torch.save(Attack(trace), checkpoint / name)
    if name == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        train(tmp_path / "out", model, resume=str(checkpoint), **settings)
    assert not trace.exists()


def test_the_code_of_a_folder_is_not_run(tmp_path):
    trace = tmp_path / "trace"
    make_mfn(make_base("llama-tied")).save_pretrained(tmp_path / "model")
    for file in (tmp_path / "model").glob("*.py"):
        file.write_text(f"import os\nos.mkdir({str(trace)!r})\n" + file.read_text())
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "model")) is MFNForCausalLM
    assert not trace.exists()


@pytest.mark.parametrize("exchanged", [False, True])
def test_a_download_is_checked(exchanged, tmp_path, monkeypatch):
    wheel = tmp_path / "index" / "thing-1.0-py3-none-any.whl"
    wheel.parent.mkdir()
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("thing-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: thing\nVersion: 1.0\n")
        file.writestr("thing-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
    known = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if exchanged:
        wheel.write_bytes(wheel.read_bytes() + b" ")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    place = tmp_path / "downloads"
    place.mkdir()
    if exchanged:
        with pytest.raises(subprocess.CalledProcessError):
            download("thing==1.0", known, place)
    else:
        assert download("thing==1.0", known, place).read_bytes() == wheel.read_bytes()
