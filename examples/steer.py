"""The features that fire on a prompt, turned up and off one at a time, and how the model then goes on. Runs offline
once the demo's files are in the cache, on the model of quickstart.py, which it trains if that has not run yet.

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

# Which features fire, and how much at most? The first token is left out: its residual is like no other's.
strongest = {}
with torch.no_grad():
    for layer, code in model(**inputs, output_codes=True).codes.items():
        activations = code.to_dense()[0, 1:].amax(0)
        strongest |= {(layer, index): activations[index].item() for index in activations.topk(3).indices.tolist()}


def go_on():
    tokens = model.generate(**inputs, max_new_tokens=12, do_sample=False, repetition_penalty=1.2)
    text = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :])
    return Text(visible_lines(text))  # what was generated is neither markup nor a terminal's control sequence


# Turned up to three times its activation, on every token, also those that are generated; or off.
table = Table("feature", "activation", "off", "as it is", "three times as much", show_lines=True)
plain = go_on()
for (layer, index), activation in strongest.items():
    with model.steer({(layer, index): Ablate()}):
        off = go_on()
    with model.steer({(layer, index): Clamp(3 * activation)}):
        up = go_on()
    table.add_row(f"L{layer}/{index}", f"{activation:.1f}", off, plain, up)
Console().print(table)
