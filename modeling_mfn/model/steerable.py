"""Steering as users call it on a model: contexts, presets, and interventions written into the weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from contextlib import AbstractContextManager, ContextDecorator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.utils import logging

from .checks import shown
from .configuration_mfn import MFNConfig
from .feature_names import format_feature, parse_feature
from .features_digest import keeps_features
from .interventions import CheckedInterventions, Interventions, check_interventions
from .mfn_layer import MFNLayer
from .presets import POSITIONS, Preset, check_name, make_preset, read_presets, without_pruned, write_preset
from .steering import ActivePreset, Context, Positions, check_range, is_steered, steering

logger = logging.get_logger(__name__)


class SteeringContext(ContextDecorator, AbstractContextManager[None]):
    """Context of `model.steer`. It is entered once; as a decorator it serves every call."""

    def __init__(self, model: Any, context: Context) -> None:
        self._given = model, context
        self._inner: AbstractContextManager[None] | None = None
        self._thread = 0

    def _recreate_cm(self) -> SteeringContext:  # of contextlib: the context of each call of a decorated function
        return SteeringContext(*self._given)

    def __enter__(self) -> None:
        """Puts the interventions in force; `ValueError` if the context was entered before."""
        if self._inner is not None:
            raise ValueError("this context was entered before; call model.steer(...) anew for each `with`")
        self._inner, self._thread = steering(*self._given), threading.get_ident()
        self._inner.__enter__()

    def __exit__(self, *error: Any) -> None:
        """Takes the interventions back; `ValueError` in another thread than that in which they were put in force."""
        if self._inner is None or self._thread != threading.get_ident():
            raise ValueError("this context was not entered in this thread; leave it where it was entered")
        self._inner.__exit__(*error)


class SteerableModel:
    """Methods of an MFN model that steer its features."""

    config: MFNConfig
    active_preset: ActivePreset | None = None
    """Preset of `config.active_preset`, as it was last worked out."""

    def active_context(self: Any) -> Context:
        """Returns the preset that is active by default, as a context of `steer`."""
        preset = self._preset(self.config.active_preset)
        checked = self._checked(preset.interventions)
        self._warn_of_no_effect(sorted({layer for layer, _ in checked}))
        return Context((checked,), preset.positions)

    def steer(
        self: Any,
        interventions: Interventions | Sequence[Interventions] | str,
        positions: Positions | None = None,
    ) -> SteeringContext:
        """Returns a context in which the model runs with interventions on its features, `generate` included:

            with model.steer({(6, 1234): Clamp(4.0), "L6/7": Ablate()}):
                model.generate(...)
            with model.steer({"L6/1234": {"kind": "clamp", "value": 4.0}, "L6/7": {"kind": "ablate"}}):  # the same
                model.generate(...)

        The context holds for the thread or the asyncio task that enters it, and for tasks and `asyncio.to_thread` calls
        that begin inside. A compiled model follows one task per thread, and only contexts that its thread enters; where
        it could overlook one, it raises. Contexts nest: an inner intervention acts on
        the outer one's result. An intervention has alpha times the effect that it has at alpha = 1.

        Args:
            interventions: feature -> `Clamp`, `Scale`, `Add` or `Ablate`; or the same as JSON, which needs no import:
                `"kind"`, `"value"` (for scale `"factor"`), and for a condition `"when"` and `"above"`; or the name of a
                preset; or a list of mappings, one per row of the batch. n mappings share a batch of B rows in order,
                B / n rows each, as `generate` repeats rows for beams and for `num_return_sequences`.
            positions: tokens that are acted on. `"all"` is the default unless a preset has its own. `"prompt"` means
                the tokens that `generate` was given, or every token outside of `generate`. `"generated"` means the
                tokens that `generate` adds, once they are read. A boolean mask (B, T) is True where a token of the
                prompt is acted on, counted from its beginning with padding; later tokens are left alone. A mask may
                have one row for all, and shares a batch as mappings do.

        Raises:
            ValueError: if a layer has no MFN layer, a feature or preset does not exist, a feature is pruned, or an
                argument is not an intervention; in a forward, if the batch cannot be shared by the mappings or by the
                mask's rows. A preset goes on without features that were pruned since, with a warning, unless nothing
                is left.
        """
        where: Any = positions
        if isinstance(interventions, str):
            preset = self._preset(interventions)
            interventions, where = preset.interventions, preset.positions if positions is None else positions
        rows = interventions if isinstance(interventions, (list, tuple)) else [interventions]
        if not rows:
            raise ValueError("interventions is an empty list; give a mapping for each row, {} for none")
        context = Context(tuple(self._checked(row) for row in rows), _check_positions(where))
        self._warn_of_no_effect(sorted({layer for row in context.rows for layer, _ in row}))
        return SteeringContext(self.base_model, context)

    def _warn_of_no_effect(self: Any, layers: Sequence[int]) -> None:
        """Warns if steering these layers has no effect, or none that anybody meant."""
        if layers and self.config.alpha == 0:
            logger.warning_once("alpha is 0: the model reads no feature, so steering has no effect")
        for layer in layers:
            bias = self.mfn_layers[layer].encoder.bias.data
            if type(bias) is Tensor and not bias.is_meta and not bias.any():  # else spread over devices or offloaded
                logger.warning_once(
                    f"the MFN layer of block {layer} was never calibrated or trained: its features are random"
                )

    def init_continuous_batching(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Makes transformers' manager of continuous batches, which `generate_batch` uses, too.

        Raises:
            ValueError: in a context of `steer`, which would not reach the manager's thread, or if the preset that is
                active by default acts on some tokens alone.
        """
        if self.config.active_preset is not None and self.active_context().positions != "all":
            raise ValueError(
                f"active_preset is {self.config.active_preset!r}, which acts on the tokens of the prompt or of the "
                "answer alone; continuous batching cannot tell them apart"
            )
        if is_steered(self.base_model):
            raise ValueError(
                "continuous batching generates in a thread of its own, which the context of steer does not reach; use "
                "generate, or bake the interventions into the weights"
            )
        return super().init_continuous_batching(*args, **kwargs)  # type: ignore[misc]

    @property
    def presets(self) -> dict[str, Preset]:
        """Named interventions that travel in the config; `save_preset` and `delete_preset` change them.

        Interventions on features that were pruned since, or that wait for one, are left out.
        """
        pruned = self.config.pruned_features
        return {name: without_pruned(preset, pruned)[0] for name, preset in self._written_presets().items()}

    def save_preset(self, name: str, interventions: Interventions, positions: str = "all") -> None:
        """Saves interventions under a name in the config, as plain JSON, for `model.steer(name)`.

        They travel with the config: `save_pretrained`, `push_to_hub`. They take the forms that `steer` takes.

        Raises:
            ValueError: if the preset exists already, if a feature does not exist or is pruned, or if the interventions
                cannot be kept: a list for rows, or a mask, belongs to one batch.
        """
        check_name(name)
        if name in self.config.steering_presets:
            raise ValueError(f"there is a preset {name!r} already; delete_preset it first")
        preset = make_preset(interventions, positions, self.config.layers, self.config.num_features)
        self._checked(preset.interventions)
        before = self.config.steering_presets
        self.config.steering_presets = {**before, name: write_preset(preset)}
        if json.loads(self.config.to_json_string())["steering_presets"] != self.config.steering_presets:
            self.config.steering_presets = before
            raise ValueError(f"configs of transformers do not keep the name {name!r}; choose another for the preset")

    def delete_preset(self, name: str) -> None:
        """Deletes a preset; `ValueError` if there is no preset of this name, or if it is active by default."""
        self._written_preset(name)
        self.config.steering_presets = {k: v for k, v in self.config.steering_presets.items() if k != name}

    @keeps_features
    def bake(self: Any, interventions: Interventions | str) -> None:
        """Writes interventions into the weights. They take the forms that `steer` takes.

        Without steering, the model then gives the logits that it gave steered, at every alpha. `save_pretrained` makes
        an ordinary checkpoint of it.

        z_f <- s z_f + c becomes a decoder row s D_f and a decoder bias b + c D_f. The encoder stays: the feature
        competes for its place in TopK as before, and `output_codes` shows the encoder's z_f, not s z_f + c.
        `config.direction_norms` records the rows' new norms. `MFNTrainer` keeps these norms, so an ablated feature
        stays ablated; training may make up for it elsewhere.

        Raises:
            ValueError: on interventions that weights cannot hold, before anything is changed: conditions, lists for
                rows, positions other than `"all"`, a shared decoder, `coding_rounds` above 1 or `refine_steps` above 0,
                `Clamp` or `Add` without a decoder bias.
        """
        positions: str = "all"
        preset = interventions if isinstance(interventions, str) else None
        if isinstance(interventions, str):
            interventions, positions = self._preset(interventions)
        if positions != "all":
            raise ValueError(f"positions are {shown(positions)}; weights act on every token alike")
        checked = self._checked(interventions)
        _bake(self.mfn_layers, checked)
        norms = dict(self.config.direction_norms)
        for (layer, index), intervention in checked.items():
            name, (scale, _) = format_feature(layer, index), intervention.coefficients
            norms[name] = abs(scale) * norms.get(name, 1.0)
        self.config.direction_norms = {feature: norm for feature, norm in norms.items() if norm != 1}
        if preset is not None and preset == self.config.active_preset:
            self.config.active_preset = None  # the weights have it now

    def _checked(self: Any, interventions: Any) -> CheckedInterventions:
        checked = check_interventions(interventions, self.config.layers, self.config.num_features)
        for feature, intervention in checked.items():
            check_range(feature, intervention, self.dtype)
            for layer, index in (feature, *([] if intervention.when is None else [parse_feature(intervention.when)])):
                self.config.check_feature((layer, index))
        return checked

    def _preset(self, name: str) -> Preset:
        """Returns a preset without the features that were pruned since, which a warning names."""
        preset, lost = without_pruned(self._written_preset(name), self.config.pruned_features)
        why = f"what it does to {', '.join(map(str, lost))} needs features that are pruned"
        if lost and not preset.interventions:
            raise ValueError(f"preset {name!r} has nothing left: {why}; delete_preset it, or save another")
        if lost:
            logger.warning_once(f"preset {name!r} goes on with the rest: {why}")
        return preset

    def _written_presets(self) -> dict[str, Preset]:
        return read_presets(self.config.steering_presets, self.config.layers, self.config.num_features)

    def _written_preset(self, name: str) -> Preset:
        presets = self._written_presets()
        if not isinstance(name, str) or name not in presets:
            raise ValueError(f"there is no preset {shown(name)}; this model has {', '.join(sorted(presets)) or 'none'}")
        return presets[name]


def _check_positions(positions: Any) -> Any:
    """Returns the positions, `"all"` for None; `ValueError` if they are neither a known name nor a mask."""
    if isinstance(positions, torch.Tensor):
        if positions.dtype != torch.bool or positions.ndim != 2 or not positions.numel():
            raise ValueError(
                f"positions is a {positions.dtype} tensor of shape {tuple(positions.shape)}; a mask is boolean, (B, T)"
            )
        return positions
    if positions is None:
        return "all"
    if not isinstance(positions, str) or positions not in POSITIONS:
        raise ValueError(f"positions is {shown(positions)}; it must be {', '.join(POSITIONS)} or a mask (B, T)")
    return positions


@torch.no_grad()
def _bake(layers: dict[int, MFNLayer], interventions: CheckedInterventions) -> None:
    """Writes interventions into decoders: z_f <- s z_f + c becomes D_f <- s D_f and b <- b + c D_f.

    Raises:
        ValueError: if the weights cannot hold an intervention; then none has changed.
    """
    for (layer, index), intervention in interventions.items():
        if intervention.when is not None:
            raise ValueError(f"{intervention!r} on L{layer}/{index} has a condition; weights act on every token alike")
    by_layer: dict[int, dict[int, tuple[float, float]]] = {}
    for (layer, index), intervention in sorted(interventions.items()):
        by_layer.setdefault(layer, {})[index] = intervention.coefficients
    for baked in [_baked(layers[layer], coefficients) for layer, coefficients in by_layer.items()]:
        baked.layer.decoder.weight[baked.rows] = baked.values
        if baked.bias is not None and baked.layer.decoder.bias is not None:
            baked.layer.decoder.bias.copy_(baked.bias)


class _BakedDecoder(NamedTuple):
    """New values for the decoder of one layer."""

    layer: MFNLayer
    rows: Tensor
    """(R,) rows that change."""
    values: Tensor
    """(R, d) their new values."""
    bias: Tensor | None
    """(d,) new bias; `None` where the bias stays."""


def _baked(layer: MFNLayer, coefficients: dict[int, tuple[float, float]]) -> _BakedDecoder:
    """Computes the new decoder of a layer from (s, c) by feature."""
    weight, bias, name = layer.decoder.weight, layer.decoder.bias, f"block {layer.layer_index}"
    if layer.config.codes_by_pursuit:
        raise ValueError(
            f"with coding_rounds {layer.config.coding_rounds} and refine_steps {layer.config.refine_steps} codes "
            "follow the decoder, and would undo a change of it; keep the interventions as a preset (save_preset)"
        )
    if layer.config.shared_decoder:
        raise ValueError(f"the decoder of {name} is shared with other blocks, which the change would reach too")
    if type(weight.data) is not Tensor or weight.device.type == "meta":
        raise ValueError(
            f"the weights of {name} are not in memory as a whole; bake before they are spread or offloaded"
        )
    rows = layer.rows_of(torch.tensor(list(coefficients))).decoder.rows
    wide = torch.promote_types(weight.dtype, torch.float32)
    scale, shift = torch.tensor(list(coefficients.values()), device=weight.device, dtype=wide).unbind(-1)
    old = weight[rows].to(wide)
    values = (scale.unsqueeze(-1) * old).to(weight.dtype)
    moved = None
    if shift.any():
        if bias is None:
            raise ValueError(f"{name} has no decoder bias, which a Clamp or Add needs; Scale and Ablate go without")
        moved = (bias.to(wide) + shift @ old).to(bias.dtype)
    if not torch.isfinite(values).all() or not (moved is None or torch.isfinite(moved).all()):
        raise ValueError(f"the changed weights of {name} are too large for {weight.dtype}")
    return _BakedDecoder(layer, rows, values, moved)


__all__ = ["SteerableModel"]
