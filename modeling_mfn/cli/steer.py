"""The verb `mfn steer`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.text import Text

from ..model.feature_names import parse_feature
from ..utils.display import for_terminal, visible, visible_lines

if TYPE_CHECKING:
    from ..features.atlas import FeatureAtlas
    from ..model.configuration_mfn import MFNConfig
    from ..model.interventions import Intervention

SETTING = re.compile(
    r"(?P<target>.+)=(?:(?P<kind>clamp|add|scale):(?P<number>[^@]+)|ablate)(?:@(?P<when>.*))?", re.DOTALL
)
"""What `--set` takes. A label can have a `=` or an `@` of its own."""
SHOWN = 5
"""Features of a label, or labels of an atlas, that are listed."""


def steer(
    model: Annotated[str, typer.Argument(help="MFN model: a folder, or an id on the Hub.")],
    prompt: Annotated[str, typer.Argument(help="Text to go on from.")],
    interventions: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="FEATURE=clamp:VALUE, =add:VALUE, =scale:FACTOR or =ablate; with @FEATURE at its end, where that "
            "feature fires; may be repeated. A label of the model's atlas stands for all its features, and VALUE is "
            "then a multiple of each one's typical activation.",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Interventions that the model has under a name; those of --set act after them.")
    ] = None,
    positions: Annotated[
        Literal["all", "prompt", "generated"] | None,
        typer.Option(help="Tokens that are acted on; by default all, or the preset's own."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate.")] = 40,
    sample: Annotated[bool, typer.Option(help="Sample instead of taking the likeliest token.")] = False,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
) -> None:
    """Generate with and without interventions on features.

    Example: mfn steer gpt2-mfn-trained "The weather is" --set L6/1234=clamp:4 --set L6/7=ablate@L5/3
    """
    import torch
    from transformers import AutoTokenizer

    from ..model.modeling_mfn import MFNForCausalLM

    if not interventions and preset is None:
        raise ValueError("there is nothing to steer with; give --set, --preset or both")
    console = Console()
    chosen = _by_feature(interventions or [], model, console)
    tokenizer = AutoTokenizer.from_pretrained(model)
    inputs = tokenizer(prompt, return_tensors="pt")
    length = inputs["input_ids"].shape[1]
    if not length:
        raise ValueError("the prompt has no tokens, and the tokenizer adds none of its own; give a text to go on from")
    mfn = MFNForCausalLM.from_pretrained(model)
    _check_length(length, max_new_tokens, mfn.config)

    def generate() -> str:
        torch.manual_seed(seed)
        tokens = mfn.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=sample, pad_token_id=0)
        return tokenizer.decode(tokens[0, length:], skip_special_tokens=True)

    with mfn.steer(preset or {}, positions), mfn.steer(chosen, positions):
        if mfn.config.alpha == 0:
            console.print("[yellow]alpha is 0: the model reads no feature, so that steering has no effect")
        steered = generate()
    for title, text in (("without", generate()), ("steered", steered)):
        console.rule(title, align="left")
        console.print(Text(visible_lines(text)), soft_wrap=True)


def _by_feature(settings: Iterable[str], model: str, console: Console) -> dict[tuple[int, int], Intervention]:
    """What `--set` asks for. A feature that is named by itself gets its own, whatever its label."""
    named: dict[Any, Intervention] = {}
    labelled: dict[Any, Intervention] = {}
    for target, intervention in map(_parse, settings):
        feature = _feature(target)
        where, key = (labelled, target) if feature is None else (named, feature)
        if key in where:
            raise ValueError(f"'{visible(target)}' is set twice; give it one --set")
        where[key] = intervention
    return {**_by_label(labelled, model, console), **named} if labelled else named


def _by_label(labelled: dict[Any, Intervention], model: str, console: Console) -> dict[tuple[int, int], Intervention]:
    """The same on the features of each label, whose names are shown. It needs the atlas and the config, no weights."""
    from ..features.atlas.atlas import find_atlas
    from ..model.configuration_mfn import MFNConfig

    atlas = find_atlas(model)
    if atlas is None:
        raise ValueError(
            f"'{visible(next(iter(labelled)))}' names no feature, such as L6/1234 does, and {model} has no atlas in "
            "which it could be a label; the command `mfn atlas` makes one"
        )
    config = MFNConfig.from_pretrained(model)
    for label in labelled:
        features = _features_of(atlas, label, config)
        more = f" and {len(features) - SHOWN} more" if len(features) > SHOWN else ""
        console.print(for_terminal(label), f"is {', '.join(features[:SHOWN])}{more}", highlight=False)
    return atlas.steering(labelled, model=config)


def _features_of(atlas: FeatureAtlas, label: str, config: MFNConfig) -> list[str]:
    try:
        return atlas.group(label, config)
    except ValueError as error:
        counts = Counter(atlas.labels.shown().values())
        known = ", ".join(f"'{visible(text, 40)}'" for text, _ in counts.most_common(SHOWN))
        raise ValueError(
            f"{error}; {f'the most common labels are {known}' if known else 'the atlas has no labels'}"
        ) from None


def _check_length(prompt: int, new: int, config: Any) -> None:
    limit = getattr(config.text_config, "max_position_embeddings", None)
    if limit is not None and prompt + new - 1 > limit:  # the last token is generated, and never read
        raise ValueError(
            f"the prompt has {prompt} tokens and {new} are to follow; the model reads {limit} at most: shorten the "
            "prompt, or give a smaller --max-new-tokens"
        )


def _feature(target: str) -> tuple[int, int] | None:
    try:
        return parse_feature(target)
    except ValueError:
        return None


def _parse(text: str) -> tuple[str, Intervention]:
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
