"""`explain`: from a predicted token to the features that moved it, to the tokens that raised those."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...model.modes import frozen
from ...model.sparse_code import SparseCode
from .explanation import Explanation
from .gradients import Attributed, TracedText
from .records import AtlasEntry, Example, FeatureAttribution, InputAttribution, LayerAttribution, Target

if TYPE_CHECKING:
    from ..atlas import FeatureAtlas
    from ..atlas.records import Example as AtlasExample

EXAMPLES = 3
"""Examples of the atlas that an explanation keeps of a feature."""


def explain(
    model: Any,
    tokenizer: Any,
    text: str,
    position: int = -1,
    *,
    token: int | str | None = None,
    against: int | str | None = "mean",
    atlas: FeatureAtlas | None = None,
    method: Literal["gradient", "integrated"] = "gradient",
    steps: int = 16,
    top: int = 10,
    trace: int = 10,
    verify: int = 10,
) -> Explanation:
    """Traces a prediction to the features that moved its logit in each layer, and those to the tokens that were read.

    What is explained is a number, the value: the logit of `token` after the token at `position`, less what it is held
    `against`. Each layer accounts for the whole of it:

        value = baseline + sum over features and tokens of z * dvalue/dz + remainder

    z are the layer's activations, the gradient is the whole one, through all later layers with the features they have
    chosen, and the baseline is the value measured with all of this layer's features ablated. The remainder is what is
    left: the value is no linear function of z. `verify` features are ablated one by one, to be held beside their
    attribution; `trace` features are accounted for in the same way by the embeddings of the tokens read.

    Steering that is in force holds here, too. The model runs as it is, in its own precision; in half precision expect
    small ablations to be rough, and give `model.float()` where that matters. Memory is that of one backward.

    Args:
        model: MFN causal LM with alpha above 0; or a PEFT model around one.
        tokenizer: its tokenizer, which adds special tokens as it always does.
        text: what the model reads.
        position: index of a token of the text, from the end if negative. What is explained is the prediction made
            there, of the token that comes after it: -1 for what would go on from the text. Later tokens are not read.
        token: the token explained, as an id or a text that is one token; by default the likeliest.
        against: `"mean"`, the mean logit of the vocabulary, since what is added to all logits predicts nothing; an id
            for the logit of another token; `None` for 0, so that the value is the logit itself.
        atlas: for labels and where features fire in the training text. Features that it lacks stay without.
        method: `"gradient"` takes gradients where the model is, in one backward. `"integrated"` averages them over
            `steps` points of the straight path from the baseline (Sundararajan et al. 2017, midpoint rule). With
            enough of them the remainder goes to 0 in the last MFN layer, and in others to what the TopK of later
            layers jumps by.
        steps: forward and backward passes for each layer with `"integrated"`.
        top: strongest features listed of each layer.
        trace: strongest features of all layers, of those listed, that are traced to the tokens read: a backward each.
        verify: those that are checked by ablation: a forward each.

    Returns:
        The explanation, of which each listed feature's `ablation`, `inputs` and `atlas` are set where they were asked.

    Raises:
        ValueError: at alpha 0, where the model reads no features; on a position or token that is not there; on a text
            without tokens or with more than the model takes; on logits that are not finite.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check(model, method, steps=steps, top=top, trace=trace, verify=verify)
    ids = _read_tokens(model, tokenizer, text, position)
    with frozen(model):
        target, direction = _aim(model, tokenizer, ids, token, against)
        traced = TracedText(model, ids, direction, steps if method == "integrated" else None)
        codes, accounts = traced.by_feature()
        listed = [feature for layer in codes for feature in _strongest(layer, codes[layer], accounts[layer], top)]
        listed.sort(key=lambda feature: -abs(feature.attribution))
        ablations = [target.value - traced.value_without((f.layer, f.index)) for f in listed[:verify]]
        inputs = traced.by_input([(f.layer, f.index, f.position) for f in listed[:trace]])
    listed = [
        replace(
            feature,
            ablation=ablations[rank] if rank < len(ablations) else None,
            inputs=_inputs(inputs[rank]) if rank < len(inputs) else None,
            atlas=None if atlas is None else _look_up(atlas, feature.name),
        )
        for rank, feature in enumerate(listed)
    ]
    return Explanation(
        target=target,
        tokens=[tokenizer.decode([index]) for index in ids.tolist()],
        token_ids=ids.tolist(),
        alpha=model.config.alpha,
        method=method,
        layers=[
            LayerAttribution(
                layer=layer,
                active=code.indices[code.values != 0].unique().numel(),
                by_token=accounts[layer].attributions.sum(-1).tolist(),
                baseline=accounts[layer].baseline,
                remainder=accounts[layer].remainder,
                features=[feature for feature in listed if feature.layer == layer],
            )
            for layer, code in codes.items()
        ],
    )


def _check(model: Any, method: str, **counts: int) -> None:
    if getattr(model.config, "model_type", None) != "mfn" or model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is no MFN model with an LM head; give an MFNForCausalLM")
    if model.config.alpha == 0:
        raise ValueError("alpha is 0: the model reads no features, so that none moved a logit; use model.set_blend")
    if method not in ("gradient", "integrated"):
        raise ValueError(f'method is {method!r}; it must be "gradient" or "integrated"')
    for name, count in counts.items():
        least = 0 if name in ("trace", "verify") else 1
        if isinstance(count, bool) or not isinstance(count, int) or count < least:
            raise ValueError(f"{name} is {count!r}; it must be a whole number, at least {least}")


def _read_tokens(model: Any, tokenizer: Any, text: str, position: int) -> Tensor:
    """(T,) ids up to and including the one at `position`."""
    ids = tokenizer(text)["input_ids"]
    if isinstance(position, bool) or not isinstance(position, int) or not -len(ids) <= position < len(ids):
        raise ValueError(
            f"position is {position!r}; the text has {len(ids)} tokens, counted from 0, or from -1 backwards"
        )
    ids = ids[: position % len(ids) + 1]
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    if most is not None and len(ids) > most:
        raise ValueError(f"{len(ids)} tokens are to be read; the model takes {most}")
    return torch.tensor(ids, device=model.get_input_embeddings().weight.device)


@torch.no_grad()
def _aim(
    model: Any, tokenizer: Any, ids: Tensor, token: int | str | None, against: int | str | None
) -> tuple[Target, Tensor]:
    """The target, and the direction (d,) whose product with the final hidden state is its value."""
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()(ids[None])
    hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    logits = head(hidden).to(wide)
    if not logits.isfinite().all():
        raise ValueError("the model's logits are not finite on this text; there is nothing to explain")
    chosen = int(logits.argmax()) if token is None else _token_id(tokenizer, token, len(logits), "token")
    other = None
    direction = head.weight[chosen].to(wide)
    if against == "mean":
        direction = direction - head.weight.mean(0, dtype=wide)
    elif against is not None:
        other = _token_id(tokenizer, against, len(logits), "against")
        direction = direction - head.weight[other].to(wide)
    target = Target(
        token_id=chosen,
        token=tokenizer.decode([chosen]),
        logit=logits[chosen].item(),
        probability=logits.softmax(-1)[chosen].item(),
        against="mean" if against == "mean" else None if other is None else "token",
        against_id=other,
        against_token=None if other is None else tokenizer.decode([other]),
        value=(hidden.to(wide) @ direction).item(),
    )
    return target, direction


def _token_id(tokenizer: Any, token: int | str, vocabulary: int, name: str) -> int:
    if isinstance(token, str):
        ids = tokenizer(token, add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([index])) for index in ids)
            raise ValueError(
                f"{name} {token!r} is {len(ids)} tokens ({pieces}); give one, or an id. Most tokens begin with a space"
            )
        return ids[0]
    if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
        raise ValueError(f"{name} is {token!r}; it must be a text, or a token's id from 0 to {vocabulary - 1}")
    return token


def _strongest(layer: int, code: SparseCode, account: Attributed, top: int) -> list[FeatureAttribution]:
    """The features with the largest absolute sums over tokens, largest first."""
    places, pairs = (code.values != 0).nonzero(as_tuple=True)
    features, which = code.indices[places, pairs].unique(return_inverse=True)
    shares, activations = account.attributions[places, pairs], code.values[places, pairs]
    totals = shares.new_zeros(len(features)).index_add_(0, which, shares)
    found = []
    for number in totals.abs().topk(min(top, len(features))).indices.tolist():
        mine = which == number
        found.append(
            FeatureAttribution(
                layer=layer,
                index=int(features[number]),
                positions=places[mine].tolist(),
                activations=activations[mine].tolist(),
                attributions=shares[mine].tolist(),
            )
        )
    return found


def _inputs(account: Attributed) -> InputAttribution:
    return InputAttribution(account.attributions.tolist(), account.value, account.baseline, account.remainder)


def _look_up(atlas: FeatureAtlas, name: str) -> AtlasEntry | None:
    """What the atlas has on a feature; `None` where it has nothing."""
    if name not in atlas:
        return None
    record = atlas[name]
    names = [source["name"] for source in atlas.metadata["data"]["sources"]]
    counts = {
        source: count
        for source, count in zip(names, record.source_counts, strict=True)
        if source is not None and count > 0
    }
    return AtlasEntry(
        label=record.label,
        firing_rate=record.firing_rate,
        sources=dict(sorted(counts.items(), key=lambda item: -item[1])),
        examples=[_example(example) for example in record.examples[:EXAMPLES]],
    )


def _example(example: AtlasExample) -> Example:
    return Example(example.tokens, example.activations, example.offset, example.source)


__all__ = ["explain"]
