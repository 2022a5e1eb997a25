"""A saved MFN model in lm-evaluation-harness, as it is and steered: accuracy in choosing how a text goes on.

The Llama of `benchmarks.interop.small_mfn` reads the beginning of a held-out window and chooses between its next tokens
and those of another window. A preset that is active by default, with interventions on the layer's most active features,
steers it. The harness loads folders alone, by `trust_remote_code`.

    python -m benchmarks.interop.harness

needs lm-eval, and writes benchmarks/results/interop/harness.json.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import typer

from benchmarks.common import corpora, records, small_models
from benchmarks.interop import small_mfn
from modeling_mfn import Clamp, MFNForCausalLM

RESULT = records.RESULTS / "interop" / "harness.json"
QUESTIONS, READ, CHOSEN = 120, 48, 12
"""Number of questions; tokens of a window that are read, and tokens of each choice."""
LAYER, FEATURES, STRENGTH = 1, 8, 3.0
"""Layer and number of the features that the preset holds, and their activation as a multiple of the largest one."""
TASK = """
task: going_on
dataset_path: json
dataset_kwargs: {data_files: {test: %s}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


def write_task(folder: Path, tokenizer: Any) -> None:
    """Writes the questions and the task of the harness."""
    windows = small_mfn.held_out(3 * 128 * QUESTIONS)["input_ids"][:QUESTIONS]
    questions = []
    for place, window in enumerate(windows):
        ends = [of[READ : READ + CHOSEN] for of in (window, windows[(place + QUESTIONS // 3) % QUESTIONS])]
        answer = place % 2
        choices = [tokenizer.decode(end) for end in (ends if answer == 0 else reversed(ends))]
        questions.append({"text": tokenizer.decode(window[:READ]), "choices": choices, "answer": answer})
    (folder / "questions.jsonl").write_text("".join(json.dumps(each) + "\n" for each in questions), encoding="utf-8")
    (folder / "going_on.yaml").write_text(TASK % (folder / "questions.jsonl"), encoding="utf-8")


@torch.no_grad()
def strongest(model: MFNForCausalLM) -> dict[tuple[int, int], Clamp]:
    """Interventions that hold the features of largest total activation far above what they reach."""
    ids = torch.tensor(small_mfn.held_out(12_288)["input_ids"])[:16]
    code = model(ids, output_codes=True).codes[LAYER].to_dense().flatten(0, 1)
    features = code.sum(0).topk(FEATURES).indices.tolist()
    return {(LAYER, feature): Clamp(STRENGTH * float(code[:, feature].max())) for feature in features}


def accuracy(folder: Path, task: Path) -> dict[str, float]:
    """Accuracy of the model in a folder, and its standard error."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        "hf", model_args=f"pretrained={folder},trust_remote_code=True", tasks=["going_on"], device="cpu", batch_size=8,
        task_manager=TaskManager(include_path=str(task), include_defaults=False), bootstrap_iters=0,
    )["results"]["going_on"]  # fmt: skip
    return {
        "accuracy": found["acc,none"],
        "standard_error": (found["acc,none"] * (1 - found["acc,none"]) / QUESTIONS) ** 0.5,
    }


def main() -> None:
    """Writes the result."""
    small_mfn.quietly()
    tokenizer = corpora.tokenizer(small_models.VOCABULARY)
    model = MFNForCausalLM.from_pretrained(small_mfn.folder_of("llama"))
    model.save_preset("loud", strongest(model))
    found = {}
    with tempfile.TemporaryDirectory() as name:
        write_task(Path(name), tokenizer)
        for preset in (None, "loud"):
            model.config.active_preset = preset
            folder = Path(name) / str(preset)
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            found[preset or "none"] = accuracy(folder, Path(name))
            print(preset, found[preset or "none"], flush=True)
    record = {
        "command": records.command_line("interop.harness"),
        "settings": {"model": small_mfn.RUNS["llama"], "questions": QUESTIONS, "layer": LAYER, "features": FEATURES,
                     "strength": STRENGTH},
        "versions": small_mfn.versions("torch", "transformers", "lm_eval"),
        "active_preset": found,
    }  # fmt: skip
    records.write_record(RESULT, record)


if __name__ == "__main__":
    typer.run(main)
