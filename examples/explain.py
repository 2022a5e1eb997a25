"""Why does the model go on as it does? One predicted token traced to features, and these to the tokens that were read.
Runs offline once the demo's files are in the cache, on the model of quickstart.py, which it trains if that has not run
yet.

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

# The token after the text's last, the likeliest one, against the mean logit of the vocabulary.
text = "Good my lord, the king is dead, and the"
explanation = explain(model, tokenizer, text, top=8)
rich.print(explanation.table())
explanation.save("runs/explain")  # explanation.json, .png and .svg

# Why this rather than " queen"?
rich.print(explain(model, tokenizer, text, against=" queen", top=8, trace=0).table())
