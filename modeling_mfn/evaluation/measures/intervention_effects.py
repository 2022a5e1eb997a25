"""What a small push along a direction says that a large one will do to a model, and what it does.

A push moves one feature's activation at one token, or the residual stream behind the MFN layer along another direction
by as much. Its effects are on the logits, the heads and the MLPs that come after, at this token and later ones.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ...data.windows import Windows
from ...model.families import family_of
from ...model.interventions import Add, Interventions
from ...model.mfn_layer import MFNLayer
from ...model.modeling_mfn import MFNForCausalLM
from ...model.sparse_code import SparseCode

STEP = 1e-6
"""Of the central difference, in activations of the feature. In float64 its error is some 1e-9 of the derivative, and
hardly ever does another feature cross TopK's edge on so short a way."""

Output = str | tuple[str, int]
"""`"logits"`, `("attention", block)` or `("MLP", block)`."""


class Site(NamedTuple):
    """A token in a text."""

    tokens: Tensor
    """(p + 1 + L,) the text to the last token that effects are looked for on."""
    position: int
    """p, at least 1."""


class Push(NamedTuple):
    """A direction behind an MFN layer. One that is no feature's has the norm of `feature`'s."""

    feature: int
    """Index."""
    direction: Tensor | None = None
    """(d,) of unit norm; `None` for the feature's own."""


class Response(NamedTuple):
    """What a push does to each output at L + 1 tokens, its own the first. n is the vocabulary for logits, which are
    centred; d for MLPs; and (heads, d / heads) for attention, before its output projection."""

    derivative: dict[Output, Tensor]
    """(L + 1, n), by the change in activations of the feature."""
    changes: dict[Output, Tensor]
    """(S, L + 1, n), at S sizes of the change."""
    replaced: Tensor
    """(S,) share of the features active at the token in later MFN layers that no longer are; NaN behind the last one.
    Where TopK chooses others the derivative, which takes the choice as it is, misses a jump."""


def sample_sites(windows: Windows, count: int, later: int, seed: int = 0) -> list[Site]:
    """Random tokens, each in another window as long as there are enough: behind the first quarter, and with at least
    `later` tokens to come. Padding is taken away.

    Raises:
        ValueError: if there is no window, or one is too short.
    """
    random = np.random.default_rng(seed)
    texts = [_text(window) for window in windows]
    if not texts:
        raise ValueError("windows are empty; interventions need a text")
    chosen = np.concatenate([random.permutation(len(texts)) for _ in range(-(-count // len(texts)))])[:count]
    sites = []
    for text in (texts[index] for index in chosen):
        first, last = max(1, len(text) // 4), len(text) - later - 1
        if last < first:
            raise ValueError(f"a window has {len(text)} tokens, too few for {later} tokens after an intervention")
        position = int(random.integers(first, last + 1))
        sites.append(Site(text[: position + later + 1], position))
    return sites


def least_window(later: int) -> int:
    """Tokens of the shortest window that `sample_sites` takes."""
    return next(length for length in itertools.count(later + 2) if max(1, length // 4) < length - later)


def _text(window: Mapping[str, Any]) -> Tensor:
    ids = torch.as_tensor(window["input_ids"], dtype=torch.long)
    return ids[torch.as_tensor(window["attention_mask"]).bool()] if "attention_mask" in window else ids


def exact_copy(model: MFNForCausalLM) -> MFNForCausalLM:
    """The model in float64 and evaluation mode, at alpha = 1; the model itself stays as it is."""
    twin: MFNForCausalLM = copy.deepcopy(model).double().eval().requires_grad_(False)
    twin.set_blend(1.0)
    twin.set_attn_implementation("sdpa")  # the eager one rounds its softmax to float32
    norm = family_of(model.config.text_config).norm
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if not norm.centred and hasattr(child, norm.epsilon):  # transformers' RMSNorm rounds its input to float32
                exact = nn.RMSNorm(len(child.weight), eps=getattr(child, norm.epsilon), dtype=child.weight.dtype)
                exact.weight = child.weight
                setattr(parent, name, exact)
    return twin


class Bench:
    """A model at a site. The text before it, which no push can change, is read once."""

    @torch.no_grad()
    def __init__(self, model: MFNForCausalLM, site: Site) -> None:
        """The model is an `exact_copy`."""
        self.model = model
        ids, here = site.tokens[None].to(model.device), site.position
        before = model.model(input_ids=ids[:, :here], use_cache=True, output_codes=True)
        assert before.codes is not None
        self.cache, self.codes_before = before.past_key_values, before.codes
        self.ids = ids[:, here:]
        self.here = torch.arange(here + 1)[None] == here
        self.baseline, self.codes = self._run([{}])
        """Output -> (1, L + 1, n), and layer -> code (1, L + 1, K)."""

    def activations(self, layer: int) -> dict[int, float]:
        """Features that are active at the site -> activation."""
        code = self.codes[layer]
        pairs = zip(code.indices[0, 0].tolist(), code.values[0, 0].tolist(), strict=True)
        return {index: value for index, value in pairs if value > 0}

    def seen_before(self, layer: int) -> list[int]:
        """Features that are active on some token before, but not at the site."""
        code = self.codes_before[layer]
        return sorted(set(code.indices[code.values > 0].tolist()) - set(self.activations(layer)))

    @torch.no_grad()
    def responses(self, layer: int, pushes: Sequence[Push], activation: float, changes: np.ndarray) -> list[Response]:
        """What pushes at a layer do, all in one forward. `changes` are in multiples of `activation`."""
        sizes = [STEP, -STEP, *changes.tolist()]
        rows: list[Interventions] = []
        vectors = self.ids.new_zeros(len(pushes) * len(sizes), self.model.config.hidden_size, dtype=self.model.dtype)
        for push in pushes:
            for size in sizes:
                if push.direction is None:
                    rows.append({(layer, push.feature): Add(size * activation)})
                else:
                    length = size * activation * _norm(self.model.mfn_layers[layer], push.feature)
                    vectors[len(rows)] = length * push.direction.to(vectors)
                    rows.append({})
        with moved(self.model.mfn_layers[layer], vectors):
            outputs, codes = self._run(rows)
        replaced = self._replaced(layer, codes).unflatten(0, (len(pushes), -1))[:, 2:]
        found = []
        for place in range(len(pushes)):
            of_push = {name: values.unflatten(0, (len(pushes), -1))[place] for name, values in outputs.items()}
            slopes = {name: (values[0] - values[1]) / (2 * STEP) for name, values in of_push.items()}
            moves = {name: values[2:] - self.baseline[name] for name, values in of_push.items()}
            found.append(Response(slopes, moves, replaced[place]))
        return found

    def _replaced(self, layer: int, codes: dict[int, SparseCode]) -> Tensor:
        """(B,) for rows of codes (B, L + 1, K)."""
        shares = [codes[layer].values.new_full((len(codes[layer].values),), torch.nan)]
        for later in (each for each in codes if each > layer):
            (before, active), (after, positive) = (
                (code.indices[:, 0], code.values[:, 0] > 0) for code in (self.codes[later], codes[later])
            )
            kept = ((before.unsqueeze(-1) == after.unsqueeze(1)) & positive.unsqueeze(1)).any(-1) & active
            shares.append(1 - kept.sum(-1) / active.sum())
        return torch.stack(shares).nanmean(0)

    @torch.no_grad()
    def _run(self, rows: list[Interventions]) -> tuple[dict[Output, Tensor], dict[int, SparseCode]]:
        cache = copy.deepcopy(self.cache)
        cache.batch_repeat_interleave(len(rows))
        ids = self.ids.expand(len(rows), -1)
        with recorded(self.model) as outputs, self.model.steer(rows, positions=self.here):
            out = self.model(input_ids=ids, past_key_values=cache, use_cache=True, output_codes=True)
        outputs["logits"] = out.logits - out.logits.mean(-1, keepdim=True)
        return outputs, out.codes


def readers(model: MFNForCausalLM, layer: int) -> list[Output]:
    """What comes after an MFN layer: the MLP of its own block, and attention and MLP of every later one."""
    later = range(layer + 1, model.config.num_hidden_layers)
    return [("MLP", layer), *((name, block) for block in later for name in ("attention", "MLP"))]


@contextmanager
def recorded(model: MFNForCausalLM) -> Iterator[dict[Output, Tensor]]:
    """Yields what heads and MLPs of all blocks give in the next forward: (B, T, heads, d / heads) and (B, T, d)."""
    outputs: dict[Output, Tensor] = {}
    config, family = model.config.text_config, family_of(model.config.text_config)
    handles = []
    for number, block in enumerate(getattr(model.model.backbone, family.blocks)):

        def keep_mlp(_: nn.Module, __: Any, output: Tensor, number: int = number) -> None:
            outputs["MLP", number] = output

        def keep_heads(_: nn.Module, arguments: tuple[Tensor, ...], number: int = number) -> None:
            outputs["attention", number] = arguments[0].unflatten(-1, (config.num_attention_heads, -1))

        handles.append(block.mlp.register_forward_hook(keep_mlp))
        projection = family.attention_of(block).get_submodule(family.attention_output)
        handles.append(projection.register_forward_pre_hook(keep_heads))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def moved(layer: MFNLayer, vectors: Tensor) -> Iterator[None]:
    """What an MFN layer gives for the first token of each row is moved by the row's vector (B, d), in the units in
    which features add: standardised ones where the layer standardises, and as far as alpha reaches."""

    def move(module: MFNLayer, arguments: tuple[Any, ...], output: Tensor) -> Tensor:
        std = module.standardise(arguments[0][:, 0]).std
        output = output.clone()
        output[:, 0] += module.config.alpha * vectors * (1 if std is None else std)
        return output

    handle = layer.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _norm(layer: MFNLayer, feature: int) -> float:
    return layer.rows_of(torch.tensor([feature])).decoder.values.norm().item()


__all__ = ["Bench", "Push", "Response", "Site", "exact_copy", "readers", "sample_sites"]
