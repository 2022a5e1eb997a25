"""Turn features of a prompt up or off, one at a time, and see how the text continues.

Uses the model of quickstart.py and trains it first if it is missing. Runs offline once `mfn demo` has run.

python examples/steer.py
"""

import runpy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import Ablate, Clamp
from modeling_mfn.demo.assets import smollm2
from modeling_mfn.utils.display import visible_lines

folder = Path("runs/quickstart/model")
if not folder.exists():
    runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(smollm2())
inputs = tokenizer("The king is dead, and the queen", return_tensors="pt")

# Find the strongest features. The first token is left out, since attention rests on it and its residual is unusual.
strongest = {}
with torch.no_grad():
    for layer, code in model(**inputs, output_codes=True).codes.items():
        activations = code.to_dense()[0, 1:].amax(0)
        strongest |= {(layer, index): activations[index].item() for index in activations.topk(3).indices.tolist()}


def continuation():
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return Text(visible_lines(text))  # escapes control characters


# Turn each feature off, or up to three times its activation, on all tokens of the prompt and of the continuation.
table = Table("feature", "activation", "off", "as it is", "three times as much", show_lines=True)
plain = continuation()
for (layer, index), activation in strongest.items():
    with model.steer({(layer, index): Ablate()}):
        off = continuation()
    with model.steer({(layer, index): Clamp(3 * activation)}):
        up = continuation()
    table.add_row(f"L{layer}/{index}", f"{activation:.1f}", off, plain, up)
Console().print(table)
