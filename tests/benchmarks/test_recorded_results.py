"""Results in the repository have the settings of today's code, so that nothing is measured again."""

import json

import pytest

from benchmarks.common import records, small_models
from benchmarks.small import fidelity, predictions, recipes, remedies, sensitivity
from benchmarks.smollm2 import all_blocks, real_checkpoint, stages

OTHER_MACHINE = "-on-another-machine"
"""Ending of the names of repetitions. No command makes these results."""
OF_WEIGHTS = {"digests", "base_weights"}
"""Settings that depend on trained weights."""


@pytest.fixture
def study_settings(monkeypatch, tmp_path):
    """Family -> settings of the study, without a base model."""
    monkeypatch.setattr(small_models, "base_folder", lambda *_: tmp_path)
    return {
        (family, codes): predictions.small_study(family, 3, codes).settings()
        for family in small_models.FAMILIES
        for codes in remedies.REMEDIES
    }


def files(*parts):
    found = sorted(records.RESULTS.joinpath(*parts[:-1]).glob(parts[-1]))
    assert found
    return {file: records.read_record(file) for file in found}


def as_json(value):
    return json.loads(json.dumps(value))


def settings_of(record):
    settings = {"codes": "stream"} | record["settings"]  # older results do not name it
    return {name: value for name, value in settings.items() if name not in OF_WEIGHTS}


@pytest.mark.parametrize("codes", remedies.REMEDIES)
@pytest.mark.parametrize("family", small_models.FAMILIES)
def test_predictions_and_remedies_have_the_settings_of_the_study(family, codes, study_settings):
    settings, folder = study_settings[family, codes], predictions.study_name(family, codes)
    changes = {"all domains": recipes.STUDY.changes(), "one domain": recipes.ONE_DOMAIN.changes()}
    for file, record in files("predictions", folder, "*.json").items():
        assert settings_of(record) == as_json(settings | {"recipes": changes}), file
    remedied = (records.RESULTS / "predictions" / folder / "remedies").exists()
    for file, record in files("predictions", folder, "remedies", "*/*.json").items() if remedied else ():
        assert settings_of(record) == as_json(settings | {"seeds": 2, "seed": remedies.SEED}), file
        name = f"{file.parent.name}/{file.stem.removesuffix(OTHER_MACHINE)}"
        assert record["changes"] == as_json(remedies.REMEDIES[codes].changes(name)), file


def test_stages_of_all_blocks_have_names_of_today():
    folder = records.RESULTS / "all_blocks"
    assert {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.json")} <= set(all_blocks.STAGES)


def test_sensitivity_has_the_settings_of_the_study(study_settings):
    for file, record in files("sensitivity", "*.json").items():
        if file.stem != "summary":
            assert settings_of(record) == as_json(study_settings["llama", "stream"] | {"family": "llama"}), file
            assert record["changes"] == as_json(sensitivity.recipes()[file.stem].changes()), file
    assert as_json(sensitivity.summary()) == records.read_record(sensitivity.RESULTS / "summary.json")


def test_runs_of_fidelity_and_of_the_real_checkpoint_have_names_of_today(tmp_path):
    for file in files("fidelity", "*/*/*.json"):
        assert str(file.relative_to(fidelity.RESULTS).with_suffix("")) in fidelity.runs()
    study = stages.CheckpointStudy(tmp_path, tmp_path, tmp_path)
    folder = records.RESULTS / "real_checkpoint"
    for name in real_checkpoint.STAGES:
        assert records.read_record(folder / f"{name}.json")["settings"] == as_json(study.settings()), name
    assert {str(file.relative_to(folder).with_suffix("")) for file in folder.rglob("*.json")} == set(
        real_checkpoint.STAGES
    )
