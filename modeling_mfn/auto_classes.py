"""Registers MFN models with the Auto classes of transformers as soon as these classes are imported.

The Auto classes and our model take seconds to import, and the command line and the atlas need neither.
So `import modeling_mfn` imports none of them. A finder on `sys.meta_path` listens instead.
The finder finds modules of transformers and of this package exactly as Python does, and notes when they are executed.
When the outermost of these imports ends, it registers what can be registered.
Before that end, a module may be half executed, and other modules cannot import its names yet.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from threading import get_ident
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

    from .model.mfn_for_causal_lm import MFNForCausalLM

PACKAGES = ("transformers", "modeling_mfn")


def register_when_imported() -> None:
    """Registers MFN models now where the Auto classes are imported already, else when they are."""
    listener = _ImportListener()
    sys.meta_path.insert(0, listener)
    with listener.executing():
        pass


class _ImportListener(MetaPathFinder):
    """A finder that registers MFN models at the end of an outermost import."""

    def __init__(self) -> None:
        self._depth: Counter[int] = Counter()
        """Thread -> number of nested executions in that thread."""
        self._pending: dict[str, Callable[[], None]] = {
            "transformers.models.auto.configuration_auto": _register_config,
            "transformers.models.auto.modeling_auto": _register_models,
        }

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None, /
    ) -> ModuleSpec | None:
        """Finds a module of the two packages, whose execution is noted, or None for any other module."""
        if not self._pending or fullname.partition(".")[0] not in PACKAGES:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            vars(spec.loader)["exec_module"] = self._noted(spec.loader.exec_module)
        return spec

    def _noted(self, execute: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        def exec_module(module: ModuleType) -> None:
            with self.executing():
                execute(module)

        return exec_module

    @contextmanager
    def executing(self) -> Iterator[None]:
        """Notes that this thread executes a module. The end of the outermost execution registers."""
        thread = get_ident()
        self._depth[thread] += 1
        try:
            yield
            if self._depth[thread] == 1:
                self._register()
        finally:
            self._depth[thread] -= 1
            if not self._depth[thread]:
                del self._depth[thread]

    def _register(self) -> None:
        for module, register in list(self._pending.items()):
            if module in sys.modules:
                try:
                    register()
                except ImportError:
                    # Two threads that import the same modules in opposite order get half a module from each other.
                    # The other thread registers when its import ends.
                    if len(self._depth) == 1:
                        raise
                else:
                    self._pending.pop(module, None)


def _register_config() -> None:
    from transformers import AutoConfig

    from .model.configuration_mfn import MFNConfig

    AutoConfig.register("mfn", MFNConfig, exist_ok=True)
    # save_pretrained then also saves the code, which trust_remote_code=True loads without this package
    MFNConfig.register_for_auto_class()


def _register_models() -> None:
    if find_spec("torch") is None:
        return
    from transformers import AutoModel, AutoModelForCausalLM

    from .model.configuration_mfn import MFNConfig
    from .model.mfn_for_causal_lm import MFNForCausalLM, MFNModel

    AutoModel.register(MFNConfig, MFNModel, exist_ok=True)
    AutoModelForCausalLM.register(MFNConfig, MFNForCausalLM, exist_ok=True)
    MFNModel.register_for_auto_class("AutoModel")
    MFNForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    MFNForCausalLM.publisher = _publish
    MFNForCausalLM.sae_importer = classmethod(_import_saes)  # type: ignore[assignment]
    MFNForCausalLM.sae_exporter = _export_sae


def _publish(model: MFNForCausalLM, repo_id: str, **options: Any) -> CommitInfo:
    from .hub.push import push_model

    return push_model(model, repo_id, **options)


def _import_saes(model_class: type[MFNForCausalLM], *args: Any, **options: Any) -> MFNForCausalLM:
    from .interop.from_saes import from_saes

    return from_saes(model_class, *args, **options)


def _export_sae(model: MFNForCausalLM, layer: int) -> Any:
    from .interop.export import to_saelens

    return to_saelens(model, layer)
