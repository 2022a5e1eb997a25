"""Train MFN layers from cached activations, then the whole model. Of all recipes tried, this one is closest to dense.

The backbone runs over the text once. MFN layers then learn from its activations, several times over and at little cost.
At the end everything is trained together. Runs offline once the demo's files are in the cache. A real training has a
thousand times the text and steps, as in `benchmarks/small/fidelity.py`.

    python examples/train_from_cache.py
"""

import torch
from transformers import AutoTokenizer

from modeling_mfn import (
    ActivationCache,
    CachedResiduals,
    MFNForCausalLM,
    MFNTrainer,
    MFNTrainingArguments,
    load_text,
    pack,
)
from modeling_mfn.demo.assets import shakespeare, smollm2

OUTPUT = "runs/train_from_cache"
COMMON = {"save_strategy": "no", "report_to": [], "lr_scheduler_type": "linear"}

base = smollm2()
tokenizer = AutoTokenizer.from_pretrained(base)
windows = pack(load_text(shakespeare()[0][:4]), tokenizer, window=128).shuffle(seed=0)
calibration = {"input_ids": torch.tensor(windows[:8]["input_ids"])}
model = MFNForCausalLM.from_base(base, layers=[6, 10], expansion_factor=4, k=32, calibration=calibration)

# 1. Cache the residual streams of 64 windows, as the MFN layers will read them: L x d x 2 bytes per token.
cache = ActivationCache.write(model, windows.select(range(64)), f"{OUTPUT}/cache")

# 2. Train MFN layers alone, five times over the cache. A dictionary needs many small steps.
arguments = MFNTrainingArguments(
    OUTPUT, num_train_epochs=5, per_device_train_batch_size=2, learning_rate=8e-3, logging_steps=40,
    lambda_util=0.0, alpha_end=0.0, trainable="mfn", **COMMON,
)  # fmt: skip
MFNTrainer(CachedResiduals(model), arguments, train_dataset=cache).train()

# 3. Train everything, with alpha from 0 to 1 in the first quarter. The optimizer is new, so it gets a warm-up and a
# lower learning rate.
arguments = MFNTrainingArguments(
    OUTPUT, max_steps=16, per_device_train_batch_size=2, learning_rate=1e-4, mfn_learning_rate=1e-3, warmup_steps=4,
    alpha_anneal=0.25, logging_steps=4, **COMMON,
)  # fmt: skip
trainer = MFNTrainer(model, arguments, train_dataset=windows.skip(64), processing_class=tokenizer)
trainer.train()
trainer.save_model()
print(f"{OUTPUT}: alpha {model.config.alpha:g}, trained on {64 * 128 + 16 * 2 * 128:,} tokens")
