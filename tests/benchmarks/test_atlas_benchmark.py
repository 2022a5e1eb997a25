"""`benchmarks/speed/atlas.py` on the planted model."""

import planted
import pytest

from benchmarks.speed import atlas as atlas_benchmark
from modeling_mfn import FeatureAtlas


def test_memory_is_read_at_each_goal_and_the_atlas_is_the_usual_one(tmp_path):
    model, tokenizer, rows = planted.model().eval(), planted.tokenizer(), planted.text(24)
    length = len(rows[0]["input_ids"])
    goals = [5 * length, 20 * length - 1]
    record = atlas_benchmark.whole_atlas(model, tokenizer, rows, 4, goals, tmp_path)
    made, usual = FeatureAtlas.from_pretrained(tmp_path), FeatureAtlas.build(model, tokenizer, rows, progress=False)
    assert made.to_pandas().equals(usual.to_pandas())
    assert record["tokens"] == usual.metadata["data"]["tokens"]
    names = [
        "before",
        *(f"after {goal} tokens" for goal in goals),
        f"after all {24 * length} tokens",
        "when it is made",
    ]
    assert list(record["resident_mb"]) == names
    assert [file.name for file in tmp_path.iterdir()] == ["features"]


def test_speeds_are_ratios_of_rounds(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(atlas_benchmark.time, "perf_counter", lambda: next(clock))
    found = atlas_benchmark.speed(planted.model().eval(), planted.text(24), batch_size=2, rounds=3)
    assert (found["tokens"], found["rounds"]) == (24 * len(planted.text(1)[0]["input_ids"]), 3)
    assert found["harvest_speed_of_forward_without_head"]["clock"] == pytest.approx(1.0)
    assert set(found["tokens_per_second"]) == {"forward without head", "forward with head", "harvest"}
