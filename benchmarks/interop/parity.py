"""Codes and reconstructions of SAEs that go out to SAELens and sparsify, and come in from them, by both packages.

    python -m benchmarks.interop.parity

writes benchmarks/results/interop/parity.json. It needs SAELens and sparsify: `make test-peers` makes their environment.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
import typer
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import records
from modeling_mfn import MFNForCausalLM, Scale
from modeling_mfn.interop.export import export_saes
from modeling_mfn.interop.hooks import hook_point

TOKENS = 512
LAYER = 1
"""Block whose MFN layer is compared."""
Codes = tuple[Tensor, Tensor]
"""Dense codes (N, m) and reconstructions (N, d)."""


@dataclass(frozen=True)
class Case:
    """An SAE that crosses the border between two packages."""

    direction: str
    """`"out"` or `"in"`."""
    package: str
    name: str
    """Edit of the MFN model, or kind of the peer's SAE."""
    family: str = "gpt2"
    dtype: str = "float32"
    d: int = 32
    m: int = 96
    k: int = 8
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the MFN model, or of the peer's SAE."""

    @property
    def title(self) -> str:
        """Name of the case, unique."""
        return "-".join([self.direction, self.package, self.name, self.family, self.dtype, str(self.m), str(self.k)])


class Differences(NamedTuple):
    """Largest absolute differences, as shares of the largest absolute value."""

    codes: float
    reconstructions: float
    other_active_sets: int
    """Tokens with other active features."""


EDITS = (
    "plain",
    "pruned",
    "baked",
    "compacted",
    "compacted with encoders",
    "no decoder bias",
    "update",
    "shared decoder",
)
BEFORE_6 = {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True}
SAELENS_KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "topk, decoder bias on the input": {"apply_b_dec_to_input": True},
    "topk, layer_norm": {"normalize_activations": "layer_norm", "apply_b_dec_to_input": True},
    "topk, scaled by norms": {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": True},
    "topk, saved by a training": {"rescale_acts_by_decoder_norm": True, "normalize_activations": "layer_norm"},
    "topk, before version 6": BEFORE_6,
    "standard (ReLU), k = m": {"apply_b_dec_to_input": True},
    "jumprelu, thresholds 0": {},
}
CASES = [
    *(Case("out", "saelens", edit, family) for family in ("gpt2", "llama") for edit in EDITS),
    *(
        Case("out", "saelens", "plain", dtype=dtype, d=48, m=200, k=k)
        for dtype in ("bfloat16", "float16")
        for k in (1, 64)
    ),
    Case("out", "saelens", "plain", dtype="float64", d=48, m=200, k=64),
    Case("out", "saelens", "plain", d=768, m=16384, k=32),
    Case("out", "saelens", "input_norm none", settings={"input_norm": "none"}),
    *(Case("out", "sparsify", edit, settings={"input_norm": "none"}) for edit in EDITS),
    Case("out", "sparsify", "plain", "llama", "bfloat16", 48, 200, 64, {"input_norm": "none"}),
    Case("out", "sparsify", "plain", "llama", "float32", 64, 32, 1, {"input_norm": "none"}),
    *(Case("in", "saelens", kind, settings=settings) for kind, settings in SAELENS_KINDS.items()),
    Case("in", "saelens", "topk, layer_norm", "llama", "bfloat16", 48, 200, 64, SAELENS_KINDS["topk, layer_norm"]),
    Case("in", "saelens", "topk", "llama", "float64", 64, 32, 1),
    Case("in", "saelens", "topk, before version 6", "gpt2", "float32", 768, 16384, 32, BEFORE_6),
    Case("in", "sparsify", "topk"),
    Case("in", "sparsify", "topk", "llama", "float32", 48, 200, 64),
    Case("in", "sparsify", "topk", "llama", "bfloat16", 64, 32, 1),
]


def differences(case: Case, folder: Path) -> Differences:
    """Compares one case. Inputs have a mean, a few large entries, and lengths that differ between tokens."""
    torch.manual_seed(0)
    h = torch.randn(TOKENS, case.d) * torch.rand(TOKENS, 1).exp() * 4 + torch.randn(case.d)
    h[:, :2] *= 50
    layer, theirs = (_out if case.direction == "out" else _in)(case, folder)
    h = h.to(layer.encoder.weight.dtype)
    with torch.no_grad():
        code = layer.encode(h)
        own = code.to_dense(), layer.reconstruct(code, layer.standardise(h))
        other = theirs(h)
        if (
            layer.rows is not None and layer.rows.encoder_names is None
        ):  # pruned features compete; see docs/guides/saes.md
            other[0][:, layer.rows.pruned] = 0
    codes, reconstructions = (
        float((a.double() - b.double()).abs().max() / a.double().abs().max()) for a, b in zip(own, other, strict=True)
    )
    active = ((own[0] > 0) != (other[0] > 0)).any(-1)
    return Differences(codes, reconstructions, int(active.sum()))


def _base(case: Case) -> PreTrainedModel:
    torch.manual_seed(1)
    if case.family == "gpt2":
        sizes = {"n_embd": case.d, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, **sizes)).eval()
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 2, "max_position_embeddings": 32}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, hidden_size=case.d, intermediate_size=64, **heads)).eval()


def _out(case: Case, folder: Path) -> tuple[Any, Callable[[Tensor], Codes]]:
    """MFN layer of a case, and the function of the peer that has loaded it."""
    model = _edited(case).to(getattr(torch, case.dtype))
    place = export_saes(model, folder, case.package, [LAYER])[LAYER]  # type: ignore[arg-type]
    if case.dtype in ("bfloat16", "float16"):  # the weights are exact, and 16 bits are not computed in alike
        model.float()
    layer = model.mfn_layers[LAYER]
    dtype = str(layer.encoder.weight.dtype).removeprefix("torch.")
    return layer, _saelens(place, dtype) if case.package == "saelens" else _sparsify(place)


def _edited(case: Case) -> MFNForCausalLM:
    settings = {"num_features": case.m, "k": case.k, "codes": "update" if case.name == "update" else "stream"}
    settings |= {"decoder_bias": case.name != "no decoder bias", "shared_decoder": case.name == "shared decoder"}
    model = MFNForCausalLM.from_base(_base(case), **(settings | case.settings))
    with torch.no_grad():
        for layer in model.mfn_layers.values():
            for parameter in layer.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
            layer.normalise_directions()
    if case.name == "baked":
        model.bake({(LAYER, index): Scale(scale) for index, scale in enumerate((0.0, -0.5, 3.0))})
    if case.name in ("pruned", "compacted", "compacted with encoders", "shared decoder"):
        model.prune_features(LAYER, range(0, case.m, 5))
    if case.name.startswith("compacted"):
        model.compact(keep_competition=case.name == "compacted")
    return model


def _saelens(folder: Path, dtype: str) -> Callable[[Tensor], Codes]:
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder, dtype=dtype)
    return lambda h: (sae.encode(h), sae(h))


def _sparsify(folder: Path) -> Callable[[Tensor], Codes]:
    from sparsify import SparseCoder

    sae = SparseCoder.load_from_disk(folder)

    def codes(h: Tensor) -> Codes:
        out = sae.float()(h)
        return h.new_zeros(len(h), sae.num_latents).scatter(-1, out.latent_indices, out.latent_acts), out.sae_out

    return codes


def _in(case: Case, folder: Path) -> tuple[Any, Callable[[Tensor], Codes]]:
    """MFN layer made of a peer's SAE, and the function of the peer."""
    base = _base(case)
    point = hook_point(base.config, LAYER)
    if case.package == "saelens":
        place = folder / point.transformer_lens
        _save_saelens(case, place, point.transformer_lens)
        theirs = _saelens(place, "float64" if case.dtype == "float64" else "float32")
    else:
        place = folder / point.sparsify
        _save_sparsify(case, place)
        theirs = _sparsify(place)
    k = {} if case.name.startswith("topk") else {"k": case.m}
    model = MFNForCausalLM.from_saes(base.double() if case.dtype == "float64" else base, {LAYER: place}, **k)
    return model.mfn_layers[LAYER], theirs


def _save_saelens(case: Case, place: Path, hook: str) -> None:
    from sae_lens import SAE, TrainingSAE

    sizes = {"d_in": case.d, "d_sae": case.m, "dtype": case.dtype, "apply_b_dec_to_input": False}
    architecture = case.name.split()[0].rstrip(",")
    cfg = sizes | case.settings | {"architecture": architecture, "metadata": {"hook_name": hook}}
    cfg |= {"k": case.k} if architecture == "topk" else {}
    sae = (TrainingSAE if case.name.endswith("by a training") else SAE).from_dict(cfg)
    _randomise({name: each for name, each in sae.named_parameters() if name != "threshold"})
    if isinstance(sae, TrainingSAE):
        sae.save_inference_model(place)
        return
    sae.save_model(place)
    if case.name.endswith("before version 6"):
        older = sizes | case.settings | {"architecture": "standard", "hook_name": hook, "model_name": "gpt2-small"}
        older |= {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": case.k}, "dtype": f"torch.{case.dtype}"}
        (place / "cfg.json").write_text(json.dumps(older), encoding="utf-8")


def _save_sparsify(case: Case, place: Path) -> None:
    from sparsify import SparseCoder, SparseCoderConfig

    cfg = SparseCoderConfig(num_latents=case.m, k=case.k)
    sae = SparseCoder(case.d, cfg, dtype=getattr(torch, case.dtype))
    _randomise(dict(sae.named_parameters()))
    sae.save_to_disk(place)


@torch.no_grad()
def _randomise(parameters: dict[str, Tensor]) -> None:
    """Gives parameters random values. Directions get norms from 0.5 to 2."""
    for name, parameter in parameters.items():
        values = torch.randn(parameter.shape) / 4
        if name == "W_dec":
            values = torch.nn.functional.normalize(values, dim=-1) * (0.5 + 1.5 * torch.rand(len(values), 1))
        parameter.copy_(values)


def main() -> None:
    """Compares all cases and writes their differences."""
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            found.append(asdict(case) | differences(case, Path(folder))._asdict())
        print(case.title, found[-1]["codes"], found[-1]["reconstructions"], found[-1]["other_active_sets"])
    versions = {name: version(name) for name in ("sae-lens", "eai-sparsify", "torch", "transformers")}
    record = {"command": records.command_line("interop.parity"), "commit": records.COMMIT, "versions": versions}
    records.write_record(records.RESULTS / "interop" / "parity.json", record | {"tokens": TOKENS, "cases": found})


if __name__ == "__main__":
    typer.run(main)
