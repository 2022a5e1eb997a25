"""Gradients and ablations on one text, which attributions and their accounts are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...model.interventions import Ablate
from ...model.mfn_layer import MFNLayer, MFNPass
from ...model.sparse_code import SparseCode


class Attributed(NamedTuple):
    """A value told as baseline + sum of attributions + remainder."""

    attributions: Tensor
    """float64, on the CPU."""
    value: float
    baseline: float

    @property
    def remainder(self) -> float:
        """What the attributions miss, or have too much."""
        return self.value - self.baseline - self.attributions.sum().item()


class TracedText:
    """A model on one text, and the value in question: a linear function of the last token's final hidden state.

    The steering that is in force when its methods are called holds for them. It all runs in the model's own precision,
    but the value and everything that is added up.
    """

    def __init__(self, model: Any, token_ids: Tensor, direction: Tensor, steps: int | None) -> None:
        """Args:
        model: an MFN model with an LM head, `frozen`.
        token_ids: (T,).
        direction: (d,) what the final hidden state is multiplied by.
        steps: points of the path along which gradients are averaged; `None` takes them where the model is.
        """
        self.model = model
        self.direction = direction
        # midpoints: the ends, where norms are steepest, count no more than the rest
        self.path = [1.0] if steps is None else [(step + 0.5) / steps for step in range(steps)]
        table = model.get_input_embeddings()
        self.embeddings = table(token_ids[None])
        wide = torch.promote_types(table.weight.dtype, torch.float32)
        self.mean_embedding = table.weight.mean(0, dtype=wide).to(self.embeddings)

    def run(self, embeddings: Tensor | None = None) -> tuple[Tensor, dict[int, SparseCode]]:
        """The value, and codes (1, T, K) of each layer."""
        embeddings = self.embeddings if embeddings is None else embeddings
        output = self.model.base_model(inputs_embeds=embeddings, output_codes=True, use_cache=False)
        return output.last_hidden_state[0, -1].to(self.direction) @ self.direction, output.codes

    @torch.no_grad()
    def value_without(self, feature: tuple[int, int]) -> float:
        """Measured, with one feature ablated on all tokens."""
        with self.model.steer({feature: Ablate()}):
            return self.run()[0].item()

    def by_feature(self) -> tuple[dict[int, SparseCode], dict[int, Attributed]]:
        """Codes (T, K) of each layer, and an account of the value by their pairs (T, K)."""
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
        plain = {layer: SparseCode(c.indices[0].cpu(), c.values[0].detach().cpu(), c.num_features)
                 for layer, c in codes.items()}  # fmt: skip
        return plain, accounts

    def _mean_gradient(self, layer: int, code: SparseCode) -> Tensor:
        """Of the value for one layer's code, over the straight path from the empty code to it; (1, T, K)."""
        total = torch.zeros_like(code.values, dtype=torch.float64)
        for share in self.path:
            values = (share * code.values.detach()).requires_grad_()
            with self._rescaled(layer, lambda _, values=values: values):  # type: ignore[misc]
                total += torch.autograd.grad(self.run()[0], values)[0].double()
        return total / len(self.path)

    @contextmanager
    def _rescaled(self, layer: int, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """One layer goes on with other values of its active features. What comes before it stays as it is."""

        def decode_again(module: MFNLayer, arguments: tuple[Tensor, MFNPass], _: Tensor) -> Tensor:
            h, mfn_pass = arguments
            assert mfn_pass.codes is not None
            code = mfn_pass.codes[layer]
            _, mean, std = module.standardise(h)
            h_hat = module.reconstruct(code._replace(values=change(code.values)), mean, std)
            return torch.lerp(h, h_hat.to(h.dtype), module.config.alpha)

        handle = self.model.mfn_layers[layer].register_forward_hook(decode_again)
        try:
            yield
        finally:
            handle.remove()

    def by_input(self, firings: Sequence[tuple[int, int, int]]) -> list[Attributed]:
        """For each (layer, index, position) an account of this feature's pre-activation W_e x + b_e there by the
        embeddings of the tokens read, (T,). At the baseline every token has the mean embedding of the vocabulary."""
        if not firings:
            return []
        mean = self.mean_embedding.expand_as(self.embeddings)
        gradients = torch.zeros(len(firings), *self.embeddings.shape[1:], dtype=torch.float64)
        for share in self.path:
            at = torch.lerp(mean, self.embeddings, share).requires_grad_()
            for number, pre_activation in enumerate(self._pre_activations(firings, at)):
                (found,) = torch.autograd.grad(pre_activation, at, retain_graph=True)
                gradients[number] += found[0].double().cpu() / len(self.path)
        with torch.no_grad():
            values = self._pre_activations(firings, self.embeddings)
            baselines = self._pre_activations(firings, mean)
        way = (self.embeddings.double() - mean.double())[0].cpu()
        return [
            Attributed((gradient * way).sum(-1), value.item(), baseline.item())
            for gradient, value, baseline in zip(gradients, values, baselines, strict=True)
        ]

    def _pre_activations(self, firings: Sequence[tuple[int, int, int]], embeddings: Tensor) -> list[Tensor]:
        """One number for each (layer, index, position)."""
        inputs: dict[int, Tensor] = {}
        layers = self.model.mfn_layers

        def keep(module: MFNLayer, arguments: tuple[Tensor, MFNPass]) -> None:
            inputs[module.layer_index] = module.standardise(arguments[0])[0][0]

        handles = [layers[layer].register_forward_pre_hook(keep) for layer in {layer for layer, _, _ in firings}]
        try:
            self.run(embeddings)
        finally:
            for handle in handles:
                handle.remove()
        found = []
        for layer, index, position in firings:
            (weight, (row,)), (bias, _), _ = layers[layer].rows_of(torch.tensor([index]))
            wide = torch.promote_types(weight.dtype, torch.float32)
            found.append(inputs[layer][position].to(wide) @ weight[row].to(wide) + bias[row].to(wide))
        return found


__all__ = [
    "Attributed",
    "TracedText",
]
