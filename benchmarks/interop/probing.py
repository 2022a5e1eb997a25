"""sae-probes on an exported MFN layer: how well single features, and 16 of them, tell concepts apart.

    pip install sae-probes==0.4.2 sae-lens==6.54.12
    python -m benchmarks.interop.probing                       # a short training on SmolLM2-135M first
    python -m benchmarks.interop.probing --model FOLDER --layer 12 --dataset 119_us_state_TX

writes benchmarks/results/interop/sae_probes.json. sae-probes brings its data sets, and TransformerLens would download a
model by its name. So the activations come from the MFN model here, in the files that sae-probes expects.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.common import records
from modeling_mfn import MFNForCausalLM, export_saes, load_text, pack
from modeling_mfn.demo.assets import shakespeare, smollm2
from modeling_mfn.evaluation.baselines.saes import post_hoc_sae
from modeling_mfn.model.modes import as_base

FOLDER = records.REPOSITORY / "runs" / "sae_probes"
DATASETS = ["119_us_state_TX", "125_world_country_Italy", "156_athlete_sport_baseball", "132_temp_cat_Event Ordering"]
"""Data sets of short texts."""
TRAINING: dict[str, Any] = {"num_features": 2304, "k": 32, "layers": [9], "epochs": 8}
WINDOWS, WINDOW = 128, 128
BATCH = 64
FIGURES = ("val_auc", "test_auc", "test_acc")


class _Reached(Exception):
    """The layer has been reached, and no later block is needed."""


@torch.no_grad()
def last_token_activations(model: MFNForCausalLM, tokenizer: Any, texts: list[str], layer: int) -> Tensor:
    """Returns what passes through a layer's tap on the last token of each text (N, d), with the base model below."""
    seen: list[Tensor] = []

    def keep(module: Any, arguments: Any, output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    handle = model.mfn_layers[layer].hook_in.register_forward_hook(keep)
    try:
        with as_base(model):
            for start in range(0, len(texts), BATCH):
                ids = [tokenizer(text)["input_ids"][-1024:] for text in texts[start : start + BATCH]]
                length = max(map(len, ids))
                padded = torch.tensor([row + [0] * (length - len(row)) for row in ids])  # later tokens change nothing
                with suppress(_Reached):
                    model(input_ids=padded)
                seen[-1] = seen[-1][torch.arange(len(ids)), torch.tensor([len(row) - 1 for row in ids])]
    finally:
        handle.remove()
    return torch.cat(seen)


def trained(folder: Path) -> Path:
    """Returns the folder of a model with a post-hoc SAE, trained for minutes on Shakespeare when first asked for."""
    if not folder.exists():
        base = smollm2()
        tokenizer = AutoTokenizer.from_pretrained(base)
        windows = pack(load_text(shakespeare()[0]), tokenizer, WINDOW).select(range(WINDOWS))
        post_hoc_sae(base, windows, **TRAINING).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def probe(model: MFNForCausalLM, tokenizer: Any, layer: int, datasets: list[str], ks: list[int]) -> dict[str, Any]:
    """Runs sae-probes on a layer: data set -> number of features -> figures."""
    import pandas as pd
    from sae_lens import SAE
    from sae_probes import run_sae_evals
    from sae_probes.constants import DATA_PATH

    with tempfile.TemporaryDirectory() as scratch:
        sae = SAE.load_from_disk(export_saes(model, Path(scratch) / "sae", layers=[layer])[layer])
        hook = str(sae.cfg.metadata.hook_name)
        cache = Path(scratch) / "model_activations_mfn"
        cache.mkdir()
        for dataset in datasets:
            texts = pd.read_csv(DATA_PATH / "cleaned_data" / f"{dataset}.csv.zst", compression="zstd")["prompt"]
            activations = last_token_activations(model, tokenizer, texts.tolist(), layer)
            torch.save(activations, cache / f"{dataset}_{hook}.pt")
        settings = {"hook_name": hook, "reg_type": "l1", "setting": "normal", "ks": ks, "device": "cpu"}
        places = {"results_path": scratch, "model_cache_path": scratch}
        run_sae_evals(sae, "mfn", datasets=datasets, **settings, **places)
        folder = Path(scratch) / "sae_probes_mfn" / "normal_setting"
        found = {name: json.loads((folder / f"{name}_{hook}_l1.json").read_text(encoding="utf-8")) for name in datasets}
    return {
        name: {str(row["k"]): {figure: row[figure] for figure in FIGURES} for row in rows}
        for name, rows in found.items()
    }


def main(
    model: Annotated[
        Path | None, typer.Option(help="Folder of an MFN model. Default: one that is trained here.")
    ] = None,
    layer: Annotated[int, typer.Option(help="Block of the MFN layer.")] = TRAINING["layers"][0],
    dataset: Annotated[list[str], typer.Option(help="Data sets of sae-probes.")] = DATASETS,
) -> None:
    """Runs sae-probes on an exported layer and writes its figures."""
    folder = trained(FOLDER) if model is None else model
    mfn = MFNForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = probe(mfn, tokenizer, layer, dataset, [1, 16])
    record = {
        "command": records.command_line("interop.probing"),
        "commit": records.COMMIT,
        "versions": {name: version(name) for name in ("sae-probes", "sae-lens", "torch", "transformers")},
        "training": TRAINING | {"tokens": WINDOWS * WINDOW} if model is None else None,
        "datasets": found,
    }
    records.write_record(records.RESULTS / "interop" / "sae_probes.json", record)


if __name__ == "__main__":
    typer.run(main)
