"""The package is light to import, and the Auto classes know MFN models in any order of imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_base, make_mfn, tokens
from fresh_process import run_fresh
from safetensors.torch import save_file

import modeling_mfn

SOURCE = Path(modeling_mfn.__file__).read_text(encoding="utf-8")

LIGHT = """
import sys
before = set(sys.modules)
import modeling_mfn
modeling_mfn.__version__, dir(modeling_mfn)
added = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert added == {"modeling_mfn"}, added
"""


def test_the_package_alone_imports_the_standard_library_alone(tmp_path):
    run_fresh(LIGHT, tmp_path)


def test_editors_see_the_names_that_are_imported_when_first_used():
    """Imports under TYPE_CHECKING equal the table of public names."""
    (block,) = [node for node in ast.parse(SOURCE).body if isinstance(node, ast.If)]
    assert ast.unparse(block.test) == "TYPE_CHECKING"
    seen = {f".{node.module}": tuple(alias.name for alias in node.names) for node in block.body}
    assert seen == modeling_mfn._PUBLIC
    assert modeling_mfn.__all__ == sorted([*(name for names in seen.values() for name in names), "__version__"])
    assert set(modeling_mfn.__all__) <= set(dir(modeling_mfn))


def test_every_public_name_is_there_and_no_other():
    folders = {folder.name for folder in Path(modeling_mfn.__file__).parent.iterdir()}
    for name in modeling_mfn.__all__:
        assert getattr(modeling_mfn, name) is vars(modeling_mfn)[name]
        assert name not in folders, "import of the folder would hide the name"
    with pytest.raises(AttributeError, match="'modeling_mfn' has no attribute 'MFN'"):
        modeling_mfn.MFN  # noqa: B018


WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # an import of it fails
import modeling_mfn
for name in ("MFNForCausalLM", "MFNTrainer", "explain"):
    try:
        getattr(modeling_mfn, name)
    except ImportError as error:
        assert str(error) == f"modeling_mfn.{name} needs torch, which is not installed", error
    else:
        raise SystemExit(f"{name} needs no torch")
from transformers import CONFIG_MAPPING
assert CONFIG_MAPPING["mfn"] is modeling_mfn.MFNConfig
"""


def test_a_name_that_needs_torch_says_so(tmp_path):
    run_fresh(WITHOUT_TORCH, tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a small model, and file with its logits."""
    folder = tmp_path_factory.mktemp("saved")
    model, ids = make_mfn(make_base("gpt2-tied")), tokens(2, 9)["input_ids"]
    model.save_pretrained(folder / "model")
    save_file({"input_ids": ids, "logits": model(ids).logits.detach()}, folder / "expected")
    return folder / "model", folder / "expected"


KNOWN = """
import sys
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, AutoModelForCausalLM
import modeling_mfn
from modeling_mfn import MFNConfig, MFNForCausalLM, MFNModel
assert CONFIG_MAPPING["mfn"] is MFNConfig
assert MODEL_MAPPING[MFNConfig] is MFNModel
assert MODEL_FOR_CAUSAL_LM_MAPPING[MFNConfig] is MFNForCausalLM
assert {MFNConfig._auto_class, MFNModel._auto_class, MFNForCausalLM._auto_class} == {
    "AutoConfig", "AutoModel", "AutoModelForCausalLM",
}
assert type(AutoModelForCausalLM.from_pretrained(sys.argv[1])) is MFNForCausalLM
"""
THREADS = """
import threading
import modeling_mfn

def imports(statement):
    exec(statement, {})

statements = [
    "from transformers import AutoModelForCausalLM",
    "from transformers import GPT2LMHeadModel",
    "from modeling_mfn import MFNForCausalLM",
    "from modeling_mfn.model.configuration_mfn import MFNConfig",
]
threads = [threading.Thread(target=imports, args=(statement,)) for statement in statements]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


@pytest.mark.parametrize(
    "first",
    [
        pytest.param("import modeling_mfn\nfrom transformers import GPT2LMHeadModel", id="Auto classes amid a model"),
        pytest.param(
            "from transformers import AutoConfig\nimport modeling_mfn",
            id="plugin between Auto classes",
            marks=pytest.mark.slow,
        ),
        pytest.param("import modeling_mfn.model.mfn_for_causal_lm", id="our model first", marks=pytest.mark.slow),
        pytest.param(THREADS, id="four threads"),
        pytest.param("import modeling_mfn", id="plugin, then Auto classes", marks=pytest.mark.slow),
        pytest.param("import modeling_mfn.training.trainer", id="our trainer first", marks=pytest.mark.slow),
        pytest.param(
            "from transformers import AutoConfig, AutoModelForCausalLM",
            id="Auto classes, then plugin",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_the_auto_classes_know_the_model(first, saved, tmp_path):
    run_fresh(first + KNOWN, tmp_path, saved[0])


SPAWNED = """
import multiprocessing
import sys

def logits(model, ids):
    return model(ids).logits.detach().numpy()

if __name__ == "__main__":
    import torch
    from safetensors.torch import load_file
    from modeling_mfn import MFNForCausalLM

    expected = load_file(sys.argv[2])
    model = MFNForCausalLM.from_pretrained(sys.argv[1])
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(logits, (model, expected["input_ids"]))
    assert torch.equal(torch.from_numpy(found), expected["logits"])
"""


@pytest.mark.slow
def test_a_model_travels_to_a_spawned_worker(saved, tmp_path):
    (tmp_path / "script.py").write_text(SPAWNED)
    command = [sys.executable, "script.py", *map(str, saved)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert run.returncode == 0, run.stderr


ALONE = """
import re
import sys
from importlib import metadata

def needed(package, found):
    if package not in found:
        found.add(package)
        for line in metadata.requires(package) or []:
            if "extra ==" not in line and "sys_platform == 'win32'" not in line:
                name = re.match(r"[\\w.-]+", line)[0]
                try:
                    metadata.distribution(name)
                except metadata.PackageNotFoundError:
                    continue
                needed(normal(name), found)
    return found

def normal(name):
    return re.sub(r"[-_.]+", "-", name).lower()

installed = metadata.packages_distributions()
needs = needed("torch", needed("transformers", set())) - {"rich", "typer"}
for module, packages in installed.items():
    if not any(normal(package) in needs | {"modeling-mfn"} for package in packages):
        sys.modules[module] = None  # an import of it fails
for module in ("pyarrow", "datasets", "accelerate", "peft", "evaluate", "sklearn", "scipy", "pandas", "rich", "typer"):
    assert sys.modules.get(module, "") is None, module
ours = ("cli", "data", "demo", "evaluation", "explorer", "features", "hub", "interop", "training", "utils")
for name in ours:
    sys.modules[f"modeling_mfn.{name}"] = None
if sys.argv[3] == "remote code":
    sys.modules["modeling_mfn"] = None
else:
    import modeling_mfn
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

expected = load_file(sys.argv[2])
ids = expected["input_ids"]
for trust in {"plugin": (False, True), "remote code": (True,)}[sys.argv[3]]:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=trust)
    source = {"plugin": "modeling_mfn.", "remote code": "transformers_modules."}[sys.argv[3]]
    assert type(model).__module__.startswith(source), type(model)
    assert torch.equal(model(ids).logits, expected["logits"])
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, ids.shape[1] + 3)
"""


@pytest.mark.parametrize("way", ["plugin", "remote code"])
def test_a_model_needs_torch_and_transformers_alone(way, saved, tmp_path, monkeypatch):
    """A model loads and generates without other packages, and without the package's folders except `model`."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    run_fresh(ALONE, tmp_path, *saved, way)
