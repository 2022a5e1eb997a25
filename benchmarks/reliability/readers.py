"""Everything in the package that reads a file or a value that a user brings, with a valid example of it."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from safetensors import SafetensorError
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from benchmarks.reliability.mutations import damage_value, odd_value
from modeling_mfn import (
    ActivationCache,
    Add,
    Clamp,
    FeatureAtlas,
    MFNConfig,
    MFNForCausalLM,
    MFNTrainingArguments,
    Scale,
    explain,
    export_saes,
    find_saes,
    load_text,
    pack,
)
from modeling_mfn.evaluation import report
from modeling_mfn.evaluation.intervals import Estimate
from modeling_mfn.evaluation.result import PaperCriterion, PredictionResult
from modeling_mfn.features.atlas.label_files import read_label_file
from modeling_mfn.features.atlas.records import ExampleLimits
from modeling_mfn.features.attribution.explanation import Explanation
from modeling_mfn.features.harvest.state import HarvestState
from modeling_mfn.features.labelling.concepts import read_concepts
from modeling_mfn.hub.atlas_summary import read_atlas
from modeling_mfn.hub.evaluation_file import add_perplexities, read_perplexities
from modeling_mfn.hub.push import check_model
from modeling_mfn.interop.sources import open_sae
from modeling_mfn.training.record import find_complete_checkpoint, read_record
from modeling_mfn.training.statistics import FeatureStatistics

REFUSED = (ValueError, OSError)
"""Errors that refuse an input. Every other error escapes."""
OF_WEIGHTS = (*REFUSED, RuntimeError, SafetensorError)
"""Errors of transformers' own loading, which the same damage to any model raises."""
VOCABULARY, WINDOW = 64, 8


class FileReader(NamedTuple):
    """A reader of files."""

    make: Callable[[Path], None]
    """Writes a valid example into an empty folder."""
    read: Callable[[Path], Any]
    """Reads the folder."""
    refusals: tuple[type[Exception], ...] = REFUSED


class ValueReader(NamedTuple):
    """A reader of values."""

    read: Callable[[random.Random], Any]
    """Makes a value and gives it to the package."""
    refusals: tuple[type[Exception], ...] = REFUSED


def tokenizer() -> PreTrainedTokenizerFast:
    """Tokenizer of the words w0, w1, ..."""
    words = {f"w{number}": number for number in range(VOCABULARY)}
    made = Tokenizer(WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w2", pad_token="w0", unk_token="w0")


def base() -> GPT2LMHeadModel:
    """Small random base model."""
    torch.manual_seed(0)
    size = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "vocab_size": VOCABULARY}
    return GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=2, pad_token_id=0))


def model() -> MFNForCausalLM:
    """Small random MFN model."""
    made = MFNForCausalLM.from_base(base(), num_features=24, k=4, alpha=1.0)
    made.save_preset("loud", {"L0/1": Clamp(2.0), "L1/3": Scale(0.5)})
    return made


def windows() -> Dataset:
    """Random windows."""
    return Dataset.from_dict({"input_ids": np.random.default_rng(0).integers(3, VOCABULARY, (6, WINDOW)).tolist()})


def write_model(folder: Path) -> None:
    """Writes a model with its tokenizer."""
    model().save_pretrained(folder)
    tokenizer().save_pretrained(folder)


def write_atlas(folder: Path) -> None:
    """Writes an atlas."""
    FeatureAtlas.build(model(), tokenizer(), windows(), progress=False).save_pretrained(folder)


def read_whole_atlas(folder: Path) -> None:
    """Reads an atlas as steering, search and cards do."""
    atlas = FeatureAtlas.from_pretrained(folder)
    atlas.to_pandas()
    len(atlas.labels)
    read_atlas(folder)


def write_labels(folder: Path) -> None:
    """Writes the same labels in each format; compressed, too."""
    rows = [{"feature": f"L0/{number}", "label": f"word {number}", "score": 0.5} for number in range(4)]
    table = "feature,label,score\n" + "".join(f"{row['feature']},{row['label']},0.5\n" for row in rows)
    texts = {"json": json.dumps(rows), "jsonl": "".join(json.dumps(row) + "\n" for row in rows), "csv": table}
    for ending, text in texts.items():
        (folder / f"labels.{ending}").write_text(text, encoding="utf-8")
        (folder / f"labels.{ending}.gz").write_bytes(gzip.compress(text.encode()))


def read_labels(folder: Path) -> None:
    """Reads all files of labels of a folder."""
    for file in sorted(folder.iterdir()):
        read_label_file(file)


def write_json(file: Path, content: Any) -> None:
    """Writes a JSON file, with its folder."""
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content), encoding="utf-8")


def write_training_record(folder: Path) -> None:
    """Writes the record of a training."""
    figures = {"recon_loss": 0.1, "dead_share": 0.0}
    record = {
        "versions": {"torch": "2"},
        "arguments": {"seed": 0},
        "steps": 3,
        "alpha": 1.0,
        "k": 4,
        "figures": figures,
    }
    write_json(folder / "training_record.json", record)


def write_statistics(folder: Path) -> None:
    """Writes the statistics of a checkpoint."""
    FeatureStatistics(model().config, 100, torch.device("cpu")).save(folder)


def read_statistics(folder: Path) -> None:
    """Reads the statistics of a checkpoint."""
    FeatureStatistics(model().config, 100, torch.device("cpu")).load(folder)


def harvest_state() -> HarvestState:
    """Empty state of a harvest."""
    return HarvestState([0, 1], 24, ExampleLimits(), WINDOW)


def write_result(folder: Path) -> None:
    """Writes the result of a prediction."""
    name, figures = "firing rate CV", {"MFN": {"firing rate CV": Estimate(1.0, 0.9, 1.1)}}
    paper = PaperCriterion.judged("at most 1", figures, name, lambda value: value <= 1, "SAE")
    result = PredictionResult("P1", "claim", "criterion", "partly", "reason", name, figures, "SAE", paper)
    report.save_result(result, {"seed": 0}, folder)


def write_texts(folder: Path) -> None:
    """Writes the same texts in several formats."""
    texts = [f"w{number} w{number + 1} w3 w4 w5 w6" for number in range(3, 12)]
    (folder / "a.txt").write_text("\n\n".join(texts), encoding="utf-8")
    (folder / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    (folder / "c.csv").write_text("text\n" + "\n".join(texts) + "\n", encoding="utf-8")
    Dataset.from_dict({"text": texts}).to_parquet(folder / "d.parquet")


def read_texts(folder: Path) -> None:
    """Reads and packs all texts of a folder."""
    for file in sorted(folder.iterdir()):
        for _ in pack(load_text([file]), tokenizer(), WINDOW):
            pass


def write_saes(folder: Path) -> None:
    """Writes an SAE in each format."""
    made = MFNForCausalLM.from_base(base(), num_features=24, k=4, codes="stream", input_norm="none")
    export_saes(made, folder, "saelens", [0])
    export_saes(made, folder, "sparsify", [1])
    encoder, shape = torch.ones(24, 16), {"k": 4, "postact_fn": "ReLU"}
    state = {"pre_bias": torch.ones(16), "latent_bias": torch.ones(24), "encoder.weight": encoder}
    state |= {"decoder.weight": encoder.T.contiguous(), "activation": "TopK", "activation_state_dict": shape}
    (folder / "resid_post_attn").mkdir()
    torch.save(state, folder / "resid_post_attn" / "2.pt")


def read_saes(folder: Path) -> None:
    """Reads all SAEs of a folder."""
    for place in find_saes(folder).values():
        open_sae(place).read()


def settings_of(kind: type, random_: random.Random) -> dict[str, Any]:
    """One to three fields of a dataclass with odd values."""
    names = [field.name for field in fields(kind) if field.init and field.name != "text_config"]
    return {random_.choice(names): odd_value(random_) for _ in range(random_.randint(1, 3))}


def own_arguments(random_: random.Random) -> MFNTrainingArguments:
    """Training arguments with odd values in fields that the package adds."""
    known = {field.name for field in fields(MFNTrainingArguments.__mro__[1])}
    names = [field.name for field in fields(MFNTrainingArguments) if field.name not in known]
    chosen = {random_.choice(names): odd_value(random_) for _ in range(random_.randint(1, 3))}
    return MFNTrainingArguments("out", report_to=[], use_cpu=True, **chosen)


def intervention(random_: random.Random) -> None:
    """Intervention, positions and names of features with odd values."""
    kind, value = random_.choice((Clamp, Scale, Add)), odd_value(random_)
    name = odd_value(random_) if random_.random() < 0.3 else "L0/1"
    chosen = {name: kind(value)} if isinstance(name, str | int | None) else name
    positions = odd_value(random_) if random_.random() < 0.3 else None
    with READ_BY_ALL.steer(chosen, positions=positions):
        pass


def edit(random_: random.Random) -> None:
    """Edits of features with odd values."""
    method = random_.choice((MFNForCausalLM.prune_features, MFNForCausalLM.reset_features))
    layer = odd_value(random_) if random_.random() < 0.3 else 0
    method(model(), layer, odd_value(random_))


READ_BY_ALL = model()
FILES: dict[str, FileReader] = {
    "config": FileReader(lambda folder: model().config.save_pretrained(folder), MFNConfig.from_pretrained),
    "model": FileReader(write_model, MFNForCausalLM.from_pretrained, OF_WEIGHTS),
    "model to share": FileReader(write_model, check_model),
    "atlas": FileReader(write_atlas, read_whole_atlas),
    "labels": FileReader(write_labels, read_labels),
    "concepts": FileReader(
        lambda folder: (folder / "concepts.json").write_text(
            json.dumps({"royal": ["king", "queen"], "arms": ["sword"]})
        ),
        lambda folder: read_concepts(folder / "concepts.json"),
    ),
    "explanation": FileReader(
        lambda folder: explain(READ_BY_ALL, tokenizer(), "w3 w4 w5").save(folder), Explanation.load
    ),
    "evaluation": FileReader(
        lambda folder: add_perplexities(folder, [{"data": "text", "tokens": 100, "alpha_1": 20.0}]),
        read_perplexities,
    ),
    "result of a prediction": FileReader(write_result, lambda folder: report.load_result("P1", {"seed": 0}, folder)),
    "activation cache": FileReader(
        lambda folder: ActivationCache.write(model(), windows(), folder / "cache"),
        lambda folder: ActivationCache(folder / "cache")[0],
    ),
    "training statistics": FileReader(write_statistics, read_statistics),
    "training record": FileReader(write_training_record, read_record),
    "training state": FileReader(
        lambda folder: write_json(folder / "checkpoint-3" / "trainer_state.json", {"global_step": 3}),
        find_complete_checkpoint,
    ),
    "harvest state": FileReader(
        lambda folder: harvest_state().save(folder / "state", {"window": WINDOW}),
        lambda folder: harvest_state().load(folder / "state", {"window": WINDOW}),
    ),
    "text": FileReader(write_texts, read_texts),
    "SAEs": FileReader(write_saes, read_saes),
}
VALUES: dict[str, ValueReader] = {
    "settings of a config": ValueReader(
        lambda random_: MFNConfig(text_config=READ_BY_ALL.config.text_config, **settings_of(MFNConfig, random_))
    ),
    "training arguments": ValueReader(own_arguments),
    "interventions": ValueReader(intervention),
    "edits of features": ValueReader(edit),
    "presets": ValueReader(
        lambda random_: MFNConfig.from_dict(damage_value(json.loads(READ_BY_ALL.config.to_json_string()), random_))
    ),
}
