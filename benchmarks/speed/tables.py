"""Tables of time and memory. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.common import records


def layer_speed() -> Iterator[list[str]]:
    """Time of one layer as a ratio to its encoder product."""
    yield ["variant", "forward", "forward and backward"]
    for name, ratios in records.result("layer")["ratios"].items():
        yield [name, f"{ratios['forward']:.2f}", f"{ratios['both']:.2f}"]


def atlas_speed() -> Iterator[list[str]]:
    """Speed and memory of a harvest."""
    of = records.result("atlas")
    yield ["figure", "value"]
    for name, speed in of["speed"]["tokens_per_second"].items():
        yield [f"tokens per second: {name}", f"{speed:.0f}"]
    for name in ("without", "with"):
        share = of["speed"][f"harvest_speed_of_forward_{name}_head"]["clock"]
        yield [f"speed of the harvest compared with the forward pass {name} the LM head", f"{share:.2f}"]
    for name, memory in of["atlas"]["resident_mb"].items():
        yield [f"resident memory, {name}", f"{memory:,.0f} MB"]
    yield [f"files of an atlas of {of['atlas']['tokens']:,} tokens", f"{of['atlas']['files_mb']:.0f} MB"]


def training_step() -> Iterator[list[str]]:
    """Time of a training step before and after a layer encoded and decoded once per forward."""
    yield ["losses", "before, ms", "after, ms", "after / before"]
    for losses, of in records.result("training_step")["losses"].items():
        before, after, ratio = of["processor"].values()
        yield [losses, f"{before:,.0f}", f"{after:,.0f}", f"{ratio:.2f}"]


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "layer-speed": layer_speed,
    "atlas-speed": atlas_speed,
    "training-step": training_step,
}
