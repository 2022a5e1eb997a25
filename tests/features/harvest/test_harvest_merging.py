"""A harvest in several processes, or interrupted and resumed, equals a single pass bit for bit."""

import json
import signal
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from atlas_data import windows, word_tokenizer
from conftest import make_base, make_mfn
from fresh_process import Forked, ranks
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import Whitespace

from modeling_mfn import FeatureAtlas
from modeling_mfn.data.text import TextWindows
from modeling_mfn.features.atlas import ExampleLimits
from modeling_mfn.features.harvest.firings import TokenBatch
from modeling_mfn.features.harvest.state import HarvestState

WORKER = Path(__file__).parents[2] / "atlas_worker.py"
FEATURES, K, T, B = 12, 4, 6, 2
LIMITS = ExampleLimits(top=2, stratum=1, before=2, after=1)


def batches(count, seed):
    """Yields random codes on random windows. Many activations are equal, and some tokens have few active features."""
    generator = np.random.default_rng(seed)
    for number in range(count):
        indices = generator.permuted(np.tile(np.arange(FEATURES), (B * T, 1)), axis=1)[:, :K]
        values = generator.choice([0, 0.001, 0.3, 0.3, 1, 1.5, 7, 1e6], (B * T, K)).astype(np.float32)
        ids = generator.integers(0, 50, (B, T)).astype(np.int32)
        attended = generator.random((B, T)) < 0.9
        names = [["a", None, "b", "c"][generator.integers(4)] for _ in range(B)]
        yield number * B, ids, attended, names, indices, values, generator.random(B * T).astype(np.float32)


def gather(parts):
    state = HarvestState([3], FEATURES, LIMITS, T)
    for first, ids, attended, names, indices, values, scales in parts:
        batch = TokenBatch(first, ids, attended, attended, state.source_places(names))
        state.add(batch, {3: (indices, values)}, {3: scales})
    return state


def content(state):
    state.sort_sources()
    return state.sources, state.windows, state.layers[3].arrays()


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.lists(st.integers(0, 3), min_size=1, max_size=12), st.permutations(range(4)))
def test_merging_is_exact_in_any_order(seed, shard_of, order):
    """Batches go to four shards at random. Shards merge in any order, one by one and in pairs."""
    parts = list(batches(len(shard_of), seed))
    sources, number, expected = content(gather(parts))

    def shard(which):
        return gather(part for part, at in zip(parts, shard_of, strict=True) if at == which)

    chained, left, right = shard(order[0]), shard(order[0]), shard(order[2])
    for which in order[1:]:
        chained.merge(shard(which))
    left.merge(shard(order[1]))
    right.merge(shard(order[3]))
    left.merge(right)
    again = HarvestState([3], FEATURES, LIMITS, T)
    again.restore(chained.to_bytes({}))
    for state in (chained, left, again):
        found = content(state)
        assert found[:2] == (sources, number)
        for name, array in expected.items():
            assert np.array_equal(found[2][name], array), name


def run(folder, processes=1, streamed=True, die_at=None, resume=False):
    """Runs a harvest that keeps its state and its atlas in `folder`; returns its exit code."""
    folder.mkdir(exist_ok=True)
    chosen = {"streamed": streamed, "die_at": die_at, "resume": resume}
    chosen |= {"state": str(folder / "state"), "output": str(folder / "out")}
    (folder / "settings.json").write_text(json.dumps(chosen))
    started = [
        Forked(WORKER, folder, folder / "settings.json", output=folder / f"output-{rank}", environment=group)
        for rank, group in enumerate(ranks(processes) if processes > 1 else [{}])
    ]
    if die_at is not None:
        return started[0].wait()
    for process in started:
        process.finish()
    return 0


def assert_same(folder, other):
    one, two = (FeatureAtlas.from_pretrained(at / "out") for at in (folder, other))
    assert one.metadata == two.metadata
    assert one.features.equals(two.features)
    assert one.examples.equals(two.examples)
    assert len(one.examples) > 400


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Folder with the atlas of one process that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, streamed=False)
    assert not (folder / "state").exists()
    return folder


def test_a_killed_harvest_goes_on_where_it_was(tmp_path, whole):
    assert run(tmp_path, die_at=21) == -signal.SIGKILL
    assert [file.name for file in (tmp_path / "state").iterdir()] == ["harvest-00000-of-00001.safetensors"]
    assert not (tmp_path / "out").exists()
    run(tmp_path, resume=True)
    assert_same(tmp_path, whole)
    assert not (tmp_path / "state").exists()


def test_two_processes_have_the_atlas_of_one(tmp_path, whole):
    run(tmp_path, processes=2)
    assert_same(tmp_path, whole)
    counted = [json.loads((tmp_path / f"batches-{rank}.json").read_text()) for rank in range(2)]
    assert counted == [[0, 2, 4, 6], [1, 3, 5, 7]]


def test_a_state_belongs_to_its_harvest(tmp_path):
    """A state is refused for another model, other settings or other text, and is never overwritten unasked."""
    model, data = make_mfn(make_base("gpt2-tied"), layers=[1]), windows(12)

    class Interrupted(Exception):
        pass

    class Windows:
        def __iter__(self):
            yield from data.select(range(8))
            raise Interrupted

    def build(rows, model=model, **options):
        options = {"batch_size": 4, "save_every": 4, "progress": False, "state_folder": tmp_path / "state"} | options
        return FeatureAtlas.build(model, word_tokenizer(), rows, **options)

    with pytest.raises(Interrupted):
        build(Windows())
    with pytest.raises(ValueError, match="holds an interrupted harvest; resume it"):
        build(data)
    ids = np.array(data["input_ids"])
    ids[3, 7] += 1
    one_token_changed = data.remove_columns("input_ids").add_column("input_ids", ids.tolist())
    other = make_mfn(make_base("gpt2-tied"), layers=[1], seed=5)
    for change, message in [
        ({"batch_size": 2}, "had batch_size 4, this one has 2"),
        ({"skip_tokens": ()}, r"had skip_tokens \[0, 2\], this one has \[\]"),
        ({"model": other}, "had model"),
        ({"rows": one_token_changed}, "was of other text"),
        ({"rows": data.remove_columns("source")}, "was of other text"),
        ({"rows": data.select(range(4))}, "was of other text"),
    ]:
        with pytest.raises(ValueError, match=message):
            build(**({"rows": data, "resume": True} | change))
    file = tmp_path / "state" / "harvest-00000-of-00001.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:1000])
    with pytest.raises(ValueError, match="cannot be read"):
        build(data, resume=True)
    header = 8 + int.from_bytes(good[:8], "little")
    for place in range(header, len(good), len(good) // 50):  # a state that can be read, with other numbers in it
        file.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        with pytest.raises(ValueError, match=rf"{file.name} cannot be read: its numbers are not those that were saved"):
            build(data, resume=True)
    file.write_bytes(good)
    of_two = file.rename(file.with_name("harvest-00000-of-00002.safetensors"))
    for resume, message in ((True, "had 2 processes, this one has 1"), (False, "interrupted harvest")):
        with pytest.raises(ValueError, match=message):
            build(data, resume=resume)
    of_two.rename(file)
    assert build(data, resume=True).features.equals(build(data, state_folder=None).features)


def test_a_state_belongs_to_its_texts(tmp_path):
    """A state is refused for other texts, even where the interrupted harvest had not read them yet."""
    model, tokenizer = make_mfn(make_base("llama-tied"), layers=[0]), word_tokenizer()
    tokenizer.backend_tokenizer.pre_tokenizer = Whitespace()
    for name, length in (("a.txt", 400), ("b.txt", 300), ("c.txt", 200)):
        (tmp_path / name).write_text(" ".join(f"w{3 + (7 * at + at * at) % 90}" for at in range(length)))

    class Interrupted(Exception):
        pass

    class Broken(TextWindows):
        def __iter__(self):
            yield from islice(super().__iter__(), 8)
            raise Interrupted

    def build(kind, names="ab", tokens=512, **options):
        rows = kind([tmp_path / f"{name}.txt" for name in names], tokenizer, 16, tokens)
        options = {"batch_size": 4, "save_every": 4, "progress": False} | options
        return FeatureAtlas.build(model, tokenizer, rows, **options)

    state = {"state_folder": tmp_path / "state"}
    with pytest.raises(Interrupted):
        build(Broken, **state)
    for change, message in (
        ({"tokens": 520}, "had tokens of all texts 512, this one has 520"),
        ({"names": "a"}, r"had texts \[\['a.txt', \d+\], \['b.txt', \d+\]\], this one has \[\['a.txt', \d+\]\]"),
        ({"names": "ac"}, "had texts"),
    ):
        with pytest.raises(ValueError, match=message):
            build(TextWindows, resume=True, **change, **state)
    text = (tmp_path / "b.txt").read_text()
    (tmp_path / "b.txt").write_text(text + " w5")
    with pytest.raises(ValueError, match="had texts"):
        build(TextWindows, resume=True, **state)
    (tmp_path / "b.txt").write_text(text)
    resumed, whole = build(TextWindows, resume=True, **state), build(TextWindows)
    assert resumed.metadata == whole.metadata
    assert resumed.features.equals(whole.features)
