"""The package as users get it: built, installed into empty environments, and run there with each of its extras."""

import os
import re
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from fresh_process import python_of
from packaging.requirements import Requirement
from packaging.version import Version

import modeling_mfn

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def bounds(lines):
    """Name -> version specifier, from lines of a constraints file or of the project's dependencies."""
    return {Requirement(line).name.lower().replace("_", "-"): Requirement(line).specifier for line in lines}


def test_floors_are_the_lower_bounds():
    """Versions in `constraints-min.txt` are the oldest that the project allows, except for torch."""
    lines = (ROOT / "constraints-min.txt").read_text(encoding="utf-8").splitlines()
    pinned = bounds(line for line in lines if line and not line.startswith("#"))
    asked = bounds(PROJECT["dependencies"])
    for extra in ("labels", "evaluate", "demo"):
        asked |= bounds(PROJECT["optional-dependencies"][extra])
    asked.pop("torch")
    for name, specifier in asked.items():
        (lowest,), (tried,) = specifier, pinned[name]
        assert Version(lowest.version) == Version(tried.version), name


def test_the_citation_names_the_version():
    cited = re.search(r"^version: (.*)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert modeling_mfn.__version__.split(".dev")[0] == cited
    assert f"## [{cited}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """Folder with wheel and source distribution."""
    folder = tmp_path_factory.mktemp("built")
    run(sys.executable, "-m", "build", "--outdir", folder, ROOT)
    return folder


@pytest.fixture(scope="session")
def install(built, tmp_path_factory):
    """Returns a function that installs the wheel with an extra into a new environment and returns its Python."""
    made = {}

    def installed(extra):
        if extra not in made:
            folder = tmp_path_factory.mktemp(extra or "plain")
            venv.create(folder, with_pip=True)
            python = folder / "bin" / "python"
            pip = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt"]
            run(*pip, "torch")
            (wheel,) = built.glob("*.whl")
            run(*pip, f"{wheel}[{extra}]" if extra else wheel)
            made[extra] = python
        return made[extra]

    return installed


def run(*command, check=True, **options):
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "HF_HUB_OFFLINE")}
    found = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, check=False, **options
    )
    assert found.returncode == 0 or not check, found.stdout + found.stderr
    return found


@pytest.mark.extras
def test_the_wheel_has_the_package_and_the_source_distribution_has_the_tests(built):
    (wheel,), (source,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    files = {file for file in (ROOT / "modeling_mfn").rglob("*") if file.is_file() and "__pycache__" not in file.parts}
    assert names == {file.relative_to(ROOT).as_posix() for file in files}
    assert {"modeling_mfn/py.typed", "modeling_mfn/hub/card_template.md"} <= names
    assert (
        sum(name.endswith("/README.md") for name in names) == len(list((ROOT / "modeling_mfn").rglob("README.md"))) > 4
    )
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"tests/test_packaging.py", "tests/fixtures/0.1.0/gpt2/model/config.json", "constraints-min.txt"} <= names
    assert {"README.md", "LICENSE", "CHANGELOG.md", "Makefile", "docs/index.md"} <= names


PLAIN = """
import sys
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from modeling_mfn import Clamp, MFNForCausalLM, MFNTrainer, MFNTrainingArguments

sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
base = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, pad_token_id=0, **sizes))
rows = [{"input_ids": row, "labels": row} for row in torch.randint(3, 32, (8, 12))]
model = MFNForCausalLM.from_base(base, num_features=32, k=4, calibration={"input_ids": rows[0]["input_ids"][None]})
arguments = MFNTrainingArguments("out", max_steps=2, use_cpu=True, report_to=[])
MFNTrainer(model, arguments, train_dataset=rows).train()
model.save_pretrained("model")
loaded = AutoModelForCausalLM.from_pretrained("model")
with loaded.steer({"L0/3": Clamp(2.0)}):
    assert loaded.generate(rows[0]["input_ids"][None], max_new_tokens=3).shape == (1, 15)
for missing in ("scipy", "sklearn", "matplotlib", "gguf"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{missing} is there")
"""


@pytest.mark.extras
def test_the_plain_package_converts_trains_saves_loads_and_generates(install, tmp_path):
    python = install("")
    run(python, "-c", PLAIN, cwd=tmp_path)
    assert "Usage" in run(python.parent / "mfn", "--help").stdout


NEEDS = {
    "labels": ("scipy", "from modeling_mfn import compare_features"),
    "evaluate": ("scipy", "from modeling_mfn.evaluation.predictions import p2_probe_purity"),
    "serve": ("fastapi", "from modeling_mfn.cli.serve import check_packages; check_packages()"),
    "demo": ("gguf", "from modeling_mfn.demo import assets; print(assets.smollm2())"),
}


@pytest.mark.extras
@pytest.mark.parametrize("extra", NEEDS)
def test_an_extra_brings_what_its_part_needs(extra, install, tmp_path, monkeypatch):
    """An error of one line names a missing extra."""
    monkeypatch.setenv("MFN_CACHE", str(tmp_path / "cache"))
    package, statement = NEEDS[extra]
    without = run(install(""), "-c", statement, check=False, cwd=tmp_path)
    line = f'{package} is not installed; pip install "modeling-mfn[{extra}]" brings it'
    assert without.returncode != 0
    assert without.stderr.splitlines()[-1].endswith(line)
    run(install(extra), "-c", statement, cwd=tmp_path)


@pytest.mark.extras
def test_readme_runs_as_pasted(install, tmp_path):
    quickstart = re.search(r"^## Quickstart$.*?(?=^## )", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    script = tmp_path / "quickstart.py"
    script.write_text(python_of(quickstart[0]))
    assert run(install("demo"), script, cwd=tmp_path).stdout
