"""The verb `mfn unwrap`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from ..model.version import __version__
from ..utils.files import check_space, new_folder
from ..utils.ours import UNWRAPPED
from .convert import is_given
from .evaluate import read_windows
from .inputs import load_mfn, read_config, read_tokenizer
from .options import Overwrite, console


def unwrap(
    context: typer.Context,
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    output: Annotated[Path, typer.Argument(help="Folder for the plain model.")],
    text: Annotated[
        list[str] | None,
        typer.Option(
            "--text",
            help="Held-out text, as in mfn train, on which to measure the loss of leaving the MFN layers out. May be "
            "repeated.",
        ),
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens to measure on, of each text.")] = 65_536,
    window: Annotated[int, typer.Option(min=2, help="Tokens per row.")] = 128,
    overwrite: Overwrite = False,
) -> None:
    """Save the backbone of an MFN model as a plain checkpoint of its own class, for tools that know no MFN layers.

    The plain model is the MFN model at alpha 0. A file unwrapped.json next to it names the MFN model's weights, and the
    perplexities of both.

    Example: mfn unwrap gpt2-mfn-trained gpt2-plain --text held-out.txt
    """
    from ..model.conversion import unwrap as plain_model

    texts = text or []
    if unused := [name for name in ("tokens", "window") if not texts and is_given(context, name)]:
        raise ValueError(f"--{unused[0]} is for --text; without a text, nothing is measured")
    config = read_config(model)
    tokenizer = read_tokenizer(model)
    with new_folder(output, overwrite, inputs=[model, *texts]) as folder:
        windows = {name: read_windows(name, tokenizer, window, tokens) for name in texts}
        mfn = load_mfn(model)
        with console.status(Text(f"unwrapping {model}")):
            base = plain_model(mfn, clone=False)
            check_space(folder, sum(each.nbytes for each in base.parameters()))
            rows = [_perplexities(mfn, base, name, held_out) for name, held_out in windows.items()]
            base.save_pretrained(folder)
            tokenizer.save_pretrained(folder)
            whence = {"modeling_mfn": __version__, "weights_digest": config.weights_digest, "alpha": config.alpha}
            record = json.dumps(whence | {"perplexity": rows}, indent=2)
            (folder / UNWRAPPED).write_text(record, encoding="utf-8")
    kind = type(base).__name__
    console.print(f"{output}: {kind}; its logits equal the MFN model's at alpha 0 bit for bit", highlight=False)
    for row in rows:
        console.print(
            f"perplexity on {row['data']}: {row['mfn']:g} with MFN layers at alpha {config.alpha:g}, "
            f"{row['plain']:g} without them",
            highlight=False,
        )
    if not rows:
        console.print("the loss of leaving the MFN layers out was not measured; --text measures it", highlight=False)


def _perplexities(mfn: Any, base: Any, text: str, windows: Any) -> dict[str, Any]:
    """Measures both models on one text."""
    from ..evaluation.measures.perplexity import perplexity

    length = len(windows[0]["input_ids"])
    return {
        "data": f"{Path(text).name}, {len(windows)} windows of {length} tokens",
        "mfn": round(perplexity(mfn, windows), 3),
        "plain": round(perplexity(base, windows), 3),
    }
