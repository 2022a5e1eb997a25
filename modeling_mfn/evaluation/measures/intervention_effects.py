"""Effects of an intervention at one token: its derivative, and the real change at several strengths.

A push moves the activation of one feature, or moves the residual stream behind its MFN layer along another direction by
the same length. Effects are recorded on logits, attention heads and MLPs, at this token and at later ones.
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
from ...features.harvest.directions import final_norm
from ...model.families import Norm, family_of
from ...model.interventions import Add, Interventions
from ...model.mfn_for_causal_lm import MFNForCausalLM
from ...model.mfn_layer import MFNLayer
from ...model.mfn_pass import MFNPass
from ...model.model_outputs import CACHE
from ...model.sparse_code import SparseCode

STEP = 1e-6
"""Step of the central difference, in activations of the feature.

In float64 its error is some 1e-9 of the derivative. A step this small hardly ever changes the choice of TopK.
"""

Output = str | tuple[str, int]
"""`"logits"`, `("attention", block)` or `("MLP", block)`."""


class Site(NamedTuple):
    """Token of a text at which to intervene."""

    tokens: Tensor
    """(p + 1 + L,) text up to the last token on which effects are recorded."""
    position: int
    """p, at least 1."""


class Push(NamedTuple):
    """Direction behind an MFN layer. A direction other than the feature's own is scaled to the norm of that."""

    feature: int
    """Index of the feature."""
    direction: Tensor | None = None
    """(d,) of unit norm, `None` for the feature's own direction."""


class Response(NamedTuple):
    """Effect of a push on each output at L + 1 tokens, of which its own is the first.

    The size n of an output is V for logits, which are centred, and d for MLPs. It is (heads, d / heads) for attention
    before its output projection.
    """

    derivative: dict[Output, Tensor]
    """(L + 1, n), per change in activations of the feature."""
    changes: dict[Output, Tensor]
    """(S, L + 1, n), real change at S strengths."""
    replaced: Tensor
    """(S,) share of the features active at the token in later MFN layers that no longer are.

    NaN behind the last MFN layer. Where TopK chooses other features, the derivative misses a jump: it takes the choice
    as fixed.
    """


def sample_sites(windows: Windows, count: int, later: int, seed: int = 0) -> list[Site]:
    """Draws random tokens, each from another window as long as there are enough windows.

    A token lies behind the first quarter of its window and has at least `later` tokens behind it. Padding is removed.

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
    """Length in tokens of the shortest window that [`sample_sites`] accepts."""
    return next(length for length in itertools.count(later + 2) if max(1, length // 4) < length - later)


def _text(window: Mapping[str, Any]) -> Tensor:
    ids = torch.as_tensor(window["input_ids"], dtype=torch.long)
    return ids[torch.as_tensor(window["attention_mask"]).bool()] if "attention_mask" in window else ids


def exact_copy(model: MFNForCausalLM) -> MFNForCausalLM:
    """Copies a model to float64, in evaluation mode and at alpha = 1."""
    twin: MFNForCausalLM = copy.deepcopy(model).double().eval().requires_grad_(False)
    twin.set_blend(1.0)
    twin.config.active_preset = None
    if twin.model.backbone._supports_sdpa:  # eager attention rounds its softmax to float32
        twin.set_attn_implementation("sdpa")
    twin.set_experts_implementation("eager")  # faster ones have no float64
    form, kind = family_of(model.config.text_config).norm, type(final_norm(twin))
    for parent in list(twin.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, kind) and kind is not nn.LayerNorm:  # transformers' own round their input to float32
                setattr(parent, name, _exact_norm(form, child))
    return twin


def _exact_norm(form: Norm, norm: nn.Module) -> nn.Module:
    """Norm of torch that computes what a norm of transformers does, in float64."""
    gain = form.gain_of(norm)
    d = norm.normalized_shape if gain is None else gain.shape
    of_torch = nn.LayerNorm if form.centred else nn.RMSNorm
    exact = of_torch(d, eps=form.epsilon_of(norm), elementwise_affine=gain is not None, dtype=torch.float64)
    if gain is not None:
        exact.weight = nn.Parameter(gain, requires_grad=False)
    return exact


class Bench:
    """A model at a site, ready for pushes. The text before the site is read once: no push can change it."""

    @torch.no_grad()
    def __init__(self, model: MFNForCausalLM, site: Site) -> None:
        """Reads the text of a site with a model that [`exact_copy`] made."""
        self.model = model
        ids, here = site.tokens[None].to(model.device), site.position
        before = model.model(input_ids=ids[:, :here], use_cache=True, output_codes=True)
        assert before.codes is not None
        self.cache, self.codes_before = before[CACHE], before.codes
        self.ids = ids[:, here:]
        self.here = torch.arange(here + 1)[None] == here
        self.baseline, self.codes = self._run([{}])
        """Outputs (1, L + 1, n) and codes by layer (1, L + 1, K) without a push."""

    def activations(self, layer: int) -> dict[int, float]:
        """Returns the activations of features that are active at the site."""
        code = self.codes[layer]
        pairs = zip(code.indices[0, 0].tolist(), code.values[0, 0].tolist(), strict=True)
        return {index: value for index, value in pairs if value > 0}

    def seen_before(self, layer: int) -> list[int]:
        """Returns features that are active on some earlier token but not at the site."""
        code = self.codes_before[layer]
        return sorted(set(code.indices[code.values > 0].tolist()) - set(self.activations(layer)))

    @torch.no_grad()
    def responses(self, layer: int, pushes: Sequence[Push], activation: float, changes: np.ndarray) -> list[Response]:
        """Runs pushes at one layer in a single forward.

        Args:
            layer: block index.
            pushes: pushes to compare.
            activation: activation that changes are multiples of.
            changes: (S,) strengths.
        """
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
        """(B,) see `Response.replaced`, for codes (B, L + 1, K)."""
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
    """Returns the outputs that read an MFN layer: the MLP of its block, and attention and MLP of every later block.

    Where attention reads the same stream as the MLP of its block, and this is the layer's output, it is one more.
    """
    config, later = model.config.text_config, range(layer + 1, model.config.num_hidden_layers)
    is_read = family_of(config).is_parallel(config) and model.config.blend_into == "residual"
    beside: list[Output] = [("attention", layer)] if is_read else []
    return [*beside, ("MLP", layer), *((name, block) for block in later for name in ("attention", "MLP"))]


@contextmanager
def recorded(model: MFNForCausalLM) -> Iterator[dict[Output, Tensor]]:
    """Records the outputs of heads (B, T, heads, d / heads) and of MLPs (B, T, d) in the next forward."""
    outputs: dict[Output, Tensor] = {}
    config, family = model.config.text_config, family_of(model.config.text_config)
    handles = []
    for number, block in enumerate(getattr(model.model.backbone, family.blocks)):

        def keep_mlp(_: nn.Module, __: Any, output: Tensor, number: int = number) -> None:
            outputs["MLP", number] = output

        def keep_heads(_: nn.Module, arguments: tuple[Tensor, ...], number: int = number) -> None:
            outputs["attention", number] = arguments[0].unflatten(-1, (config.num_attention_heads, -1))

        handles.append(getattr(block, family.parts.mlp).register_forward_hook(keep_mlp))
        projection = family.attention_of(block).get_submodule(family.attention_output)
        handles.append(projection.register_forward_pre_hook(keep_heads))
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def moved(layer: MFNLayer, vectors: Tensor) -> Iterator[None]:
    """Moves the output of an MFN layer at the first token of each row by that row's vector (B, d).

    Vectors are in the units in which features add: standardised where the layer standardises, and scaled by alpha.
    """

    def move(module: MFNLayer, arguments: tuple[Tensor, MFNPass], output: Tensor) -> Tensor:
        std = module.standardise(module.coded_part(*arguments)[:, 0]).std
        output = output.clone()
        output[:, 0] += module.alpha * vectors * (1 if std is None else std)
        return output

    handle = layer.register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _norm(layer: MFNLayer, feature: int) -> float:
    return layer.rows_of(torch.tensor([feature])).decoder.values.norm().item()


__all__ = ["Bench", "Output", "Push", "Response", "Site", "exact_copy", "least_window", "readers", "sample_sites"]
