"""The verb `mfn steer`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.text import Text

from ..data.tokens import checked_text
from ..model.feature_names import parse_feature
from ..utils.display import for_terminal, visible, visible_lines
from ..utils.files import write_whole
from .inputs import load_mfn, read_config, read_tokenizer
from .options import console

if TYPE_CHECKING:
    from ..features.atlas import FeatureAtlas
    from ..model.configuration_mfn import MFNConfig
    from ..model.interventions import Intervention

SETTING = re.compile(
    r"(?P<target>.+)=(?:(?P<kind>clamp|add|scale):(?P<number>[^@]+)|ablate)(?:@(?P<when>.*))?", re.DOTALL
)
"""Value of `--set`. A label may contain `=` and `@`."""
MAX_LISTED = 5
"""Features of a label, or labels of an atlas, that a message lists."""


def steer(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    interventions: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="FEATURE=clamp:VALUE, =add:VALUE, =scale:FACTOR or =ablate. Ending it with @FEATURE acts only where "
            "that feature fires. May be repeated. A label of the model's atlas stands for all its features; VALUE is "
            "then a multiple of each feature's typical activation.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named interventions saved in the model. Those of --set are applied after them.")
    ] = None,
    positions: Annotated[
        Literal["all", "prompt", "generated"] | None,
        typer.Option(help="Tokens to act on. Default: the preset's positions, else all."),
    ] = None,
    save_preset: Annotated[
        str | None, typer.Option(help="Name under which the interventions of --set are saved in the model's folder.")
    ] = None,
    active: Annotated[
        str | None,
        typer.Option(help="Preset of the folder that is active by default from now on; '' for none."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    sample: Annotated[bool, typer.Option("--sample", help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Seed of sampling.")] = 0,
) -> None:
    """Generate text with and without interventions on features.

    Example: mfn steer gpt2-mfn-trained "The weather is" --set L6/1234=clamp:4 --set L6/7=ablate@L5/3
    """
    from ..model.modes import unsteered

    if not interventions and preset is None and active is None:
        raise ValueError("there is nothing to steer with; give --set, --preset, --active or several of them")
    if save_preset and not interventions:
        raise ValueError("--save-preset saves the interventions of --set; there are none")
    changes = save_preset is not None or active is not None
    if changes and not Path(model).is_dir():
        raise ValueError(f"{model} is not a folder, in which --save-preset and --active could write")
    chosen = _read_settings(interventions or [], model)
    read_config(model)
    tokenizer = read_tokenizer(model)
    inputs = tokenizer(checked_text("prompt", prompt), return_tensors="pt")
    mfn = load_mfn(model)
    _check_length(inputs["input_ids"].shape[1], max_new_tokens, mfn.config)
    if save_preset is not None:
        mfn.save_preset(save_preset, chosen, positions or "all")
    if active is not None:
        mfn.config.active_preset = active or None
        preset = preset or (None if chosen else mfn.config.active_preset)
    settings = {"max_new_tokens": max_new_tokens, "do_sample": sample}
    with unsteered(mfn):
        with mfn.steer(preset or {}, positions), mfn.steer(chosen, positions):
            steered = _generate(mfn, tokenizer, inputs, seed, settings)
        _print_text("without", _generate(mfn, tokenizer, inputs, seed, settings))
    _print_text("steered", steered)
    if changes:
        write_whole(Path(model) / "config.json", mfn.config.to_json_string())


def _generate(model: Any, tokenizer: Any, inputs: Any, seed: int, settings: dict[str, Any]) -> str:
    """Returns the text after the prompt."""
    import torch

    torch.manual_seed(seed)
    tokens = model.generate(**inputs, **settings, pad_token_id=0)
    return tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def _print_text(title: str, text: str) -> None:
    console.rule(title, align="left")
    console.print(Text(visible_lines(text)), soft_wrap=True)


def _read_settings(settings: Iterable[str], model: str) -> dict[tuple[int, int], Intervention]:
    """Reads the values of `--set`. A feature named on its own keeps its own intervention, whatever its label."""
    named: dict[Any, Intervention] = {}
    labelled: dict[Any, Intervention] = {}
    for target, intervention in map(_parse, settings):
        feature = _feature(target)
        where, key = (labelled, target) if feature is None else (named, feature)
        if key in where:
            raise ValueError(f"'{visible(target)}' is set twice; give it one --set")
        where[key] = intervention
    return {**_by_label(labelled, model), **named} if labelled else named


def _by_label(labelled: dict[Any, Intervention], model: str) -> dict[tuple[int, int], Intervention]:
    """Finds the features of each label and prints their names. Reads the atlas and the config, but no weights."""
    from ..features.atlas.atlas import find_atlas
    from ..features.atlas.belonging import check_model

    atlas = find_atlas(model)
    if atlas is None:
        raise ValueError(
            f"'{visible(next(iter(labelled)))}' is not a feature such as L6/1234, and {model} has no atlas in which it "
            "could be a label; the command `mfn atlas` makes one"
        )
    config = read_config(model)
    check_model(atlas.metadata, config, model)
    for label in labelled:
        features = _features_of(atlas, label, config)
        more = f" and {len(features) - MAX_LISTED} more" if len(features) > MAX_LISTED else ""
        console.print(for_terminal(label), f"is {', '.join(features[:MAX_LISTED])}{more}", highlight=False)
    return atlas.steering(labelled, model=config)


def _features_of(atlas: FeatureAtlas, label: str, config: MFNConfig) -> list[str]:
    try:
        return atlas.group(label, config)
    except ValueError as error:
        counts = Counter(atlas.labels.shown().values())
        known = ", ".join(f"'{visible(text, 40)}'" for text, _ in counts.most_common(MAX_LISTED))
        raise ValueError(
            f"{error}; {f'the most common labels are {known}' if known else 'the atlas has no labels'}"
        ) from None


def _check_length(prompt: int, new: int, config: Any) -> None:
    if not prompt:
        raise ValueError("the prompt has no tokens, and the tokenizer adds none of its own; give a text to continue")
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None and prompt + new - 1 > limit:  # the last token is generated and never read
        raise ValueError(
            f"the prompt has {prompt} tokens and --max-new-tokens is {new}; the model reads at most {limit} in all: "
            "shorten the prompt or generate fewer"
        )


def _feature(target: str) -> tuple[int, int] | None:
    try:
        return parse_feature(target)
    except ValueError:
        return None


def _parse(text: str) -> tuple[str, Intervention]:
    """Returns the target of one `--set`, a feature or a label, and its intervention."""
    from ..model.interventions import Ablate, Add, Clamp, Scale

    match = SETTING.fullmatch(text)
    try:
        strength = [float(match["number"])] if match and match["number"] else []
    except ValueError:
        match = None
    if match is None:
        raise ValueError(
            f"'{visible(text)}' is not an intervention; write L6/1234=clamp:4, =add:2, =scale:0.5 or =ablate"
        )
    kind: Any = {"clamp": Clamp, "add": Add, "scale": Scale, None: Ablate}[match["kind"]]
    return match["target"], kind(*strength, when=match["when"])


__all__ = ["steer"]
