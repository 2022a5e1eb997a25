"""Damaged files of ours: every reader gives a result or one `ValueError` that names the file."""

import gzip
import json
import random
import time
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import make_base, make_mfn
from features_folder import write_features
from trainings import rows

from modeling_mfn import ActivationCache, FeatureAtlas
from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.report import load_further, load_result, save_further
from modeling_mfn.evaluation.result import PaperCriterion, PredictionResult
from modeling_mfn.features.atlas.label_files import MAX_BYTES, read_label_file
from modeling_mfn.features.atlas.records import ExampleLimits
from modeling_mfn.features.atlas.schema import EXAMPLES, FEATURES
from modeling_mfn.features.attribution.explanation import Explanation
from modeling_mfn.features.attribution.records import FeatureAttribution, InputAttribution, LayerAttribution, Target
from modeling_mfn.features.harvest.state import HarvestState
from modeling_mfn.features.labelling.concepts import read_concepts
from modeling_mfn.hub.atlas_summary import read_atlas
from modeling_mfn.hub.evaluation_file import add_perplexities, read_perplexities
from modeling_mfn.training.record import read_record
from modeling_mfn.training.statistics import STATE_FILE, FeatureStatistics

SETTINGS = {"seed": 0}
ODD = [None, True, -1, 2.5, 10**400, "x", "", [], [None], {}, {"x": 1}]


def result():
    estimate = Estimate(0.5, 0.25, 0.75)
    paper = PaperCriterion("c", True, "n", estimate, "b", Estimate(float("nan")))
    return PredictionResult("P1", "a", "b", "partly", "c", "n", {"MFN": {"n": estimate}}, "b", paper)


def explanation():
    inputs = InputAttribution([0.5, 0.25], 1.0, 0.25, 0.0)
    feature = FeatureAttribution(0, 3, [1], [2.0], [0.5], None, inputs)
    layer = LayerAttribution(0, 1, [0.5, 0.25], 0.25, 0.0, [feature])
    return Explanation(Target(3, "x", 1.0, 0.5, None, None, None, 1.0), ["a", "b"], [1, 2], 1.0, "gradient", [layer])


def state():
    return HarvestState([0, 1], 4, ExampleLimits(), 8)


def statistics():
    return FeatureStatistics(model().config, 100)


@cache
def model():
    return make_mfn(make_base("llama-tied"), layers=[1], alpha=0.0)


def make_result(folder):
    (folder / "P1.json").write_text(json.dumps({"settings": SETTINGS, **result().to_json()}))
    save_further({"t": {"MFN": {"n": Estimate(0.5)}}}, SETTINGS, folder)


def make_explanation(folder):
    (folder / "explanation.json").write_text(explanation().to_json())


def make_cache(folder):
    ActivationCache.write(model(), rows(2), folder)


def make_labels(folder):
    row = {"feature": "L0/1", "label": "x", "score": 0.5}
    (folder / "l.json").write_text(json.dumps([row]))
    (folder / "l.jsonl").write_text(json.dumps(row))
    (folder / "l.csv").write_text("feature,label\nL0/1,x\n")
    (folder / "l.csv.gz").write_bytes(gzip.compress(b"feature,label\nL0/1,x\n"))


def make_rest(folder):
    add_perplexities(folder, [{"data": "x", "tokens": 5, "base": 2.0, "alpha_1": 3.0}])
    (folder / "training_record.json").write_text(json.dumps({"versions": {"torch": "2"}, "tokens": 3, "figures": {}}))
    (folder / "concepts.json").write_text(json.dumps({"animals": ["dog", ["mouse", "mice"]]}))


def read_whole_atlas(folder):
    atlas = FeatureAtlas.from_pretrained(folder)
    return atlas["L0/1"], atlas.to_pandas("examples"), atlas.search("king"), repr(atlas)


def make_features(folder):
    write_features(folder, [{"feature": "L0/1", "label": "x", "source": "human", "score": 1.0}])


# file -> how it is made, and how it is read
READERS = {
    "P1.json": (make_result, lambda folder: load_result("P1", SETTINGS, folder)),
    "further.json": (make_result, lambda folder: load_further(SETTINGS, folder)),
    "explanation.json": (make_explanation, lambda folder: Explanation.load(folder).to_pandas()),
    "activations.json": (make_cache, lambda folder: ActivationCache(folder)[0]),
    "layer_1.npy": (make_cache, lambda folder: ActivationCache(folder)[0]),
    "evaluation.json": (make_rest, read_perplexities),
    "training_record.json": (make_rest, read_record),
    "concepts.json": (make_rest, lambda folder: read_concepts(folder / "concepts.json")),
    "state.safetensors": (
        lambda folder: state().save(folder / "state.safetensors", SETTINGS),
        lambda folder: state().load(folder / "state.safetensors", SETTINGS),
    ),
    STATE_FILE: (lambda folder: statistics().save(folder), lambda folder: statistics().load(folder)),
    "features/atlas.json": (make_features, read_whole_atlas),
    "features/labels.json": (make_features, read_whole_atlas),
    "features/features.parquet": (make_features, read_atlas),
    "features/examples.parquet": (make_features, read_whole_atlas),
} | {
    name: (make_labels, lambda folder, name=name: read_label_file(folder / name))
    for name in ("l.json", "l.jsonl", "l.csv", "l.csv.gz")
}


def spoiled_json(content):
    """Yields the content with each value in turn left out, or replaced."""
    if isinstance(content, dict | list):
        for key in list(content) if isinstance(content, dict) else range(len(content)):
            for value in ODD:
                yield type(content)(content) if value is content[key] else _with(content, key, value)
            yield {name: each for name, each in content.items() if name != key} if isinstance(content, dict) else []
            yield from (_with(content, key, inner) for inner in spoiled_json(content[key]))


def _with(content, key, value):
    copied = content.copy()
    copied[key] = value
    return copied


def spoiled(data, name):
    """Yields damaged contents of a file."""
    generator = random.Random(0)
    yield b""
    yield b"\xff\xfe\x00"
    yield b"[" * 100_000
    yield b'{"a":' * 100_000
    if name.endswith(".json"):
        contents = [*ODD, *spoiled_json(json.loads(data))]
        yield from (json.dumps(content).encode() for content in generator.sample(contents, min(len(contents), 150)))
    for _ in range(25):
        cut = generator.randrange(len(data))
        yield data[:cut]
        yield data[:cut] + bytes(generator.randrange(256) for _ in range(4)) + data[cut + 4 :]
        yield data[:cut] + data[cut + 1 + generator.randrange(8) :]


@pytest.mark.parametrize("name", READERS)
def test_every_reader_names_the_damaged_file(name, tmp_path):
    make, read = READERS[name]
    make(tmp_path)
    file = tmp_path / name
    data = file.read_bytes()
    assert read(tmp_path) is not False  # whole
    refused = 0
    for content in spoiled(data, name):
        file.write_bytes(content)
        try:
            read(tmp_path)
        except ValueError as error:
            refused += 1
            message = str(error)
            assert str(file) in message or str(file.parent) in message, content[:200]
    assert refused > 10


def test_statistics_of_another_model_are_refused(tmp_path):
    statistics().save(tmp_path)
    other = FeatureStatistics(make_mfn(make_base("llama-tied"), layers=[0, 1]).config, 100)
    with pytest.raises(ValueError, match=rf"{STATE_FILE} cannot be read: rates has the shape \(1, 80\)"):
        other.load(tmp_path)


def test_small_files_of_huge_content_are_refused_quickly(tmp_path):
    begin = time.process_time()
    bomb = tmp_path / "labels.csv.gz"
    with gzip.open(bomb, "wb", compresslevel=1) as opened:
        for _ in range(9):
            opened.write(b"L0/1,x\n" * (MAX_BYTES // 56))
    with pytest.raises(ValueError, match=r"labels.csv.gz cannot be read: it has more than 67,108,864 bytes of text"):
        read_label_file(bomb)
    make_features(tmp_path)
    for file, schema in (("features.parquet", FEATURES), ("examples.parquet", EXAMPLES)):
        columns = {field.name: pa.nulls(1_000_000, field.type) for field in schema}
        columns |= {name: pa.array(np.zeros(1_000_000, np.int32)) for name in ("layer", "index")}
        pq.write_table(pa.table(columns, schema), tmp_path / "features" / file, compression="zstd")
        for read in (read_whole_atlas, read_atlas) if schema is FEATURES else (read_whole_atlas,):
            with pytest.raises(ValueError, match=rf"{file} cannot be read: it has 1000000 rows|1000000 rows and"):
                read(tmp_path)
        make_features(tmp_path)
    assert time.process_time() - begin < 10
