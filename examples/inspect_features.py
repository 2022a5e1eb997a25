"""Describe the features of a model with an atlas. Runs offline once `mfn demo` has run.

python examples/inspect_features.py
"""

import torch
from rich.console import Console
from transformers import AutoTokenizer

from modeling_mfn import FeatureAtlas, MFNForCausalLM, TextWindows
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.features.atlas.table import atlas_table, in_context, interesting_features
from modeling_mfn.utils.display import for_terminal

# Make a model. Its features are new, with random directions; quickstart.py shows how to train them.
base = smollm2()
tokenizer = AutoTokenizer.from_pretrained(base)
windows = TextWindows(shakespeare()[0][:4], tokenizer, window=128, tokens=4096)
calibration = {"input_ids": torch.tensor([row["input_ids"] for _, row in zip(range(8), windows, strict=False)])}
model = MFNForCausalLM.from_base(base, layers=[10], expansion_factor=4, k=32, calibration=calibration)

# Describe all features in one pass over the text. Firings are also counted per text.
atlas = FeatureAtlas.build(model, tokenizer, windows)
atlas.save_pretrained("runs/inspect_features")

# Read the atlas. This needs neither the model nor torch.
atlas = FeatureAtlas.from_pretrained("runs/inspect_features")
console = Console()
names = interesting_features(atlas, count=6)
console.print(atlas_table(atlas, names))

record = atlas[names[0]]
atlas.label(record.name, "my favourite")
atlas.save_pretrained("runs/inspect_features")
neighbour = record.nearest[0]
console.print(f"{record.name} fires on {record.firing_rate:.2%} of tokens; nearest to it is L10/{neighbour['index']}")
for source, count in zip(atlas.metadata["data"]["sources"], record.source_counts, strict=True):
    console.print(f"  {count:4} of {source['tokens']} tokens of ", for_terminal(source["name"]), sep="")
for example in record.examples[:8]:
    console.print(f"{example.activation:8.2f}  ", in_context(example), sep="")

frame = atlas.to_pandas()  # for everything else
print(frame[frame["status"] == "alive"][["name", "firing_rate", "mean_activation", "max_activation"]].describe())
