"""`explain`: from a predicted token to the features that moved it, and on to the tokens that raised these features."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from ...data.tokens import checked_text, token_texts
from ...model.checks import is_whole, shown
from ...model.families import family_of
from ...model.modes import frozen
from ...model.offloading import check_in_memory
from ...model.sparse_code import SparseCode
from ...model.twins import check_has_features
from ..atlas.belonging import check_model
from ..public_names import public_name
from .explanation import Explanation
from .gradients import Attributed, TracedText
from .records import AtlasEntry, ExampleText, FeatureAttribution, InputAttribution, LayerAttribution, Target

if TYPE_CHECKING:
    from ..atlas import FeatureAtlas

EXAMPLES_KEPT = 3
"""Examples of the atlas that an explanation keeps per feature."""


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
    """Traces a prediction to the features of each layer that moved its logit, and features to the tokens read.

    The explained number, the value, is the logit of `token` after the token at `position`, minus the number in
    `against`. Each layer accounts for the whole of it:

        value = baseline + sum over features and tokens of z * dvalue/dz + remainder

    z are the layer's activations. The gradient passes through all later layers with the features they have chosen. The
    baseline is the value measured with all of this layer's features ablated. The remainder is not 0, because the value
    is not linear in z. The strongest `verify` features are ablated one by one, for comparison with their attribution.
    The strongest `trace` features are accounted for in the same way by the embeddings of the tokens read. With
    `codes="update"` the value has such an account, too, because the stream begins with the embeddings. In a family that
    caps its logits, as Gemma 2 does, the value is made of logits before the cap.

    Interventions of the `steer` context around the call are part of what is explained. The model runs in its own
    precision. In half precision small ablations are rough; `model.float()` helps. Memory is that of one backward.

    Args:
        model: MFN causal LM with alpha above 0, or a PEFT model around one.
        tokenizer: The model's tokenizer, with its usual special tokens.
        text: Text that the model reads.
        position: Index of a token of the text, from the end if negative. The explained prediction is the one made after
            this token. Later tokens are not read. -1 explains how the text goes on.
        token: The explained token, as an id or as text that is one token; by default the likeliest.
        against: Number to subtract from the logit. `"mean"` is the mean logit of the vocabulary, since what raises all
            logits predicts nothing. A token, as an id or text, stands for its logit; `None` for 0.
        atlas: Atlas for labels and for places where features fire. Features that it lacks have no entry.
        method: `"gradient"` takes gradients at the model's activations, in one backward. `"integrated"` averages
            gradients over `steps` points of the straight path from the baseline (Sundararajan et al. 2017, midpoint
            rule). With enough points the remainder of the last MFN layer goes to 0. That of other layers goes to the
            jumps in the TopK of later layers.
        steps: Forward and backward passes per layer with `"integrated"`.
        top: Features listed per layer, the strongest first.
        trace: Listed features of all layers that are traced to the tokens read, with one backward each.
        verify: Listed features of all layers that are ablated, with one forward each.

    Returns:
        The explanation. Listed features have `ablation`, `inputs` and `atlas` where these were asked for.

    Raises:
        ValueError: At alpha 0, where the model reads no features. Also if the position or token does not exist, the
            text has no tokens or more than the model reads, logits are not finite, or the atlas is of another model.
    """
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    _check(model, method, steps=steps, top=top, trace=trace, verify=verify)
    if atlas is not None:
        check_model(atlas.metadata, model)
    ids = _read_tokens(model, tokenizer, text, position)
    with frozen(model):
        target, direction = _choose_target(model, tokenizer, ids, token, against)
        traced = TracedText(model, ids, direction, steps if method == "integrated" else None)
        codes, accounts = traced.by_feature()
        listed = [feature for layer in codes for feature in _strongest(layer, codes[layer], accounts[layer], top)]
        listed.sort(key=lambda feature: -abs(feature.attribution))
        ablations = [target.value - traced.value_without((f.layer, f.index)) for f in listed[:verify]]
        inputs = traced.by_input([(f.layer, f.index, f.position) for f in listed[:trace]])
        embeddings = traced.value_by_input() if model.config.codes == "update" else None
    listed = [
        replace(
            feature,
            ablation=ablations[rank] if rank < len(ablations) else None,
            inputs=_inputs(inputs[rank]) if rank < len(inputs) else None,
            atlas=None if atlas is None else _atlas_entry(atlas, feature.name),
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
        embeddings=None if embeddings is None else _inputs(embeddings),
        model=public_name(model.config.name_or_path),
    )


def _check(model: Any, method: str, **counts: int) -> None:
    check_has_features(model)
    if model.get_output_embeddings() is None:
        raise ValueError(f"{type(model).__name__} is not an MFN model with an LM head; give an MFNForCausalLM")
    check_in_memory(model, "explain")
    if model.config.alpha == 0:
        raise ValueError("alpha is 0: the model reads no features, so none moved a logit; use model.set_blend")
    if method not in ("gradient", "integrated"):
        raise ValueError(f'method is {method!r}; it must be "gradient" or "integrated"')
    for name, count in counts.items():
        least = 0 if name in ("trace", "verify") else 1
        if not is_whole(count) or count < least:
            raise ValueError(f"{name} is {shown(count)}; it must be a whole number, at least {least}")


def _read_tokens(model: Any, tokenizer: Any, text: str, position: int) -> Tensor:
    """Token ids (T,) up to and including the one at `position`."""
    ids = tokenizer(checked_text("text", text))["input_ids"]
    if not is_whole(position) or not -len(ids) <= position < len(ids):
        raise ValueError(
            f"position is {shown(position)}; the text has {len(ids)} tokens, counted from 0, or from -1 backwards"
        )
    ids = ids[: position % len(ids) + 1]
    most = getattr(model.config.text_config, "max_position_embeddings", None)
    if most is not None and len(ids) > most:
        raise ValueError(f"the text has {len(ids)} tokens up to the position; the model reads {most} at most")
    return torch.tensor(ids, device=model.get_input_embeddings().weight.device)


@torch.no_grad()
def _choose_target(
    model: Any, tokenizer: Any, ids: Tensor, token: int | str | None, against: int | str | None
) -> tuple[Target, Tensor]:
    """Target, and the direction (d,) whose product with the final hidden state is the target's value."""
    head = model.get_output_embeddings()
    embeddings = model.get_input_embeddings()(ids[None])
    hidden = model.base_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state[0, -1]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    config = model.config.text_config
    form = family_of(config).logits
    logits = form.of(head(hidden), config).to(wide)
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
    direction = direction * form.scale(config)
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
        ids = tokenizer(checked_text(name, token), add_special_tokens=False)["input_ids"]
        if len(ids) > 1:  # SentencePiece puts a space of its own before a text
            ids = [index for index, text in enumerate(token_texts(tokenizer)) if text == token] or ids
        if len(ids) != 1:
            pieces = ", ".join(repr(tokenizer.decode([index])) for index in ids)
            raise ValueError(
                f"{name} {token!r} is {len(ids)} tokens ({pieces}); give one token, or an id. "
                "Most tokens begin with a space"
            )
        return ids[0]
    if not is_whole(token) or not 0 <= token < vocabulary:
        raise ValueError(f"{name} is {shown(token)}; it must be a text, or a token's id from 0 to {vocabulary - 1}")
    return token


def _strongest(layer: int, code: SparseCode, account: Attributed, top: int) -> list[FeatureAttribution]:
    """Features of a layer with the largest absolute sums over tokens, the largest first."""
    places, pairs = (code.values != 0).nonzero(as_tuple=True)
    features, which = code.indices[places, pairs].unique(return_inverse=True)
    shares, activations = account.attributions[places, pairs], code.values[places, pairs]
    totals = shares.new_zeros(len(features)).index_add_(0, which, shares)
    found = []
    for number in totals.abs().topk(min(top, len(features))).indices.tolist():
        own = which == number
        found.append(
            FeatureAttribution(
                layer=layer,
                index=int(features[number]),
                positions=places[own].tolist(),
                activations=activations[own].tolist(),
                attributions=shares[own].tolist(),
            )
        )
    return found


def _inputs(account: Attributed) -> InputAttribution:
    return InputAttribution(account.attributions.tolist(), account.value, account.baseline, account.remainder)


def _atlas_entry(atlas: FeatureAtlas, name: str) -> AtlasEntry | None:
    """Facts that the atlas has about a feature; `None` if it lacks the feature."""
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
        examples=[
            ExampleText(example.tokens, example.activations, example.offset, example.source)
            for example in record.examples[:EXAMPLES_KEPT]
        ],
    )


__all__ = ["explain"]
