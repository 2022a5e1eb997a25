"""The verb `mfn serve`."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from ..utils.display import for_terminal
from ..utils.extras import needs
from .inputs import read_config, read_tokenizer
from .options import console


def serve(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to listen at.")] = 8000,
    device: Annotated[str, typer.Option(help="Device of the model, such as cpu or cuda:0.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Precision of the model, such as bfloat16. Default: its own.")] = "auto",
) -> None:
    """Serve a model with the server of transformers, which has the API of OpenAI.

    A client chooses a preset with the name of the model: MODEL:PRESET.

    Example: mfn serve gpt2-mfn-trained --port 8000
    """
    check_packages()
    from .served_models import presets_by_name, run_server

    config = read_config(model)
    if read_tokenizer(model).chat_template is None:
        console.print("the tokenizer has no chat template, so that clients can use /v1/completions alone")
    for name in presets_by_name(model, config):
        console.print("serves", for_terminal(name), highlight=False)
    run_server(model, host=host, port=port, device=device, dtype=dtype)


def check_packages() -> None:
    """Raises `MissingExtra` if a package of the server is not installed."""
    with needs("serve"):
        for package in ("fastapi", "openai", "uvicorn"):
            import_module(package)


__all__ = ["serve"]
