"""Tests of sharing on a local Hub, with the real huggingface_hub in separate processes."""

import importlib.util
import json
import multiprocessing
import os
import shutil
import time
from multiprocessing import forkserver
from pathlib import Path

import pytest
import torch
from conftest import make_base, make_mfn, tokens
from features_folder import label, write_features
from fresh_process import IMPORTS, WITHOUT_THE_PLUGIN, python_of, run_fresh
from huggingface_hub import ModelCard, constants
from local_hub import TOKEN, LocalHub
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from modeling_mfn import Explanation, FeatureAtlas, MFNForCausalLM
from modeling_mfn.cli.main import main
from modeling_mfn.hub.push import check_model

CODE = {
    f"{name}.py" for name in ("configuration_mfn", "mfn_for_causal_lm", "mfn_layer", "sparse_code", "interventions")
}
PUBLIC = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "training_record.json"}
PUBLIC |= {f"features/{name}" for name in ("atlas.json", "features.parquet", "examples.parquet", "labels.json")}
PUBLIC |= {"README.md"}
LARGE_TABLES = 2
"""Number of the atlas' tables. Tables are uploaded as large files."""
PRIVATE = ("training_args.bin", "trainer_state.json", "notes.txt", "secrets.json", "run.py", "checkpoint-5/config.json")


@pytest.fixture(scope="module")
def clients(tmp_path_factory):
    """Local Hub, and a fork server whose processes have imported the package with this Hub as their endpoint.

    A fork starts at once, and is a separate client.
    """
    with LocalHub() as hub, pytest.MonkeyPatch.context() as patch:
        home = tmp_path_factory.mktemp("home")
        for name, value in hub.environment(home).items():
            patch.setenv(name, value)
        context = multiprocessing.get_context("forkserver")
        loaded = ("cli.main", "features.atlas", "hub.push")
        context.set_forkserver_preload([f"modeling_mfn.{module}" for module in loaded])
        yield Clients(hub, home, context, tmp_path_factory.mktemp("output"))
        forkserver._forkserver._stop()  # the next module has another Hub


class Clients:
    def __init__(self, hub, home, context, output):
        self.hub, self.home, self.context, self.output = hub, home, context, output / "output.txt"

    def start(self, work, *arguments, token=TOKEN):
        process = self.context.Process(target=as_client, args=(self.output, self.hub.endpoint, token, work, arguments))
        process.start()
        return process

    def run(self, work, *arguments, code=0, token=TOKEN):
        """Runs a client and returns its output. Checks its exit code, and that it never prints the token."""
        process = self.start(work, *arguments, token=token)
        process.join()
        printed = self.output.read_text()
        assert process.exitcode == code, printed
        assert TOKEN not in printed
        return printed


def as_client(output, endpoint, token, work, arguments):
    assert endpoint == constants.ENDPOINT
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.pop("HF_TOKEN")
    if token:
        os.environ["HF_TOKEN"] = token
    work(*arguments)


def mfn(*arguments):
    main([str(argument) for argument in arguments])


@pytest.fixture
def hub(clients):
    clients.hub.reset()
    clients.hub.part_size = 2**30
    return clients.hub


def make_tokenizer():
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(96)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w0", unk_token="w0")


@pytest.fixture
def folder(tmp_path):
    """Folder as a training leaves it, with an atlas and weights in several shards."""
    folder = tmp_path / "trained"
    model = make_mfn(make_base("llama-tied"), layers=[0, 2])
    model.save_pretrained(folder, max_shard_size="20kB")
    make_tokenizer().save_pretrained(folder)
    (folder / "training_record.json").write_text(json.dumps({"steps": 5, "planned_steps": 5, "tokens": 640}))
    write_features(folder, [label("L2/7", "royalty"), label("L0/3", "<b>weather</b>")])
    for name in PRIVATE:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("private")
    return folder


def shards(folder):
    return {path.name for path in folder.glob("model-*.safetensors")}


SCRIPT = """
expected = load_file(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained("me/trained", trust_remote_code=True)
assert tokenizer("w5 w6 w7", return_tensors="pt")["input_ids"].tolist() == [[5, 6, 7]]
model = AutoModelForCausalLM.from_pretrained("me/trained", trust_remote_code=True)
assert torch.equal(model(expected["input_ids"]).logits, expected["logits"]), "logits"
with model.steer({"L2/7": {"kind": "clamp", "value": 9.0}}):
    assert not torch.equal(model(expected["input_ids"]).logits, expected["logits"]), "steered"
assert not any(name.partition(".")[0] == "modeling_mfn" for name in sys.modules)
"""


def test_a_pushed_folder_loads_in_a_fresh_process_without_the_plugin(clients, hub, folder, tmp_path, monkeypatch):
    printed = clients.run(mfn, "push", folder, "me/trained", "--message", "first")
    assert f"{hub.endpoint}/me/trained/commit/" in printed
    assert hub.repositories["me/trained"].messages == ["initial commit", "first"]
    assert not hub.repositories["me/trained"].private
    files = hub.files("me/trained")
    code = {name for name in files if name.endswith(".py")}
    assert code >= CODE
    assert set(files) == PUBLIC | code | shards(folder) | {"model.safetensors.index.json", ".gitattributes"}
    for name in set(files) - {".gitattributes"}:
        assert files[name] == (folder / name).read_bytes()
    assert len(hub.uploads) == len(shards(folder)) + LARGE_TABLES

    ids = tokens(2, 9)["input_ids"]
    logits = AutoModelForCausalLM.from_pretrained(folder)(ids).logits.detach()
    save_file({"input_ids": ids, "logits": logits}, tmp_path / "expected")
    for name, value in hub.environment(tmp_path / "home", token=None).items():
        monkeypatch.setenv(name, value)
    card = python_of(files["README.md"].decode())
    assert "me/trained" in card
    run_fresh(WITHOUT_THE_PLUGIN + IMPORTS + SCRIPT + card, tmp_path, tmp_path / "expected")
    assert not any(name.startswith("features/") for name in hub.downloads())


def read_card(expected):
    card = ModelCard.load("me/trained")
    assert str(card) == expected.read_text()
    assert (card.data.license, card.data.base_model) == ("mit", "me/base")
    figures = FeatureAtlas.from_pretrained(expected.parent).metadata["layers"].values()
    assert {result.metric_value for result in card.data.eval_results} == {n for of in figures for n in of.values()}


def test_the_card_has_the_license_that_the_base_has_on_the_hub(clients, hub, folder):
    hub.add("me/base", {"README.md": b"---\nlicense: mit\n---\n"})
    clients.run(mfn, "push", folder, "me/trained", "--base-model", "me/base")
    clients.run(read_card, folder / "README.md")


def test_a_card_of_ones_own(clients, hub, folder):
    (folder / "README.md").write_text("---\nlicense: mit\n---\nmy own words\n")
    assert "kept" not in clients.run(mfn, "push", folder, "me/trained")
    assert hub.files("me/trained")["README.md"].endswith(b"my own words\n")


def test_a_card_edited_on_the_hub_is_kept(clients, hub, folder):
    clients.run(mfn, "push", folder, "me/trained")
    edited = {"README.md": b"---\nlicense: mit\n---\nedited on the Hub\n"}
    repository = hub.repositories["me/trained"]
    for card in ("as the push left it", "none"):
        repository.commit("main", hub.files("me/trained") | edited | {"features/old.json": b"{}"}, "edit")
        assert "README.md in me/trained is kept" in clients.run(mfn, "push", folder, "me/trained"), card
        assert hub.files("me/trained")["README.md"] == edited["README.md"]
        assert "features/old.json" not in hub.files("me/trained")  # the rest was pushed
        (folder / "README.md").unlink(missing_ok=True)
    assert "kept" not in clients.run(mfn, "push", folder, "me/trained", "--revision", "another")
    assert b"royalty" in hub.files("me/trained", "another")["README.md"]


def test_a_killed_upload_goes_on_and_sends_nothing_twice(clients, hub, folder):
    hub.spared, hub.drops = 2, 10**9
    process = clients.start(mfn, "push", folder, "me/trained")
    while not hub.dropped.is_set() or len(hub.objects) < 2:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert set(hub.files("me/trained")) == {".gitattributes"}
    arrived = dict(hub.uploads)
    assert len(arrived) == 2
    hub.drops = 0
    clients.run(mfn, "push", folder, "me/trained")
    assert len(hub.uploads) == len(shards(folder)) + LARGE_TABLES
    assert set(hub.uploads.values()) == {1}
    assert set(shards(folder)) < set(hub.files("me/trained"))


def test_a_lost_connection_costs_the_part_that_was_on_its_way(clients, hub, folder):
    hub.part_size, hub.spared, hub.drops = 5_000, 3, 2
    clients.run(mfn, "push", folder, "me/trained")
    sizes = [(folder / name).stat().st_size for name in shards(folder)]
    parts = sum(-(-size // 5_000) for size in sizes if size > 5_000)
    assert sum(1 for path in hub.uploads if path.count("/") == 3) >= parts > len(sizes)
    assert set(hub.uploads.values()) == {1}
    assert hub.dropped.is_set()
    assert all(hub.files("me/trained")[name] == (folder / name).read_bytes() for name in shards(folder))


def load_revisions(folder, other):
    for revision, source in (("main", folder), ("half", other)):
        loaded = AutoModelForCausalLM.from_pretrained("me/trained", revision=revision)
        expected = AutoModelForCausalLM.from_pretrained(source)
        assert loaded.config.alpha == expected.config.alpha
        assert all(torch.equal(weight, expected.state_dict()[name]) for name, weight in loaded.state_dict().items())


@pytest.mark.parametrize("named", [True, False])
def test_code_of_the_first_version_leaves_the_repository(clients, hub, folder, named):
    """In a clone it would shadow the package. A file of that name which no config names is somebody's own."""
    clients.run(mfn, "push", folder, "me/trained")
    repository, files = hub.repositories["me/trained"], hub.files("me/trained")
    config = json.loads(files["config.json"])
    if named:
        config["auto_map"] = {"AutoModelForCausalLM": "modeling_mfn.MFNForCausalLM"}
    old = files | {"config.json": json.dumps(config).encode(), "modeling_mfn.py": b""}
    for branch in ("main", "other"):
        repository.commit(branch, old, "as version 0.1.0")
    clients.run(mfn, "push", folder, "me/trained")
    assert ("modeling_mfn.py" in hub.files("me/trained")) != named
    assert repository.messages[-2:] == ["as version 0.1.0", "Upload MFN model"]
    clients.run(mfn, "push", folder, "me/trained", "--revision", "other")
    assert ("modeling_mfn.py" in hub.files("me/trained", "other")) != named


def test_a_branch_of_its_own(clients, hub, folder, tmp_path):
    clients.run(mfn, "push", folder, "me/trained")
    model = make_mfn(make_base("llama-tied"), seed=12, layers=[1])
    model.set_blend(0.5)
    other = tmp_path / "other"
    model.save_pretrained(other)
    make_tokenizer().save_pretrained(other)
    clients.run(mfn, "push", other, "me/trained", "--revision", "half")
    clients.run(load_revisions, folder, other)
    # one whole file replaced the shards, and no shard is left to be mixed with it
    weights = {name for name in hub.files("me/trained", "half") if name.startswith("model") and ".safetensors" in name}
    assert weights == {"model.safetensors"}
    assert shards(folder) < set(hub.files("me/trained"))


def test_a_private_repository_without_a_token(clients, hub, folder):
    clients.run(mfn, "push", folder, "me/trained", "--private")
    assert hub.repositories["me/trained"].private
    for arguments, words in (
        (("steer", "me/trained", "w5", "--set", "L0/5=ablate"), "private repository, make sure to pass a token"),
        (("push", folder, "me/trained"), "log in with `hf auth login`"),
        (("push", folder, "me/another"), "log in with `hf auth login`"),
    ):
        printed = clients.run(mfn, *arguments, code=2, token=None)
        lines = [line for line in printed.splitlines() if line.startswith("mfn: ")]
        assert len(lines) == 1
        assert words in lines[0]
        assert "Traceback" not in printed
    clients.run(mfn, "push", folder, "me/trained", token="hf_of_somebody_else", code=2)
    printed = clients.run(push_model, folder, False, code=1, token=None)
    assert "OSError: " in printed.splitlines()[-1]
    assert "does not let you write to me/model: log in with `hf auth login`" in printed.splitlines()[-1]
    hub.add("me/open", {"a": b""})
    assert "me/open exists and is public" in clients.run(mfn, "push", folder, "me/open", "--private", code=2)
    assert set(hub.files("me/open")) == {"a"}
    assert list(hub.repositories) == ["me/trained", "me/open"]
    assert "steered" in clients.run(mfn, "steer", "me/trained", "w5", "--set", "L0/5=clamp:3")


def read_features_alone():
    from modeling_mfn.hub.atlas_summary import read_atlas

    atlas = read_atlas("me/trained")
    assert [feature.name for feature in atlas.labelled] == ["L0/3", "L2/7"]


def test_an_atlas_is_downloaded_alone(clients, hub, folder):
    clients.run(mfn, "push", folder, "me/trained")
    hub.requests.clear()
    clients.run(read_features_alone)
    assert set(hub.downloads()) == {name for name in PUBLIC if name.startswith("features/")}


def test_explain_reads_the_atlas_of_the_repository(clients, hub, folder, tmp_path):
    write_features(folder, [label(f"L{layer}/{index}", f"of {index}") for layer in (0, 2) for index in range(80)])
    clients.run(mfn, "push", folder, "me/explained")
    clients.run(mfn, "explain", "me/explained", "w5 w6 w7", "--output", tmp_path / "with")
    features = Explanation.load(tmp_path / "with").features
    assert {feature.atlas.label for feature in features} == {f"of {feature.index}" for feature in features} != set()
    bare = {name: content for name, content in hub.files("me/explained").items() if not name.startswith("features/")}
    hub.add("me/bare", bare)
    clients.run(mfn, "explain", "me/bare", "w5 w6 w7", "--output", tmp_path / "without")
    without = Explanation.load(tmp_path / "without")
    assert {feature.atlas for feature in without.features} == {None}
    assert [feature.name for feature in without.features] == [feature.name for feature in features]


def test_steer_reads_the_atlas_of_the_repository_where_a_label_asks_for_it(clients, hub, folder):
    write_features(folder, [label("L2/7", "royalty")])
    clients.run(mfn, "push", folder, "me/labelled")
    printed = clients.run(mfn, "steer", "me/labelled", "w5", "--set", "royalty=clamp:3")
    assert "royalty is L2/7" in printed
    bare = {name: content for name, content in hub.files("me/labelled").items() if not name.startswith("features/")}
    hub.add("me/unlabelled", bare)
    hub.requests.clear()
    printed = clients.run(mfn, "steer", "me/unlabelled", "w5", "--set", "royalty=clamp:3", code=2)
    assert "me/unlabelled has no atlas in which it could be a label" in " ".join(printed.split())
    assert hub.downloads() == []
    assert "steered" in clients.run(mfn, "steer", "me/unlabelled", "w5", "--set", "L2/7=clamp:3")


def push_model(folder, whole):
    model = AutoModelForCausalLM.from_pretrained(folder)
    parts = (
        {"tokenizer": AutoTokenizer.from_pretrained(folder), "atlas": FeatureAtlas.from_pretrained(folder)}
        if whole
        else {}
    )
    model.push_to_hub("me/model", commit_message="from Python", tags=["mine"], **parts)


def test_a_model_pushes_itself(clients, hub, folder):
    clients.run(push_model, folder, True)
    files = hub.files("me/model")
    wanted = PUBLIC - {"training_record.json"} | CODE | {"model.safetensors"}
    assert wanted <= set(files)
    card = ModelCard(files["README.md"].decode())
    assert "mine" in card.data.tags
    assert "royalty" in card.text
    weights = folder.parent / "weights"
    weights.write_bytes(files["model.safetensors"])
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    assert all(torch.equal(weight, expected[name]) for name, weight in load_file(weights).items())

    repository = hub.repositories["me/model"]
    repository.commit(
        "main", files | {"README.md": b"---\nlicense: mit\n---\nmine\n", "features/old.json": b"{}"}, "edit"
    )
    assert "README.md in me/model is kept" in clients.run(push_model, folder, False)
    assert hub.files("me/model")["README.md"].endswith(b"mine\n")
    assert "features/old.json" in hub.files("me/model")
    clients.run(push_model, folder, True)
    assert "features/old.json" not in hub.files("me/model")


def save_and_push(folder):
    MFNForCausalLM.from_pretrained(folder).save_pretrained(
        folder.parent / "again", push_to_hub=True, repo_id="me/model"
    )


def test_saving_pushes_where_it_is_asked_to(clients, hub, folder):
    clients.run(save_and_push, folder)
    assert {"config.json", "model.safetensors", *CODE} <= set(hub.files("me/model"))
    assert (folder.parent / "again" / "model.safetensors").is_file()


def push_without_the_package(folder):
    """Pushes a model whose publisher is not set, as in the code that is saved with a model."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    type(model).publisher = None
    with pytest.raises(ValueError, match="need `import modeling_mfn`"):
        model.push_to_hub("me/model", tokenizer=AutoTokenizer.from_pretrained(folder))
    model.push_to_hub("me/model", tags=["mine"])


def test_code_that_travels_pushes_as_transformers_does(clients, hub, folder):
    clients.run(push_without_the_package, folder)
    files = hub.files("me/model")
    assert {"config.json", "model.safetensors", *CODE} <= set(files)
    assert ModelCard(files["README.md"].decode()).data.tags == ["mine"]


@pytest.mark.parametrize("shared", [False, True], ids=["own decoders", "shared decoder"])
def test_a_saved_model_of_every_family_is_whole(base, tmp_path, shared):
    """Tied weights are stored once and are not called missing."""
    make_mfn(base, layers=[0, 2], shared_decoder=shared).save_pretrained(tmp_path)
    assert set(check_model(tmp_path)) >= CODE | {"config.json", "model.safetensors"}


def shorten(file):
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_weight(file):
    weights = load_file(file)
    weights.popitem()
    save_file(weights, file, metadata={"format": "pt"})


BREAK = {
    "is not a folder": shutil.rmtree,
    "no config.json": lambda folder: (folder / "config.json").unlink(),
    "a model of type 'llama'": lambda folder: (folder / "config.json").write_text('{"model_type": "llama"}'),
    "has no weights": lambda folder: [path.unlink() for path in folder.glob("model*s*")],
    "is missing, truncated or not safetensors": lambda folder: (folder / sorted(shards(folder))[1]).unlink(),
    "truncated": lambda folder: shorten(folder / min(shards(folder))),
    "is missing; config.json asks for": lambda folder: drop_a_weight(folder / min(shards(folder))),
    "has the shape [80, 32]; config.json asks for [40, 32]": lambda folder: (folder / "config.json").write_text(
        (folder / "config.json").read_text().replace('"num_features": 80', '"num_features": 40')
    ),
    "sparse_code.py is missing": lambda folder: (folder / "sparse_code.py").unlink(),
    "has no tokenizer": lambda folder: [path.unlink() for path in folder.glob("tokenizer*")],
    "atlas.json cannot be read": lambda folder: (folder / "features" / "atlas.json").write_text("{"),
    "README.md is a link to": lambda folder: link(folder, "README.md"),
    "tokenizer.json is a link to": lambda folder: link(folder, "tokenizer.json"),
    "atlas.json is a link to": lambda folder: link(folder, "features"),
    "config.json has 5 in auto_map": lambda folder: set_field(folder / "config.json", auto_map={"AutoModel": 5}),
    "config.json has '../notes.Model' in auto_map": lambda folder: set_field(
        folder / "config.json", auto_map=["../notes.Model"]
    ),
    "tokenizer_config.json has {} in auto_map": lambda folder: set_field(
        folder / "tokenizer_config.json", auto_map={"AutoTokenizer": [{}, None]}
    ),
    "config.json is of other weights (0123)": lambda folder: set_field(folder / "config.json", weights_digest="0123"),
    "has a perplexity on 'x' of weights 0123": lambda folder: (folder / "evaluation.json").write_text(
        '{"perplexity": [{"data": "x", "base": 2.0, "weights": "0123"}]}'
    ),
    "has the features": lambda folder: make_mfn(make_base("llama-tied"), seed=12, layers=[0, 2]).save_pretrained(
        folder
    ),
}


def link(folder, name):
    """Moves a file or folder elsewhere and leaves a link to it."""
    elsewhere = folder.parent / "elsewhere"
    if (folder / name).exists():
        (folder / name).rename(elsewhere)
    else:
        elsewhere.write_text("secret")
    (folder / name).symlink_to(elsewhere)


def set_field(file, **fields):
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


@pytest.mark.parametrize("message", BREAK)
def test_what_is_not_whole_is_refused_before_anything_is_sent(folder, capsys, message):
    """Any request would give another error, because this process is offline."""
    BREAK[message](folder)
    with pytest.raises(SystemExit) as leaving:
        mfn("push", folder, "me/trained")
    assert leaving.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("mfn: "))
    assert message in line
    assert not (folder / "README.md").exists() or message.startswith("README.md")


def test_a_tokenizer_is_shared_with_its_templates_and_its_code(folder):
    (folder / "additional_chat_templates").mkdir()
    new = {"chat_template.jinja", "additional_chat_templates/tools.jinja", "tokenization_own.py", "own_words.py"}
    for name in new:
        (folder / name).write_text("from .own_words import WORDS" if name.startswith("tokenization") else "")
    set_field(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    assert new <= set(check_model(folder))
    set_field(folder / "tokenizer_config.json", auto_map={"AutoTokenizer": "owner/name--tokenization_own.OwnTokenizer"})
    assert not {"tokenization_own.py", "own_words.py"} & set(check_model(folder))


def test_the_links_of_the_hubs_cache_are_shared(folder):
    """A snapshot is a folder of links into `blobs`."""
    cache = folder.parent / "models--me--trained"
    snapshot = cache / "snapshots" / "abc"
    shutil.move(folder, cache / "blobs")
    for file in (path for path in (cache / "blobs").rglob("*") if path.is_file()):
        place = snapshot / file.relative_to(cache / "blobs")
        place.parent.mkdir(parents=True, exist_ok=True)
        place.symlink_to(file)
    assert set(check_model(snapshot)) == set(check_model(cache / "blobs"))


def test_errors_before_the_first_byte(folder, capsys):
    for repo, message in (("a/b/c", "Repo id must be"), ("me/trained", "offline")):
        with pytest.raises(SystemExit):
            mfn("push", folder, repo)
        (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("mfn: "))
        assert message in line


def test_the_example_shows_what_would_be_public(folder, capsys, monkeypatch):
    """The example runs without a network."""
    file = Path(__file__).parents[2] / "examples" / "share_on_hub.py"
    spec = importlib.util.spec_from_file_location("share_on_hub", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    monkeypatch.setattr("sys.argv", ["share_on_hub.py", "--model", str(folder)])
    script.main()
    printed = capsys.readouterr().out
    assert {line.split()[0] for line in printed.splitlines() if " bytes" in line} >= PUBLIC - {"README.md"} | shards(
        folder
    )
    assert not any(name in printed for name in PRIVATE)
    assert "royalty" in printed
    assert not (folder / "README.md").exists()
