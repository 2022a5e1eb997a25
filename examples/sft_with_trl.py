"""Supervised fine-tuning with TRL's `SFTTrainer`, with the losses of the features beside its own.

pip install ".[demo]" trl && python examples/sft_with_trl.py
"""

from dataclasses import dataclass

import torch
from transformers import AutoTokenizer
from trl import SFTConfig, SFTTrainer

from modeling_mfn import MFNForCausalLM, MFNTrainerMixin, MFNTrainingArguments, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2


class MFNSFTTrainer(MFNTrainerMixin, SFTTrainer):
    """`SFTTrainer` for MFN models."""


@dataclass
class MFNSFTConfig(SFTConfig, MFNTrainingArguments):
    """`SFTConfig` with the arguments of MFN layers."""


base = smollm2()
tokenizer = AutoTokenizer.from_pretrained(base)
text = load_text(shakespeare()[0][:4])
calibration = {"input_ids": torch.tensor(pack(text, tokenizer, window=128)[:16]["input_ids"])}
model = MFNForCausalLM.from_base(base, calibration=calibration, layers=[10], expansion_factor=4, k=32)

arguments = MFNSFTConfig(
    output_dir="runs/sft_with_trl", max_steps=20, per_device_train_batch_size=2, max_length=128, mfn_learning_rate=4e-3,
    alpha_anneal=0.5, logging_steps=5, save_strategy="no", report_to=[], bf16=torch.cuda.is_available(),
)  # fmt: skip
trainer = MFNSFTTrainer(model, arguments, train_dataset=text, processing_class=tokenizer)
trainer.train()
trainer.save_model()  # with the training record next to it
print("alpha:", model.config.alpha)
print("norms of directions:", [layer.decoder.weight.norm(dim=-1).aminmax() for layer in model.mfn_layers.values()])
