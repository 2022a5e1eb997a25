"""Trace a predicted token to features, and these features to the tokens that were read.

Uses the model of quickstart.py and trains it first if it is missing. Runs offline once `mfn demo` has run.

python examples/explain.py
"""

import runpy
from pathlib import Path

import rich
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_mfn import explain
from modeling_mfn.demo.assets import smollm2

folder = Path("runs/quickstart/model")
if not folder.exists():
    runpy.run_path(str(Path(__file__).with_name("quickstart.py")))
model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(smollm2())

# Explain the likeliest next token, compared with the mean logit of the vocabulary.
text = "Good my lord, the king is dead, and the"
explanation = explain(model, tokenizer, text, top=8)
rich.print(explanation.table())
explanation.save("runs/explain")  # explanation.json, .png and .svg

# Explain why this token is likelier than " queen".
rich.print(explain(model, tokenizer, text, against=" queen", top=8, trace=0).table())
