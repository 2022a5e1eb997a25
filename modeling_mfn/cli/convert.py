"""The verb `mfn convert`."""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from ..utils.files import check_space, new_folder
from .inputs import read_tokenizer
from .options import Overwrite, console, parse_layers

if TYPE_CHECKING:
    from torch import Tensor

CALIBRATION_ROWS, CALIBRATION_WINDOW = 16, 128
"""Rows of the text that new MFN layers are fitted to, and tokens per row."""

Layers = Annotated[str, typer.Option(help='Blocks that get an MFN layer: "all", or indices such as "6,7".')]


def convert(
    context: typer.Context,
    base: Annotated[str, typer.Argument(help="Causal LM to convert: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for the MFN model.")],
    layers: Layers = "all",
    num_features: Annotated[int | None, typer.Option(help="Features per MFN layer.")] = None,
    expansion_factor: Annotated[
        int | None, typer.Option(help="Features per MFN layer, as a multiple of the hidden size.")
    ] = None,
    k: Annotated[int, typer.Option(help="Active features per token, at most.")] = 32,
    alpha: Annotated[float, typer.Option(help="Blend: 0 is the base model; at 1 only features pass.")] = 0.0,
    codes: Annotated[
        Literal["stream", "update"],
        typer.Option(help="Code the residual stream, or what was written to it since the last MFN layer."),
    ] = "update",
    coding_rounds: Annotated[
        int, typer.Option(help="Rounds that choose the active features; in all but the first, by what is left.")
    ] = 1,
    refine_steps: Annotated[
        int, typer.Option(help="Steps after each round that refine the values; 0 keeps the encoder's.")
    ] = 0,
    blend_into: Annotated[
        Literal["residual", "mlp"], typer.Option(help="Tensor that the blend replaces.")
    ] = "residual",
    input_norm: Annotated[
        Literal["layer", "none"], typer.Option(help="Standardise each token first (layer) or not (none).")
    ] = "layer",
    decoder_bias: Annotated[bool, typer.Option(help="Learn a constant in the reconstruction.")] = True,
    shared_decoder: Annotated[
        bool, typer.Option("--shared-decoder", help="Share one decoder between all MFN layers.")
    ] = False,
    calibrate_on: Annotated[
        str | None, typer.Option(help="Text to fit the new MFN layers to, as --text of mfn train.")
    ] = None,
    saes: Annotated[
        Path | None, typer.Option(help="Folder of SAEs, from SAELens, sparsify or OpenAI, that become the MFN layers.")
    ] = None,
    allow_other_site: Annotated[
        bool, typer.Option("--allow-other-site", help="Take SAEs that were trained at another place of the block.")
    ] = False,
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"], typer.Option(help="Precision; auto is the base model's.")
    ] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Put MFN layers into a checkpoint, such as one of Llama, Qwen, Gemma, Mistral or GPT-2.

    With --saes, sizes and norms are those of the SAEs, and --layers chooses among them.

    Example: mfn convert gpt2 gpt2-mfn --layers 6,7 --expansion-factor 8 --k 32
    """
    from ..model.conversion import check_base
    from ..model.mfn_for_causal_lm import MFNForCausalLM

    settings = {
        "num_features": num_features,
        "expansion_factor": expansion_factor,
        "k": k,
        "alpha": alpha,
        "codes": codes,
        "coding_rounds": coding_rounds,
        "refine_steps": refine_steps,
        "blend_into": blend_into,
        "input_norm": input_norm,
        "decoder_bias": decoder_bias,
        "shared_decoder": shared_decoder,
    }
    if allow_other_site and saes is None:
        raise ValueError("--allow-other-site is for --saes; without them, MFN layers are new")
    loading = {"dtype": dtype}
    base_config = check_base(base)
    tokenizer = read_tokenizer(base)
    found = None if saes is None else _saes_of(saes, base_config, parse_layers(layers), calibrate_on)
    inputs: list[str | Path] = [base, *([calibrate_on] if calibrate_on else []), *([saes] if saes else [])]
    with new_folder(output, overwrite, inputs) as folder:
        check_space(folder, _bytes_of_weights(base))
        calibration = None if calibrate_on is None else _calibration_inputs(base, tokenizer, calibrate_on)
        with console.status(Text(f"converting {base}")):
            if found is None:
                chosen = parse_layers(layers)
                model = MFNForCausalLM.from_base(
                    base, layers=chosen, calibration=calibration, base_kwargs=loading, **settings
                )
            else:  # other settings are those of the SAEs, unless the command names them
                named = {name: value for name, value in settings.items() if is_given(context, name)}
                model = MFNForCausalLM.from_saes(
                    base, found, allow_other_site=allow_other_site, base_kwargs=loading, **named
                )
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
    config = model.config
    console.print(
        f"{output}: {len(config.layers)} MFN layers of {config.num_features} features, k {config.k}, "
        f"alpha {config.alpha:g}; at alpha 0 logits equal the base model's bit for bit"
    )


def is_given(context: typer.Context, name: str) -> bool:
    """Returns True if an option stands in the command."""
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


def _saes_of(folder: Path, base_config: Any, layers: str | list[int], calibrate_on: str | None) -> dict[int, Path]:
    """Finds the SAEs of the chosen layers in a folder."""
    from ..interop.sources import find_saes

    if calibrate_on is not None:
        raise ValueError(f"--calibrate-on is {calibrate_on}, and SAEs are trained already; leave it out with --saes")
    found = find_saes(folder, base_config)
    if isinstance(layers, str):
        return found
    if missing := sorted(set(layers) - set(found)):
        raise ValueError(f"{folder} has no SAE of block {missing[0]}; it has those of {sorted(found)}")
    return {layer: found[layer] for layer in layers}


def _calibration_inputs(base: str, tokenizer: Any, text: str) -> dict[str, Tensor]:
    """Returns the first windows of a text as inputs of the base model."""
    import torch
    from transformers import AutoConfig

    from ..data.text import load_text, pack

    positions = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", CALIBRATION_WINDOW)
    window = min(CALIBRATION_WINDOW, positions)
    rows = pack(load_text([text]), tokenizer, window)
    return {"input_ids": torch.tensor([row["input_ids"] for row in islice(rows, CALIBRATION_ROWS)])}


def _bytes_of_weights(base: str) -> int:
    """Bytes of the base model's weights in a local folder; 1 where they are not known."""
    return sum(file.stat().st_size for file in Path(base).glob("*.safetensors")) or 1
