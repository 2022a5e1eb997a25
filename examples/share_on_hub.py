"""Share an MFN model on the Hub. Without --repo nothing is uploaded: the files and the model card are printed.

python examples/share_on_hub.py                                          # makes a small model first
python examples/share_on_hub.py --model FOLDER                           # FOLDER was written by `save_pretrained`
python examples/share_on_hub.py --model FOLDER --repo me/my-mfn --private
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoTokenizer

from modeling_mfn import MFNForCausalLM, load_text, pack, push
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.evaluation.measures.perplexity import perplexity_rows
from modeling_mfn.hub.card import model_card
from modeling_mfn.hub.evaluation_file import add_perplexities
from modeling_mfn.hub.push import check_model


def save_small_model(folder: Path) -> None:
    """Saves SmolLM2 with one MFN layer, fitted to 1,024 tokens but not trained, and its perplexities for the card."""
    base = smollm2()
    tokenizer = AutoTokenizer.from_pretrained(base)
    windows = pack(load_text(shakespeare()[1][:1]), tokenizer, window=128)
    calibration = {"input_ids": torch.tensor(windows[:8]["input_ids"])}
    model = MFNForCausalLM.from_base(base, layers=[10], expansion_factor=4, k=32, calibration=calibration)
    model.set_blend(1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # the card takes perplexities from evaluation.json, and features from an atlas saved in the same folder
    add_perplexities(folder, perplexity_rows(model, None, {"Hamlet": windows.select(range(8, 16))}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="folder of an MFN model")
    parser.add_argument("--repo", help="owner/name on the Hub; without it nothing is uploaded")
    parser.add_argument("--private", action="store_true")
    arguments = parser.parse_args()
    folder = arguments.model or Path("runs/share_on_hub")
    if arguments.model is None:
        save_small_model(folder)

    if arguments.repo:
        # one commit; after a lost connection, run the script again: uploaded files are not sent twice
        print(push(folder, arguments.repo, private=arguments.private or None).commit_url)
        return
    print(f"{folder} holds a complete model. These files would be public:")
    for name in check_model(folder):  # raises ValueError if weights, code or config are missing or do not fit
        print(f"  {name} {(folder / name).stat().st_size:,} bytes")
    print("and this card as README.md, unless the folder or the repository has a card:\n")
    print(model_card(folder))


if __name__ == "__main__":
    main()
