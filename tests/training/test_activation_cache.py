"""Training on cached activations, compared with training through the whole model."""

import json
import resource

import numpy as np
import pytest
import torch
from conftest import make_base, make_mfn
from datasets import Dataset
from trainings import arguments, history, rows

from modeling_mfn import MFNTrainer
from modeling_mfn.training.activation_cache import ActivationCache, CachedResiduals

SETTINGS = {"lambda_util": 0.0, "alpha_end": 0.0, "trainable": "mfn", "lambda_rate": 0.01, "lambda_comp": 0.1}


def left_padded(data):
    """Moves the padding of windows to the left. Positions start at the first token of the text."""

    def turned(row):
        padding = [0] * row["attention_mask"].count(0)
        length = len(row["input_ids"]) - len(padding)
        ids, mask = padding + row["input_ids"][:length], padding + [1] * length
        return {"input_ids": ids, "attention_mask": mask, "position_ids": padding + list(range(length))}

    return data.map(turned)


PADDED = {"none": lambda: rows(20), "right": lambda: rows(20, padded=True)}
PADDED["left"] = lambda: left_padded(PADDED["right"]())


@pytest.mark.halved
@pytest.mark.parametrize(("padding", "codes"), [*((padding, "stream") for padding in PADDED), ("left", "update")])
@pytest.mark.parametrize("base", ["llama-tied", "gpt2-tied"])
def test_cached_training_is_training_through_the_model(base, padding, codes, tmp_path):
    data = PADDED[padding]()
    no_dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if base == "gpt2-tied" else {}
    settings = {"layers": [0, 2], "alpha": 0.4, "codes": codes}
    whole, cached = (make_mfn(make_base(base, **no_dropout), **settings) for _ in range(2))
    cache = ActivationCache.write(cached, data, tmp_path / "cache", batch_size=3, dtype="float32")
    assert cached.config.alpha == 0.4
    trainers = []
    for model, dataset in ((whole, data.remove_columns("labels")), (CachedResiduals(cached), cache)):
        trainer = MFNTrainer(model, arguments(tmp_path, max_steps=6, **SETTINGS), train_dataset=dataset)
        trainer.train()
        trainers.append(trainer)
    assert trainers[1].state.num_input_tokens_seen == trainers[0].state.num_input_tokens_seen
    for name in ("loss", "recon_loss", "rate_loss", "comp_loss", "explained_variance"):
        assert history(trainers[1], name) == pytest.approx(history(trainers[0], name), rel=1e-4)
    measured, expected = (trainer.evaluate(trainer.train_dataset) for trainer in trainers[::-1])
    for name in ("eval_loss", "eval_recon_loss", "eval_comp_loss", "eval_explained_variance"):
        assert measured[name] == pytest.approx(expected[name], rel=1e-4)
    for (name, ours), theirs in zip(cached.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)


def test_a_cache_on_disk_is_what_the_layers_read(tmp_path):
    model = make_mfn(make_base("llama-tied"), layers=[1], alpha=0.0)
    data = rows(5)
    ActivationCache.write(model, data, tmp_path / "cache")
    cache = ActivationCache(tmp_path / "cache")
    read = []
    hook = model.mfn_layers[1].register_forward_pre_hook(lambda module, args: read.append(args[0].detach()))
    model(torch.tensor(data["input_ids"]))
    hook.remove()
    torch.testing.assert_close(torch.stack([cache[row]["residuals"][0] for row in range(5)]), read[0].half())
    assert cache[3]["input_ids"].tolist() == data[3]["input_ids"]
    assert (tmp_path / "cache" / "layer_1.npy").stat().st_size == pytest.approx(5 * 12 * 32 * 2, abs=200)


@pytest.mark.parametrize("base", ["llama-tied", "gpt2-tied"])
def test_blocks_above_the_last_mfn_layer_rest_and_are_back_afterwards(base, tmp_path):
    model = make_mfn(make_base(base), layers=[0, 1])
    blocks = model.model.backbone.layers if base == "llama-tied" else model.model.backbone.h
    ran = [0, 0, 0]

    def count(place):
        return lambda *_: ran.__setitem__(place, ran[place] + 1)

    for place, block in enumerate(blocks):
        block.register_forward_hook(count(place))
    ActivationCache.write(model, rows(5), tmp_path / "cache", batch_size=5)
    assert ran == [1, 1, 0]
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1e6
    with pytest.raises(ValueError, match="too large"):
        ActivationCache.write(model, rows(5), tmp_path / "cache", batch_size=5, dtype="float16")
    model(torch.tensor(rows(5)["input_ids"]))
    assert (ran, model.config.alpha) == ([3, 3, 1], 1.0)


def test_bad_caches(tmp_path):
    with pytest.raises(ValueError, match=r"holds no cached activations: it has no activations.json"):
        ActivationCache(tmp_path)
    model = make_mfn(make_base("gpt2-tied"), layers=[1])
    with torch.no_grad():
        model.get_input_embeddings().weight *= 1e6
    with pytest.raises(ValueError, match='residuals of block 1 are too large for float16; use dtype="float32"'):
        ActivationCache.write(model, rows(2), tmp_path / "cache", dtype="float16")
    assert list((tmp_path / "cache").glob("*.json")) == []
    cache = ActivationCache.write(model, rows(2), tmp_path / "cache")
    assert cache[1]["residuals"].dtype == torch.float32
    description = json.loads((tmp_path / "cache" / "activations.json").read_text())
    assert (description["layers"], description["columns"]) == ([1], ["input_ids"])
    assert np.isfinite(cache[1]["residuals"].numpy()).all()


def test_a_file_of_another_cache_is_refused(tmp_path):
    """The other cache is of the same text in a model of the same shape. A cache of an earlier version does not say."""
    for name, seed in (("one", 11), ("other", 12)):
        base = make_base("llama-tied")
        with torch.no_grad():
            base.get_input_embeddings().weight.mul_(seed)
        ActivationCache.write(make_mfn(base, layers=[1]), rows(40), tmp_path / name)
    (tmp_path / "other" / "layer_1.npy").rename(tmp_path / "one" / "layer_1.npy")
    with pytest.raises(ValueError, match=r"layer_1\.npy cannot be read: it is not the file that activations\.json"):
        ActivationCache(tmp_path / "one")
    description = tmp_path / "one" / "activations.json"
    description.write_text('{"layers": [1], "columns": ["input_ids"]}')
    assert len(ActivationCache(tmp_path / "one")) == 40


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path):
    """A write into a map of a file without space would kill the process. A limit on sizes stands for the disk."""
    model = make_mfn(make_base("llama-tied"), layers=[0, 1])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"cache cannot take [\d,]+ bytes of residual streams: File too large"):
            ActivationCache.write(model, rows(20), tmp_path / "cache")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "cache").iterdir())
    cache = ActivationCache.write(model, rows(20), tmp_path / "cache")
    files = [path.stat() for path in (tmp_path / "cache").glob("layer_*.npy")]
    assert all(file.st_blocks * 512 >= file.st_size for file in files)  # none is sparse
    assert len(cache) == 20


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("columns", ["/etc/secret"]),
        ("columns", ["../secret"]),
        ("columns", 5),
        ("layers", ["1/../../secret"]),
        ("layers", None),
    ],
)
def test_a_cache_names_only_its_own_files(tmp_path, field, value):
    model = make_mfn(make_base("llama-tied"), layers=[1])
    ActivationCache.write(model, rows(2), tmp_path)
    description = tmp_path / "activations.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=rf"activations\.json is damaged: {field}"):
        ActivationCache(tmp_path)


def test_windows_that_a_cache_cannot_hold(tmp_path):
    model = make_mfn(make_base("llama-tied"), layers=[1])
    uneven = Dataset.from_dict({"input_ids": [[3, 4, 5], [3, 4]]})
    with pytest.raises(ValueError, match="a window has 2 tokens and the first one 3; windows of a cache must all"):
        ActivationCache.write(model, uneven, tmp_path)
    with pytest.raises(ValueError, match="windows is of type IterableDataset, whose length is not known"):
        ActivationCache.write(model, rows(4).to_iterable_dataset(), tmp_path)


def test_what_stands_at_padding_is_not_kept(tmp_path):
    """Activations too large for float16 are allowed at padding. The cache holds zeros there."""
    model, data = make_mfn(make_base("llama-tied"), layers=[1], alpha=0.0), PADDED["left"]()
    with torch.no_grad():
        model.get_input_embeddings().weight[0] *= 1e7
    cache = ActivationCache.write(model, data, tmp_path, dtype="float16")
    row = cache[1]
    assert row["attention_mask"].tolist() == [0] * 3 + [1] * 9
    assert not row["residuals"][:, :3].any()
    assert row["residuals"][:, 3:].any(-1).all()


@pytest.mark.parametrize(
    "settings", [{"alpha_start": 0.5}, {"alpha_end": 1.0}, {"lambda_util": 1.0}, {"stability_pass": "model"}]
)
def test_what_a_training_on_cached_residuals_cannot_do(tmp_path, settings):
    cached = CachedResiduals(make_mfn(make_base("llama-tied"), alpha=0.0))
    (name, value), *_ = settings.items()
    with pytest.raises(ValueError, match=f"{name} is {value!r}; on cached residual streams it must be"):
        MFNTrainer(cached, arguments(tmp_path, **(SETTINGS | settings)), train_dataset=rows(4))


class Rows:
    """Windows that record the largest batch read at once and refuse to return a whole column."""

    def __init__(self, data):
        self.data, self.most = data, 0

    def __len__(self):
        return len(self.data)

    def __getitem__(self, key):
        assert not isinstance(key, str), "a whole column"
        rows = self.data[key]
        self.most = max(self.most, len(rows["input_ids"]) if isinstance(key, slice) else 1)
        return rows


def test_a_writing_that_breaks_off_leaves_the_model_as_it_was_and_no_cache(tmp_path, monkeypatch):
    model = make_mfn(make_base("llama-tied"), alpha=0.4).train()
    windows = Rows(rows(7))
    ActivationCache.write(model, windows, tmp_path, batch_size=2)
    assert windows.most == 2
    forward, calls = model.model.forward, []

    def fails(*args, **kwargs):
        calls.append(model.config.alpha)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.model, "forward", fails)
    with pytest.raises(KeyboardInterrupt):
        ActivationCache.write(model, rows(7, seed=1), tmp_path, batch_size=2)
    assert calls == [0, 0, 0]
    assert model.config.alpha == 0.4
    assert model.training
    with pytest.raises(ValueError, match="holds no cached activations"):
        ActivationCache(tmp_path)
