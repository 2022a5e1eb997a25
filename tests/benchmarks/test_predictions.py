"""Study of benchmarks/small/predictions.py on a tiny base and a few random windows."""

import json
import time
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import typer
from conftest import make_base
from datasets import concatenate_datasets
from scipy.linalg import sqrtm
from tokenizers_for_tests import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.common import concepts, corpora, records, small_models
from benchmarks.small import predictions, recipes, remedies, sensitivity
from modeling_mfn.evaluation.baselines import models as baseline_models
from modeling_mfn.evaluation.baselines import saes as baselines
from modeling_mfn.evaluation.measures.perplexity import perplexity
from modeling_mfn.evaluation.measures.probe_scores import probe_model
from modeling_mfn.evaluation.measures.tasks import Task
from modeling_mfn.evaluation.predictions.p3_seed_alignment import cross_seed_alignment
from modeling_mfn.evaluation.result import FINE_TUNED_SAE, MFN, NO_RATE_LOSS, POST_HOC_SAE, RANDOM_SAE, plain

WINDOW = 16


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_base("llama-tied").to(torch.bfloat16).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return predictions.PredictionStudy(
        name="tiny", base=folder, window=WINDOW, layers=(1,), num_features=64, tokens=48 * WINDOW,
        held_out_tokens=6 * WINDOW, learning_rate=1e-3, seeds=2, codes="update",
    )  # fmt: skip


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Replaces the corpora by a few random windows, and word lists and sizes by small ones."""
    random = np.random.default_rng(0)
    rows = {
        part: {d: random.integers(3, len(make_tokenizer()), (n, WINDOW)) for d in corpora.DOMAINS}
        for part, n in (("train", 300), ("held_out", 12))
    }
    data = small_models.Data(**rows)
    monkeypatch.setenv("MFN_CACHE", str(tmp_path))
    monkeypatch.setattr(small_models, "tokenised", lambda *args: data)
    monkeypatch.setattr(concepts, "concepts", lambda: {"a": ["one", "two"], "b": ["three"]})
    monkeypatch.setattr(predictions.word_lists, "polarity", dict)
    monkeypatch.setattr(predictions.word_lists, "parts_of_speech", dict)
    monkeypatch.setattr(predictions, "K", 4)
    monkeypatch.setattr(small_models, "EVALUATION_TOKENS", 4 * WINDOW)
    return data


@pytest.mark.slow
def test_every_subject_learns_from_the_same_tokens_and_is_kept(study, data, tmp_path, monkeypatch):
    found, alone, learn_from_cache = [], [], recipes.fidelity.learn_from_cache
    read_by_saes, post_hoc_sae = [], baselines.post_hoc_sae
    monkeypatch.setattr(predictions, "measure_predictions", lambda *given: found.append(given))
    monkeypatch.setattr(
        recipes.fidelity, "learn_from_cache", lambda *given: alone.append(given) or learn_from_cache(*given)
    )
    monkeypatch.setattr(
        baseline_models,
        "post_hoc_sae",
        lambda base, rows, **given: read_by_saes.append(rows) or post_hoc_sae(base, rows, **given),
    )
    predictions.run_study(study, ["P1", "P5"], torch.get_num_threads())
    ((evidence, names, settings, folder, commit),) = found
    assert commit == records.COMMIT
    assert len(alone) == 4  # two seeds each on one and on all domains; the model without the rate loss shares one

    assert names == ["P1", "P5"]
    assert folder.name == "tiny"
    assert settings["seeds"] == 2
    assert str(study.base) not in str(settings)
    alphas = {name: [model.config.alpha for model in models] for name, models in evidence.subjects.items()}
    assert alphas == {MFN: [1, 1], NO_RATE_LOSS: [1], POST_HOC_SAE: [0, 0], RANDOM_SAE: [0, 0]}
    sizes = {
        (m.config.num_features, m.config.k, tuple(m.config.layers)) for of in evidence.subjects.values() for m in of
    }
    assert sizes == {(64, 4, (1,))}
    assert {m.config.codes for of in evidence.subjects.values() for m in of} == {"update"}
    assert {m.dtype for of in evidence.subjects.values() for m in of} == {torch.float32}
    base = AutoModelForCausalLM.from_pretrained(study.base, dtype=torch.float32)
    rows = torch.tensor(evidence.held_out["code"]["input_ids"])
    for sae in evidence.subjects[POST_HOC_SAE]:
        assert torch.equal(sae(rows).logits, base(rows).logits)
    first, second = evidence.subjects[MFN]
    assert not torch.equal(first(rows).logits, second(rows).logits)

    taken = [{tuple(row) for row in study.rows(None, seed)["input_ids"]} for seed in (0, 1)]
    assert not taken[0] & taken[1]
    assert not {tuple(row) for row in evidence.choosing["input_ids"]} & (taken[0] | taken[1])
    of_domain = [study.rows("code", seed)["input_ids"] for seed in (0, 1)]
    assert of_domain[0] != of_domain[1]
    assert sorted(of_domain[0]) == sorted(of_domain[1])
    assert {tuple(row) for row in of_domain[0]} <= set(map(tuple, data.train["code"].tolist()))
    # MFN layers and SAEs of one domain learn from text with random tokens, all others from text alone
    for number, (domain, seed) in enumerate([(predictions.SOURCE, 0), (predictions.SOURCE, 1), (None, 0), (None, 1)]):
        of_mfn, of_sae = (np.array(rows["input_ids"]) for rows in (alone[number][1], read_by_saes[number]))
        share = (of_mfn != np.array(study.rows(domain, seed)["input_ids"])).mean()
        assert np.array_equal(of_mfn, of_sae)
        assert share == (pytest.approx(0.3, abs=0.1) if domain else 0)
    usual = {tuple(row) for row in data.evaluation("code", 4 * WINDOW)["input_ids"]}
    assert not {tuple(row) for row in evidence.held_out["code"]["input_ids"]} & usual

    assert {name: len(of) for name, of in evidence.transfers.items()} == {MFN: 2, POST_HOC_SAE: 2, FINE_TUNED_SAE: 2}
    for tuned, as_it_was in zip(evidence.transfers[FINE_TUNED_SAE], evidence.transfers[POST_HOC_SAE], strict=True):
        assert set(tuned.tuned) == set(corpora.DOMAINS) - {predictions.SOURCE}
        weights = [each.mfn_layers[1].encoder.weight for each in (as_it_was.model, *tuned.tuned.values())]
        assert not torch.equal(weights[0], weights[1])
        assert not torch.equal(weights[1], weights[2])
    for of_mfn, of_sae in zip(evidence.transfers[MFN], evidence.transfers[POST_HOC_SAE], strict=True):
        dense = of_mfn.reference(rows).logits
        assert not torch.equal(dense, base(rows).logits)
        assert torch.equal(of_sae.model(rows).logits, dense)  # both are compared with the same dense model

    # saving and loading between the two trainings changes nothing
    text, made = lambda seed: study.rows(None, seed), {"recipe": recipes.STUDY}
    size = {"layers": [1], "num_features": 64, "k": 4, "codes": "update"}
    model = recipes.train_alone(study.base, text, 1, size=size, **made)
    recipes.train_together(model, text(1), 1, tmp_path / "training", learning_rate=study.learning_rate, **made)
    assert all(torch.equal(value, second.state_dict()[name]) for name, value in model.state_dict().items())

    predictions.run_study(study, ["P1"], torch.get_num_threads())
    assert found[1][0].transfers == {}
    assert found[1][2] == settings
    evidence.subjects[RANDOM_SAE][0].mfn_layers[1].encoder.bias.data.add_(1)
    evidence.subjects[RANDOM_SAE][0].save_pretrained(predictions.StudyModels(study).folder / "random-seed-0")
    predictions.run_study(study, ["P1"], torch.get_num_threads())
    assert found[2][2] != settings

    def fail(*args, **kwargs):
        raise AssertionError("this was there")

    for place, name in (
        (recipes.fidelity, "learn_from_cache"), (recipes, "MFNTrainer"), (small_models, "train_dense"),
        *((baseline_models, name) for name in ("post_hoc_sae", "fine_tune_sae", "random_sae")),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, fail)
    models = predictions.StudyModels(study)
    sae = evidence.transfers[POST_HOC_SAE][0].model
    by_setting = [
        (recipes.fidelity.FROM_CACHE, "learning_rate", models.mfn),
        (recipes.JOINT, "mfn_learning_rate", models.mfn),
        (small_models.OPTIMIZER, "adam_beta2", partial(models.dense, domain="dictionary", recipe=recipes.ONE_DOMAIN)),
        (baselines.RECIPE, "rate_window", models.sae),
        (
            baselines.RECONSTRUCTION_ALONE,
            "lambda_recon",
            partial(models.baselines_for(recipes.ONE_DOMAIN).tuned_sae, sae=sae, domain="code"),
        ),
    ]
    for place, name, model in by_setting:
        model(0)
        with monkeypatch.context() as patch:
            patch.setitem(place, name, 0.5)
            with pytest.raises(AssertionError, match="this was there"):
                model(0)


def test_minutes_are_of_a_run_that_makes_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("MFN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(predictions, "RESULTS", tmp_path)
    monkeypatch.setattr(predictions, "prepare", lambda: None)
    minutes, results = tmp_path / "time.json", [tmp_path / family / "P3.json" for family in ("llama", "gpt2")]

    def make(work, families, processes):
        assert (families, processes) == (["llama", "gpt2"], 2)
        for file in results[:number]:
            file.parent.mkdir(exist_ok=True)
            file.write_text("")

    monkeypatch.setattr(predictions, "in_processes", make)
    run = partial(predictions.main, predictions="P3")
    for number in (2, 1, 0):  # number of results that the run writes
        run()
        assert minutes.exists() == (number == 2)
        if number == 2:
            assert json.loads(minutes.read_text())["families"] == ["llama", "gpt2"]
            minutes.unlink()
    number = 2
    (tmp_path / "cache" / "predictions").mkdir(parents=True)
    run()
    assert not minutes.exists()
    with pytest.raises(typer.BadParameter, match="family is llama, and base here"):
        run(family=["llama"], base="here")


@pytest.fixture
def here(study, monkeypatch):
    """Runs all work in this process, on the tiny study."""
    monkeypatch.setattr(predictions, "small_study", lambda family, seeds, codes="update": study)
    monkeypatch.setattr(predictions, "in_processes", lambda work, on, processes: [work(each) for each in on])
    monkeypatch.setattr(small_models, "data", dict)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_a_remedy_is_measured_as_what_it_is_instead_of(study, data, tmp_path, monkeypatch):
    monkeypatch.setattr(predictions, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(remedies, "ON_ALL", ("P1", "P3"))
    half = recipes.Recipe(size={"num_features": 32})
    table = {
        of: {name: remedies.OF_STREAM[of][name] for name in names}
        for of, names in (("P3", ("same-first-dictionary", "same-learnt-dictionary")), ("P5", ("frozen-backbone",)))
    }
    own = remedies.Remedies(recipes.Recipe(), recipes.Recipe(), "plain", table | {"P2": {"half": half}})
    monkeypatch.setitem(remedies.REMEDIES, "update", own)  # what the tiny models code
    run = partial(remedies.main, family=["llama"], codes="update", seeds=2)
    run()
    names = (
        "all/as-it-is", "P3/same-first-dictionary", "P3/same-learnt-dictionary", "P2/half", "P5/as-it-is",
        "P5/frozen-backbone",
    )  # fmt: skip
    files = [tmp_path / "results/llama-update/remedies" / f"{name}.json" for name in names]
    usual, shared, shared_learnt, halved, on_source, frozen = (json.loads(file.read_text()) for file in files)
    folders = {folder.name for folder in (tmp_path / "predictions" / "tiny").glob("[!.as]*")}
    assert folders == {
        "plain-all-seed-0", "plain-all-seed-1", "P2-half-all-seed-0", "P2-half-all-seed-1",
        # seed 0 of these remedies is the plain model
        "P3-same-first-dictionary-all-seed-1", "P3-same-learnt-dictionary-all-seed-1",
        *(
            f"{kind}-seed-{seed}"
            for kind in ("plain-dictionary", "dense-dictionary-0.00", "P5-frozen-backbone-dictionary")
            for seed in (0, 1)
        ),
        "training",
    }  # fmt: skip

    models = predictions.StudyModels(study)
    held_out = {d: study.data.evaluation(d, 4 * WINDOW) for d in corpora.DOMAINS}
    for domain, rows in held_out.items():  # remedies are not chosen on the held-out windows of the study
        fresh = study.data.fresh(domain, study.held_out_tokens)
        assert not set(map(tuple, fresh["input_ids"])) & set(map(tuple, rows["input_ids"]))
    first, second = (models.mfn(seed, kind="plain", recipe=recipes.Recipe()) for seed in (0, 1))
    choosing = study.data.sample(study.held_out_tokens, after=study.skip + study.seeds * study.tokens)
    windows = concatenate_datasets(list(held_out.values()))
    saes = [models.sae(0), models.sae(1)]
    alignment = cross_seed_alignment({MFN: [first, second], POST_HOC_SAE: saes}, windows, choosing, seed=1)
    assert usual["changes"] == {}
    assert usual["figures"]["P3"] == plain(alignment.figures)
    assert set(usual["figures"]) == {"P1", "P3"}
    measured = [[perplexity(model, rows) for model in (first, second)] for rows in held_out.values()]
    assert list(usual["perplexity"].values()) == [pytest.approx(each, abs=1e-3) for each in measured]

    assert shared["changes"] == {"shared": "first dictionary"}
    # a shared dictionary makes SAEs of two seeds similar, and MFN models, too
    for subject in (MFN, POST_HOC_SAE):
        records = (usual, shared, shared_learnt)
        alike = [of["figures"]["P3"][subject]["matched cosine"]["value"] for of in records]
        assert alike[0] < 0.6 < min(alike[1:])
    kept = [json.loads(file.read_text()) for file in (tmp_path / "predictions/tiny").glob("sae-*/config.json")]
    assert sorted(each["num_features"] for each in kept) == [32] * 2 + [64] * 8
    assert set(halved["figures"]["P3"]) == {MFN, POST_HOC_SAE}

    assert set(on_source["figures"]) == {"P5"}
    base = AutoModelForCausalLM.from_pretrained(study.base, dtype=torch.float32)
    learnt = models.mfn(0, "dictionary", "P5-frozen-backbone", remedies.OF_STREAM["P5"]["frozen-backbone"])
    rows = torch.tensor(held_out["code"]["input_ids"])
    learnt.set_blend(0.0)
    assert torch.equal(learnt(rows).logits, base(rows).logits)  # hence the base is its reference
    loss = frozen["figures"]["P5"][MFN]
    assert loss["reference_perplexity_targets"] != on_source["figures"]["P5"][MFN]["reference_perplexity_targets"]

    measured_again = []
    monkeypatch.setattr(remedies, "measure", lambda evidence: measured_again.append(evidence) or {})
    run(only=["all/*"])
    assert not measured_again
    first.mfn_layers[1].encoder.bias.data.add_(1)
    first.save_pretrained(models.folder / "plain-all-seed-0")
    run(only=["all/*"])
    assert len(measured_again) == 1


def test_a_whitened_reconstruction_weighs_all_directions_alike(study, data, tmp_path):
    """Compares the ratio of the losses with and without whitening with that of errors multiplied out in float64."""
    rows = study.rows(None, 0)
    model = recipes.train_alone(
        study.base, lambda seed: rows, 0, size={"layers": [1], "num_features": 64, "k": 4, "codes": "update"},
        recipe=recipes.Recipe(whitened=True),
    )  # fmt: skip
    tokens = torch.tensor(rows[: recipes.WHITENING_ROWS]["input_ids"])
    item = model(tokens, output_reconstructions=True).reconstructions[1]
    u, u_hat = (part.detach().double().flatten(0, 1).numpy() for part in (item.residual, item.reconstructed))
    x = (u - u.mean(-1, keepdims=True)) / (u.std(-1, ddof=1, keepdims=True) + 1e-5)
    moments = x.T @ x / len(x)
    root = np.linalg.inv(np.real(sqrtm(moments + 0.01 * np.trace(moments) / len(moments) * np.eye(len(moments)))))
    shares = []
    for whitening in (root, np.eye(len(moments))):
        target, made = u @ whitening, u_hat @ whitening
        centred = target - target.mean(-1, keepdims=True)
        shares.append((np.square(target - made).sum(-1) / np.square(centred).sum(-1)).mean())
    settings = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "per_device_eval_batch_size": len(tokens)}
    arguments = recipes.MFNTrainingArguments(str(tmp_path / "evaluation"), **settings)
    found = [
        trainer(model, arguments, eval_dataset=rows.select(range(len(tokens)))).evaluate()["eval_recon_loss"]
        for trainer in (recipes.whitening_trainer(model, rows), recipes.MFNTrainer)
    ]
    assert shares[0] / shares[1] != pytest.approx(1, abs=0.05)
    assert found[0] / found[1] == pytest.approx(shares[0] / shares[1], rel=1e-3)


@pytest.mark.slow
def test_features_that_learn_from_other_domains_do_so_without_labels(study, data, tmp_path):
    """Compares text and weights of the remedies `other-text` and `realigned` with what they are made from."""
    models, found = predictions.StudyModels(study), {}
    for name in ("as-it-is", "other-text", "realigned"):
        found[name] = remedies.remedy_transfers(models, f"P5/{name}", seeds=1)
    recipe = remedies.OF_UPDATE["P5"]["other-text"]
    own, given = models.rows(predictions.SOURCE, 0), models.text(predictions.SOURCE, replace(recipe, other_text=0.5))(0)
    before, after, labels = np.array(own["input_ids"]), np.array(given["input_ids"]), np.array(given["labels"])
    replaced = (labels == -100).all(1)
    assert replaced.mean() == pytest.approx(0.5, abs=0.2)
    assert np.array_equal(after[~replaced], before[~replaced])
    assert np.array_equal(labels[~replaced], before[~replaced])
    elsewhere = {tuple(row) for d in corpora.DOMAINS if d != predictions.SOURCE for row in data.train[d].tolist()}
    assert {tuple(row) for row in after[replaced].tolist()} <= elsewhere
    # the SAE reads the same windows, and the dense reference has the same labels
    (of_mfn,), (of_sae,) = found["other-text"][MFN], found["other-text"][POST_HOC_SAE]
    rows = torch.tensor(data.evaluation("code", 4 * WINDOW)["input_ids"])
    assert torch.equal(of_sae.model(rows).logits, of_mfn.reference(rows).logits)
    assert not torch.equal(of_mfn.reference(rows).logits, found["as-it-is"][MFN][0].reference(rows).logits)

    (plain_one,), (again,) = found["as-it-is"][MFN], found["realigned"][MFN]
    assert set(again.tuned) == set(corpora.DOMAINS) - {predictions.SOURCE}
    weights = plain_one.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in again.model.state_dict().items())
    for tuned in again.tuned.values():
        changed = {name for name, value in tuned.state_dict().items() if not torch.equal(weights[name], value)}
        assert changed
        assert all(".mfn." in name for name in changed)  # the backbone is as it was


@pytest.mark.usefixtures("here")
@pytest.mark.slow
def test_what_a_setting_does_is_held_against_the_studys_own_seed_by_seed(study, data, tmp_path, monkeypatch):
    """Compares the summary with probes and perplexities of each model, computed here."""
    random = np.random.default_rng(0)
    places = np.sort(random.choice(3 * 4 * WINDOW, 100, replace=False))
    labels = random.random(100) < 0.5
    task = Task("any", "concepts", places, labels, random.permutation(labels), np.arange(100), np.arange(100) % 2 == 0)
    runs = {"k": {"k-2": recipes.Recipe(size={"k": 2})}, "alpha": {"alpha-0.5": recipes.Recipe({"alpha_end": 0.5})}}
    monkeypatch.setattr(sensitivity, "word_tasks", lambda *args, **kwargs: [task])
    monkeypatch.setattr(sensitivity, "RUNS", runs)
    monkeypatch.setattr(sensitivity, "RESULTS", tmp_path / "sensitivity")
    for cached in (sensitivity.models_of, sensitivity.texts_of):
        cached.cache_clear()
    sensitivity.main(seeds=2)

    models = predictions.StudyModels(study)
    windows = concatenate_datasets([study.data.evaluation(d, 4 * WINDOW) for d in corpora.DOMAINS])
    choosing = study.data.sample(study.held_out_tokens, after=study.skip + study.seeds * study.tokens)
    found = json.loads((tmp_path / "sensitivity" / "summary.json").read_text())
    assert {name: of["alpha"] for name, of in found.items()} == {"k-2": 1.0, "alpha-0.5": 0.5}
    usual = [models.mfn(0), models.mfn(1)]
    for name, recipe in (run for of in runs.values() for run in of.items()):
        own = [models.mfn(seed, kind=f"sensitivity-{name}", recipe=recipe) for seed in (0, 1)]
        assert {model.config.k for model in own} == {2 if name == "k-2" else 4}
        purity, losses = [], []
        for model, other in zip(own, usual, strict=True):
            tables = [probe_model(each, windows, [task], residuals=False) for each in (model, other)]
            pure = [table[table["probe"] == "purity"]["held_out"].mean() for table in tables]
            purity.append(pure[0] - pure[1])
            per_domain = [study.data.evaluation(d, 4 * WINDOW) for d in corpora.DOMAINS]
            losses.append(100 * np.mean([perplexity(model, rows) / perplexity(other, rows) - 1 for rows in per_domain]))
        for figure, values in {"purity": purity, "perplexity, %": losses}.items():
            assert found[name][figure] == pytest.approx(
                {"value": np.mean(values), "low": min(values), "high": max(values)}, abs=1e-4
            )
        assert max(np.abs(losses)) > 1e-3
        alike = [cross_seed_alignment({MFN: of}, windows, choosing).figures[MFN] for of in (own, usual)]
        expected = alike[0]["matched correlation"].value - alike[1]["matched correlation"].value
        assert found[name][sensitivity.ALIGNMENT]["value"] == pytest.approx(expected)

    monkeypatch.setattr(sensitivity, "measure", lambda *args: pytest.fail("this was there"))
    sensitivity.main(seeds=2)


def wait_or_fail(family, told):
    """Fails at once for gpt2. Runs for llama until the file `told` exists."""
    if family == "gpt2":
        raise ValueError("a reason")
    limit = time.monotonic() + 600
    while not told.exists():
        if time.monotonic() > limit:
            raise TimeoutError("nobody was told meanwhile")
        time.sleep(0.05)


@pytest.mark.slow
def test_a_familys_failure_is_told_while_the_other_goes_on(tmp_path):
    found = predictions.failures(partial(wait_or_fail, told=tmp_path / "told"), ["llama", "gpt2"], processes=2)
    family, error = next(found)
    assert (family, str(error)) == ("gpt2", "a reason")
    (tmp_path / "told").touch()
    assert list(found) == []


def test_processes_that_tokenise_at_once_make_one_file(tmp_path, monkeypatch):
    monkeypatch.setenv("MFN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(corpora, "texts", lambda domain: ([domain], [domain]))
    monkeypatch.setattr(
        corpora, "windows", lambda of, tokenizer, length: np.full((2, length), corpora.DOMAINS.index(of[0]))
    )
    make_tokenizer().save_pretrained(tmp_path)
    savez, process, of_other = np.savez, 7, []

    def saved_while_another_makes_it_all(made, **arrays):
        nonlocal process
        savez(made, **arrays)
        if process == 7:
            process = 8
            of_other.append(small_models.tokenised(AutoTokenizer.from_pretrained(tmp_path), WINDOW))
            process = 7

    monkeypatch.setattr(np, "savez", saved_while_another_makes_it_all)
    monkeypatch.setattr(small_models.os, "getpid", lambda: process)
    made = small_models.tokenised(make_tokenizer(), WINDOW)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert (
        [rows.max() for rows in made.train.values()] == [rows.min() for rows in of_other[0].train.values()] == [0, 1, 2]
    )


class Start(Exception):
    """Ends a training where the MFN layers would start to learn."""


@pytest.mark.parametrize("shared", ["nothing", "first dictionary", "learnt dictionary"])
def test_what_models_of_two_seeds_share(study, data, monkeypatch, shared):
    found = []

    def alone(model, rows, epochs, seed, callbacks, trainer):
        found.append((model.mfn_layers[1].decoder.weight.detach().clone(), rows["input_ids"], epochs, seed))
        raise Start

    monkeypatch.setattr(recipes.fidelity, "learn_from_cache", alone)
    for seed in (0, 1):
        with pytest.raises(Start):
            predictions.StudyModels(study).mfn(seed, recipe=recipes.Recipe(shared=shared, epochs=3))
    (weights, rows, epochs, own), (others, other_rows, _, other) = found
    assert (own, epochs) == (0, 3)
    assert torch.equal(weights, others) == (shared != "nothing")
    assert (rows == other_rows, other) == ((True, 0) if shared == "learnt dictionary" else (False, 1))


def test_random_tokens_take_a_share_of_the_places():
    rows = corpora.as_data_set(np.full((50, 200), 7))
    assert recipes.with_random_tokens(rows, 0.0, 100, 0) is rows
    tokens = np.array(recipes.with_random_tokens(rows, 0.3, 100, 0)["input_ids"])
    # 1 % of the random tokens are 7
    assert (tokens != 7).mean() == pytest.approx(0.3 * 0.99, abs=0.02)
    assert np.bincount(tokens[tokens != 7], minlength=100).max() < 70


def test_windows_of_random_tokens_are_for_features_alone(study, data, monkeypatch):
    rows = corpora.as_data_set(np.random.default_rng(0).integers(3, 60, (300, WINDOW)))
    assert recipes.with_random_windows(rows, 0.0, 0.3, 60, 0) is rows
    found = recipes.with_random_windows(rows, 1 / 3, 0.3, 60, 0)
    before, after, labels = np.array(rows["input_ids"]), np.array(found["input_ids"]), np.array(found["labels"])
    for_features = (labels == -100).all(1)
    assert for_features.mean() == pytest.approx(1 / 3, abs=0.1)
    assert np.array_equal(after[~for_features], before[~for_features])
    assert np.array_equal(labels[~for_features], before[~for_features])
    assert (after != before)[for_features].mean() == pytest.approx(0.3, abs=0.05)

    models = predictions.StudyModels(study)
    alone = [recipes.Recipe(unfamiliar=0.3, unfamiliar_windows=share) for share in (0.0, 1 / 3)]
    before_joint = {json.dumps(models.alone_made_from(0, predictions.SOURCE, recipe)) for recipe in alone}
    assert len(before_joint) == 1
    first, second = (models.mfn(0, predictions.SOURCE, f"share-{number}", of) for number, of in enumerate(alone))
    weights = [model.mfn_layers[1].encoder.weight for model in (first, second)]
    assert weights[1].isfinite().all()
    assert not torch.equal(*weights)

    # the dense reference of an MFN model learns the same next tokens
    seen, trainer = [], recipes.MFNTrainer
    monkeypatch.setattr(small_models, "train_dense", lambda model, rows, *args, **settings: seen.append(rows))
    monkeypatch.setattr(
        recipes, "MFNTrainer", lambda *args, **rows: seen.append(rows["train_dataset"]) or trainer(*args, **rows)
    )
    models.mfn(1, predictions.SOURCE, "both", alone[1])
    models.dense(1, predictions.SOURCE, alone[1])
    _, of_mfn, of_dense = seen  # before them, MFN layers learn alone
    assert of_mfn.to_dict() == of_dense.to_dict()
    assert -100 in np.array(of_dense["labels"])


def test_what_features_learn_alone_with_makes_another_model(study, data):
    models = predictions.StudyModels(study)
    kinds = [recipes.Recipe(), recipes.Recipe(alone={"lambda_rate": 10.0}), recipes.Recipe(aligned=True)]
    before = [models.alone_made_from(0, None, recipe) for recipe in kinds]
    plain, even, aligned = (models.alone(0, None, *of).mfn_layers[1] for of in zip(kinds, before, strict=True))
    assert torch.equal(plain.decoder.weight, models.alone(0, None, kinds[0], before[0]).mfn_layers[1].decoder.weight)
    assert not torch.allclose(plain.decoder.weight, even.decoder.weight, atol=1e-4)
    together = models.mfn(0, kind="aligned", recipe=kinds[2]).mfn_layers[1]
    for layer, is_aligned in ((plain, False), (aligned, True), (together, True)):
        products = (layer.encoder.weight * layer.decoder.weight).sum(-1)
        assert torch.allclose(products, torch.ones_like(products), atol=1e-5) == is_aligned


def test_alpha_lies_beside_its_schedule_in_a_step_and_not_after_it(study, data, monkeypatch):
    seen, compute_loss = [], recipes.MFNTrainer.compute_loss

    def watched(self, model, *args, **kwargs):
        seen.append((self.args.alpha_schedule(self.state.max_steps).at(self.state.global_step), model.config.alpha))
        return compute_loss(self, model, *args, **kwargs)

    monkeypatch.setattr(recipes.fidelity, "learn_from_cache", lambda *args: None)
    monkeypatch.setattr(recipes.MFNTrainer, "compute_loss", watched)
    model = predictions.StudyModels(study).mfn(0, recipe=recipes.Recipe(alpha_noise=0.2))
    due, alphas = np.array(seen).T
    assert model.config.alpha == 1
    assert (due == 1).sum() > 6
    assert 0.02 < (1 - alphas[due == 1]).mean() < 0.25
    assert (np.abs(alphas - due) > 1e-6).mean() > 0.3
    assert alphas.min() >= 0
    assert alphas.max() <= 1
