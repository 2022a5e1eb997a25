"""Two of the paper's predictions on a small scale, compared with post-hoc SAEs.

P1: do features fire about equally often? P3: do models of two seeds find the same features? `mfn evaluate` measures all
five. The example runs offline once the demo's files are in the cache.

python examples/evaluate_predictions.py
"""

from pathlib import Path

import torch
from rich.console import Console
from transformers import AutoTokenizer

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments
from modeling_mfn.data.text import load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.evaluation.baselines.saes import post_hoc_sae, random_sae
from modeling_mfn.evaluation.predictions.p1_firing_rates import firing_rate_calibration
from modeling_mfn.evaluation.predictions.p3_seed_alignment import cross_seed_alignment
from modeling_mfn.evaluation.report import save_result, verdict_table, write_report
from modeling_mfn.evaluation.result import MFN, NO_RATE_LOSS, POST_HOC_SAE, RANDOM_SAE

SIZE = {"layers": [10], "num_features": 1152, "k": 32}
OUTPUT = Path("runs/evaluate_predictions")

base = smollm2()
tokenizer = AutoTokenizer.from_pretrained(base)
training, held_out = (pack(load_text(texts[:2]), tokenizer, window=128) for texts in shakespeare())
training, held_out = training.select(range(40)), held_out.select(range(20))
calibration = {"input_ids": torch.tensor(training[:8]["input_ids"])}


def train_mfn(seed, lambda_rate=2.5e-3):
    """Trains an MFN model whose layer learns in place. The training is too short for real results."""
    torch.manual_seed(seed)
    model = MFNForCausalLM.from_base(base, calibration=calibration, **SIZE)
    arguments = MFNTrainingArguments(
        str(OUTPUT / "training"), num_train_epochs=1, per_device_train_batch_size=4, learning_rate=4e-3,
        trainable="mfn", lambda_rate=lambda_rate, logging_steps=4, save_strategy="no", report_to=[],
        seed=seed,
    )  # fmt: skip
    MFNTrainer(model, arguments, train_dataset=training).train()
    return model


# Each subject is an MFN model. A post-hoc SAE is an MFN model at alpha = 0 on the frozen base model.
subjects = {
    MFN: [train_mfn(seed) for seed in (0, 1)],
    NO_RATE_LOSS: [train_mfn(0, lambda_rate=0.0)],
    POST_HOC_SAE: [post_hoc_sae(base, training, seed=seed, **SIZE) for seed in (0, 1)],
    RANDOM_SAE: [random_sae(base, training, seed=seed, **SIZE) for seed in (0, 1)],
}
results = [firing_rate_calibration(subjects, held_out), cross_seed_alignment(subjects, held_out, training)]
settings = {"base": "SmolLM2-135M", "training_tokens": 40 * 128, "held_out_tokens": 20 * 128}
for result in results:
    save_result(result, settings, OUTPUT)
write_report(results, {}, settings, OUTPUT)
Console().print(verdict_table(results))
for subject, estimates in results[1].figures.items():
    print(subject, {name: str(estimate) for name, estimate in estimates.items()})
