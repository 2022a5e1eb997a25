"""The command `mfn`, one verb a job."""

from __future__ import annotations

import sys
from itertools import islice
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.text import Text

from .atlas.command import atlas
from .display import visible_lines
from .evaluation.command import evaluate
from .steering_command import steer
from .training_command import train
from .whole_files import check_output, new_folder

app = typer.Typer(
    help="Transformers that read through named, sparse features.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
console = Console()

Overwrite = Annotated[bool, typer.Option(help="Replace an output folder that is not empty.")]
Layers = Annotated[str, typer.Option(help='Blocks that get an MFN layer: "all", or indices such as "6,7".')]


@app.callback()
def options(debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False) -> None:
    """Options of every verb; `main` reads --debug."""


@app.command()
def convert(
    base: Annotated[str, typer.Argument(help="Causal LM to convert: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for the MFN model.")],
    layers: Layers = "all",
    num_features: Annotated[int | None, typer.Option(help="Features of each MFN layer.")] = None,
    expansion_factor: Annotated[int | None, typer.Option(help="The same as a multiple of the hidden size.")] = None,
    k: Annotated[int, typer.Option(help="Most features active on a token.")] = 32,
    alpha: Annotated[float, typer.Option(help="Blend: 0 is the base model, 1 lets features alone through.")] = 0.0,
    blend_into: Annotated[Literal["residual", "mlp"], typer.Option(help="What the blend replaces.")] = "residual",
    input_norm: Annotated[Literal["layer", "none"], typer.Option(help="Standardise each token first?")] = "layer",
    decoder_bias: Annotated[bool, typer.Option(help="A learnt constant in the reconstruction.")] = True,
    shared_decoder: Annotated[bool, typer.Option(help="One decoder for all MFN layers.")] = False,
    calibrate_on: Annotated[
        str | None, typer.Option(help="Text to fit the fresh MFN layers to, as --text of train.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Precision: auto, float32, bfloat16 or float16.")] = "auto",
    overwrite: Overwrite = False,
) -> None:
    """Put MFN layers into a Llama or GPT-2 checkpoint.

    Example: mfn convert gpt2 gpt2-mfn --layers 6,7 --expansion-factor 8 --k 32
    """
    import torch
    from transformers import AutoConfig, AutoTokenizer

    from .data import load_text, pack
    from .modeling_mfn import MFNForCausalLM

    with new_folder(output, overwrite, source=base) as folder:
        calibration = None
        if calibrate_on is not None:
            positions = getattr(AutoConfig.from_pretrained(base), "max_position_embeddings", 128)
            rows = pack(load_text([calibrate_on]), AutoTokenizer.from_pretrained(base), min(128, positions))
            calibration = {"input_ids": torch.tensor([row["input_ids"] for row in islice(rows, 16)])}
        with console.status(f"converting {base}"):
            model = MFNForCausalLM.from_base(
                base,
                layers=_parse_layers(layers),
                num_features=num_features,
                expansion_factor=expansion_factor,
                k=k,
                alpha=alpha,
                blend_into=blend_into,
                input_norm=input_norm,
                decoder_bias=decoder_bias,
                shared_decoder=shared_decoder,
                calibration=calibration,
                base_kwargs={"dtype": dtype},
            )
            model.save_pretrained(folder)
            AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    config = model.config
    console.print(
        f"{output}: {len(config.layers)} MFN layers of {config.num_features} features, k {config.k}, "
        f"alpha {config.alpha:g}; logits at alpha 0 are the base model's to the bit"
    )


app.command()(train)
app.command()(steer)


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of an MFN model with its tokenizer.")],
    repo: Annotated[str, typer.Argument(help="Repository on the Hub, as owner/name; made if it is not there.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch to push to; made if it is not there.")] = None,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Id of the converted model on the Hub, for the card.")] = None,
) -> None:
    """Share a model on the Hub: weights, code, tokenizer, model card, and the atlas if there is one.

    Example: mfn push gpt2-mfn-trained me/gpt2-mfn --private
    """
    from .hub import push_folder

    had_card = (folder / "README.md").exists()
    commit = push_folder(
        folder, repo, private=private or None, revision=revision, commit_message=message, base_model=base_model
    )
    wrote_card = not had_card and (folder / "README.md").exists()
    card = "; its card is README.md, in that folder too; edit it on the Hub" if wrote_card else ""
    console.print(f"{folder} is at {commit.commit_url}{card}", highlight=False, markup=False, soft_wrap=True)


@app.command()
def explain(
    model: Annotated[str, typer.Argument(help="MFN model with alpha above 0: a folder, or an id on the Hub.")],
    text: Annotated[str, typer.Argument(help="Text that the model reads.")],
    position: Annotated[int, typer.Option(help="Token whose output is the prediction; -1 is the text's last.")] = -1,
    token: Annotated[str | None, typer.Option(help="Token to explain; by default the likeliest.")] = None,
    top: Annotated[int, typer.Option(help="Strongest features listed of each layer.")] = 10,
    output: Annotated[Path | None, typer.Option(help="Folder for JSON and figure.")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Trace a predicted token to the features that moved its logit, to the tokens that raised those, and, where the
    model's folder or repository has an atlas, to where they fire in the text that it was made from.

    Example: mfn explain gpt2-mfn-trained "The king and the" --token " queen" --output why-queen
    """
    from transformers import AutoTokenizer

    from .atlas.feature_atlas import find_atlas
    from .attribution import explain as explain_token
    from .modeling_mfn import MFNForCausalLM

    if output is not None:
        check_output(output, overwrite, source=model)
    mfn = MFNForCausalLM.from_pretrained(model)
    atlas = find_atlas(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with console.status("tracing"):
        explanation = explain_token(mfn, tokenizer, text, position, token=token, top=top, atlas=atlas)
    console.print(explanation.table())
    if output is not None:
        with new_folder(output, overwrite, source=model) as folder:
            explanation.save(folder)


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for the demo's model and figures.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(help="Of initialisation and data order.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Convert SmolLM2-135M, train its MFN layers for a few minutes, and use them.

    Example: mfn demo
    """
    from .demo import run

    with new_folder(output, overwrite) as folder:
        run(folder, seed, console)
    console.print(f"model and figures are in {output}")


app.command()(atlas)
app.command()(evaluate)


def _parse_layers(layers: str) -> str | list[int]:
    if layers == "all":
        return layers
    try:
        return [int(layer) for layer in layers.split(",")]
    except ValueError:
        raise ValueError(f'layers is {layers!r}; write "all" or block indices such as "6,7"') from None


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line. Bad input ends with one line and exit code 2; `--debug` shows where it came from."""
    arguments = sys.argv[1:] if arguments is None else arguments
    try:
        app(args=arguments)
    except (ValueError, OSError) as error:
        if "--debug" in arguments:
            raise
        Console(stderr=True).print(Text.assemble(("mfn:", "red"), " ", _one_line(error)), soft_wrap=True)
        sys.exit(2)


def _one_line(error: Exception) -> str:
    # it can quote what others wrote: names in a config, labels, files of a data set
    return visible_lines(" ".join(str(error).split()))


if __name__ == "__main__":
    main()
