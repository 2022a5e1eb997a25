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


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "layer-speed": layer_speed,
    "atlas-speed": atlas_speed,
}
