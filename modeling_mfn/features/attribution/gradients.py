"""Gradients and ablations on one text, from which attributions and accounts are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.interventions import Ablate
from ...model.mfn_layer import MFNLayer
from ...model.mfn_pass import MFNPass
from ...model.sparse_code import SparseCode

ROWS_AT_ONCE = 8192
"""Rows of the embedding that are held in memory a second time."""


class Attributed(NamedTuple):
    """A value split into baseline + sum of attributions + remainder."""

    attributions: Tensor
    """Attributions, float64, on the CPU."""
    value: float
    baseline: float

    @property
    def remainder(self) -> float:
        """The value minus the baseline and all attributions."""
        return self.value - self.baseline - self.attributions.sum().item()


class TracedText:
    """A model on one text, with the value to explain: a linear function of the last token's final hidden state.

    Methods run with the interventions of the `steer` context around their call. The model runs in its own precision;
    the value and all sums are wider.
    """

    def __init__(self, model: Any, token_ids: Tensor, direction: Tensor, steps: int | None) -> None:
        """Embeds the text.

        Args:
            model: MFN model with an LM head, inside `frozen`.
            token_ids: (T,) tokens read.
            direction: (d,) vector whose product with the final hidden state is the value.
            steps: Points of the path over which gradients are averaged; `None` for the end of the path alone.
        """
        self.model = model
        self.direction = direction
        # midpoints, so that the ends, where norms are steepest, have no extra weight
        self.path = [1.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]
        table = model.get_input_embeddings()
        self.embeddings = table(token_ids[None])
        self.mean_embedding = _mean_row(table).to(self.embeddings)

    def run(self, embeddings: Tensor | None = None) -> tuple[Tensor, dict[int, SparseCode]]:
        """Runs the model; returns the value, and the code (1, T, K) of each layer."""
        embeddings = self.embeddings if embeddings is None else embeddings
        output = self.model.base_model(inputs_embeds=embeddings, output_codes=True, use_cache=False)
        return output.last_hidden_state[0, -1].to(self.direction) @ self.direction, output.codes

    @torch.no_grad()
    def value_without(self, feature: tuple[int, int]) -> float:
        """Value measured with one feature ablated on all tokens."""
        with self.model.steer({feature: Ablate()}):
            return self.run()[0].item()

    def by_feature(self) -> tuple[dict[int, SparseCode], dict[int, Attributed]]:
        """Code (T, K) of each layer, and an account of the value by its pairs (T, K)."""
        start = self.embeddings.clone().requires_grad_()
        value, codes = self.run(start)
        if self.path == [1.0]:
            found = torch.autograd.grad(value, [code.values for code in codes.values()])
            gradients = dict(zip(codes, found, strict=True))
        else:
            gradients = {layer: self._mean_gradient(layer, code) for layer, code in codes.items()}
        accounts = {}
        for layer, code in codes.items():
            attributions = (code.values.detach().double() * gradients[layer].double())[0].cpu()
            with torch.no_grad(), self._rescaled(layer, lambda values: values * 0):
                baseline = self.run()[0].item()
            accounts[layer] = Attributed(attributions, value.item(), baseline)
        plain = {
            layer: SparseCode(code.indices[0].cpu(), code.values[0].detach().cpu(), code.num_features)
            for layer, code in codes.items()
        }
        return plain, accounts

    def _mean_gradient(self, layer: int, code: SparseCode) -> Tensor:
        """Mean gradient (1, T, K) of the value for one layer's code, over the straight path from the empty code."""
        total = torch.zeros_like(code.values, dtype=torch.float64)
        for share in self.path:
            values = (share * code.values.detach()).requires_grad_()
            with self._rescaled(layer, lambda _, values=values: values):  # type: ignore[misc]
                total += torch.autograd.grad(self.run()[0], values)[0].double()
        return total / len(self.path)

    @contextmanager
    def _rescaled(self, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Replaces the activations of one layer's active features; what comes before the layer stays as it is."""

        def decode_again(module: MFNLayer, arguments: tuple[Tensor, MFNPass], _: Tensor) -> Tensor:
            h, mfn_pass = arguments
            assert mfn_pass.codes is not None
            code = mfn_pass.codes[layer]
            return module.output_of(code._replace(values=change(code.values)), h, mfn_pass)

        handle = self.model.mfn_layers[layer].register_forward_hook(decode_again)
        try:
            yield
        finally:
            handle.remove()

    def by_input(self, firings: Sequence[tuple[int, int, int]]) -> list[Attributed]:
        """Accounts of pre-activations W_e x + b_e by the embeddings of the tokens read, (T,).

        Codes of several rounds, and refined ones, have no pre-activation: there the accounts are of activations.

        At the baseline every token has the mean embedding of the vocabulary.

        Args:
            firings: (layer, index, position) of each pre-activation.
        """
        numbers = self._activations if self.model.config.codes_by_pursuit else self._pre_activations
        return self._by_embeddings(len(firings), partial(numbers, firings)) if firings else []

    def value_by_input(self) -> Attributed:
        """Account of the value by the embeddings of the tokens read, (T,), on all paths through the model."""
        return self._by_embeddings(1, lambda embeddings: [self.run(embeddings)[0]])[0]

    def _by_embeddings(self, count: int, numbers: Callable[[Tensor], list[Tensor]]) -> list[Attributed]:
        """Accounts of some numbers, which are functions of the embeddings (1, T, d)."""
        mean = self.mean_embedding.expand_as(self.embeddings)
        gradients = torch.zeros(count, *self.embeddings.shape[1:], dtype=torch.float64)
        for share in self.path:
            at = torch.lerp(mean, self.embeddings, share).requires_grad_()
            for number, value in enumerate(numbers(at)):
                (found,) = torch.autograd.grad(value, at, retain_graph=True)
                gradients[number] += found[0].double().cpu() / len(self.path)
        with torch.no_grad():
            values, baselines = numbers(self.embeddings), numbers(mean)
        difference = (self.embeddings.double() - mean.double())[0].cpu()
        return [
            Attributed((gradient * difference).sum(-1), value.item(), baseline.item())
            for gradient, value, baseline in zip(gradients, values, baselines, strict=True)
        ]

    def _activations(self, firings: Sequence[tuple[int, int, int]], embeddings: Tensor) -> list[Tensor]:
        """Activation of each (layer, index, position), on the given embeddings; 0 where it is not active."""
        codes = self.run(embeddings)[1]
        found = []
        for layer, index, position in firings:
            code = codes[layer]
            found.append((code.values[0, position] * (code.indices[0, position] == index)).sum())
        return found

    def _pre_activations(self, firings: Sequence[tuple[int, int, int]], embeddings: Tensor) -> list[Tensor]:
        """Pre-activation of each (layer, index, position), on the given embeddings."""
        inputs: dict[int, Tensor] = {}
        layers = self.model.mfn_layers

        def keep(module: MFNLayer, arguments: tuple[Tensor, MFNPass]) -> None:
            inputs[module.layer_index] = module.standardise(module.coded_part(*arguments)).x[0]

        handles = [layers[layer].register_forward_pre_hook(keep) for layer in {layer for layer, _, _ in firings}]
        try:
            self.run(embeddings)
        finally:
            for handle in handles:
                handle.remove()
        found = []
        for layer, index, position in firings:
            encoder, bias, _ = layers[layer].rows_of(torch.tensor([index]))
            wide = torch.promote_types(encoder.parameter.dtype, torch.float32)
            found.append((encoder.values.to(wide) @ inputs[layer][position].to(wide) + bias.values.to(wide)).squeeze(0))
        return found


def _mean_row(table: Any) -> Tensor:
    """Returns the mean (d,) of what an embedding gives for each token; some families scale their table's rows."""
    wide = torch.promote_types(table.weight.dtype, torch.float32)
    rows = torch.arange(len(table.weight), device=table.weight.device).split(ROWS_AT_ONCE)
    return torch.stack([table(each).sum(0, dtype=wide) for each in rows]).sum(0) / len(table.weight)


__all__ = ["Attributed", "TracedText"]
