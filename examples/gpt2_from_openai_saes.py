"""Makes an MFN GPT-2 of OpenAI's sparse autoencoders, without any training.

OpenAI trained TopK SAEs (k = 32) of GPT-2 small on the residual stream between attention and MLP, of each of the 12
blocks. This is the place of an MFN layer. The model reads each token through 32 named features per block.

    python examples/gpt2_from_openai_saes.py --output gpt2-openai                    # downloads 2.4 GB from the Hub
    python examples/gpt2_from_openai_saes.py --output gpt2-openai --layers 5 6 --width 128k
    python examples/gpt2_from_openai_saes.py --output gpt2-openai --saes FOLDER      # OpenAI's files 0.pt to 11.pt
"""

from __future__ import annotations

import argparse
from pathlib import Path

from huggingface_hub import snapshot_download
from transformers import AutoTokenizer

from modeling_mfn import MFNForCausalLM, find_saes
from modeling_mfn.utils.display import visible_lines

RELEASES = {
    "32k": "jbloom/GPT2-Small-OAI-v5-32k-resid-mid-SAEs",
    "128k": "jbloom/GPT2-Small-OAI-v5-128k-resid-mid-SAEs",
}
"""Width -> repository with OpenAI's SAEs in SAELens' format, `gpt2-small-resid-mid-v5-32k` and `-128k` in SAELens."""
FILES = ("cfg.json", "sae_weights.safetensors")


def folder_of(width: str, layer: int) -> str:
    """Name of a layer's folder in its repository."""
    return f"v5_{width}_layer_{layer}"


def download(width: str, layers: list[int]) -> dict[int, Path]:
    """Downloads the SAEs of some layers, 200 MB each for 32k: layer -> folder."""
    wanted = [f"{folder_of(width, layer)}/{file}" for layer in layers for file in FILES]
    repository = Path(snapshot_download(RELEASES[width], allow_patterns=wanted))
    return {layer: repository / folder_of(width, layer) for layer in layers}


def main() -> None:
    parser = argparse.ArgumentParser(description="Make an MFN GPT-2 of OpenAI's sparse autoencoders.")
    parser.add_argument("--base", default="gpt2", help="GPT-2 small: a folder, or an id on the Hub")
    parser.add_argument("--output", required=True, help="folder for the MFN model")
    parser.add_argument("--width", choices=RELEASES, default="32k", help="features per layer: 32,768 or 131,072")
    parser.add_argument("--layers", type=int, nargs="*", default=list(range(12)), help="blocks that get an MFN layer")
    parser.add_argument("--saes", type=Path, help="folder with OpenAI's own files, in place of the Hub")
    parser.add_argument("--alpha", type=float, default=1.0, help="blend: at 1 only features pass, 0 is GPT-2 itself")
    parser.add_argument("--text", default="The queen of England", help="text that the model goes on with")
    given = parser.parse_args()

    if given.saes is None:
        saes = download(given.width, given.layers)
    else:
        found = find_saes(given.saes)
        saes = {layer: found[layer] for layer in given.layers}
    tokenizer = AutoTokenizer.from_pretrained(given.base)
    model = MFNForCausalLM.from_saes(given.base, saes, alpha=given.alpha)
    model.save_pretrained(given.output)
    tokenizer.save_pretrained(given.output)

    inputs = tokenizer(given.text, return_tensors="pt")
    codes = model(**inputs, output_codes=True).codes
    for layer, code in codes.items():
        strongest = [f"L{layer}/{index}" for index in code.indices[0, -1, :3].tolist()]
        print(f"block {layer}: strongest features of the last token {', '.join(strongest)}")
    generated = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    print(visible_lines(tokenizer.decode(generated[0])))  # escapes control characters


if __name__ == "__main__":
    main()
