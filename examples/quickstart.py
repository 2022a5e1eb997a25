"""Convert, train, read, steer, save and load a model, in one page. Runs offline once `mfn demo` has run.

python examples/quickstart.py
"""

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import Clamp, MFNForCausalLM, MFNTrainer, MFNTrainingArguments, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.utils.display import visible_lines

base = smollm2()  # any Llama or GPT-2: a folder, an id on the Hub, or a model
tokenizer = AutoTokenizer.from_pretrained(base)
windows = pack(load_text(shakespeare()[0][:4]), tokenizer, window=128)

# Convert. At alpha 0 the logits equal the base model's bit for bit.
calibration = {"input_ids": torch.tensor(windows[:8]["input_ids"])}
model = MFNForCausalLM.from_base(base, layers=[10], expansion_factor=4, k=32, calibration=calibration)

# Train only the MFN layer while alpha rises to 1. What the first blocks write then reaches the rest as features.
arguments = MFNTrainingArguments(
    output_dir="runs/quickstart", max_steps=20, per_device_train_batch_size=2, learning_rate=4e-3, trainable="mfn",
    logging_steps=5, save_strategy="no", report_to=[],
)  # fmt: skip
MFNTrainer(model, arguments, train_dataset=windows).train()

# Read which features are active, and how strongly.
inputs = tokenizer("The king is", return_tensors="pt")
code = model(**inputs, output_codes=True).codes[10]  # indices and values, (1, T, K)
value, place = code.values[0, -1].max(0)
feature = code.indices[0, -1, place].item()
print(f"strongest on the last token: L10/{feature}, activation {value:.1f}")

# Steer a feature during generation.
with model.steer({(10, feature): Clamp(3 * value.item())}):
    tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
print(visible_lines(tokenizer.decode(tokens[0])))  # escapes control characters

# Save and load as any transformers model.
model.save_pretrained("runs/quickstart/model")
again = AutoModelForCausalLM.from_pretrained("runs/quickstart/model")
assert torch.equal(again(**inputs).logits, model(**inputs).logits)
