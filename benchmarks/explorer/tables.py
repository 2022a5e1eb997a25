"""Tables of the explorer. `python -m benchmarks.tables` writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.common import records

SIZES = {
    "all_data": "all data",
    "list": "list of features",
    "median_chunk": "pages of 64 features, median file",
    "pages_and_libraries": "pages and libraries",
    "atlas": "the atlas itself, as Parquet",
}


def explorer_sizes() -> Iterator[list[str]]:
    """Sizes of the folder, and time and memory of its writing, for several numbers of features."""
    sizes = _sizes()
    yield ["figure", *(f"{features:,} features" for features in sizes)]
    for name, title in SIZES.items():
        yield [title, *(f"{of['bytes'][name] / 1e6:,.2f} MB" for of in sizes.values())]
    yield ["files", *(f"{of['bytes']['files']:,}" for of in sizes.values())]
    yield ["time to write, processor", *(f"{of['writing']['processor_seconds']:.0f} s" for of in sizes.values())]
    yield ["largest memory of the writer", *(f"{of['writing']['peak_mb'][1]:,.0f} MB" for of in sizes.values())]


def explorer_times() -> Iterator[list[str]]:
    """Times until the pages can be used, from disk."""
    sizes = {features: of for features, of in _sizes().items() if "pages" in of}
    yield ["time", *(f"{features:,} features" for features in sizes)]
    pages = [of["pages"] for of in sizes.values()]
    yield ["first paint", *(f"{of['list']['first_paint_ms']:,} ms" for of in pages)]
    for name, title in {"list": "list", "feature": "page of a feature", "model": "page of the model"}.items():
        yield [f"{title} usable", *(f"{of[name]['usable_ms']:,} ms" for of in pages)]
        yield [f"{title}, processor time", *(f"{of[name]['processor_ms']:,} ms" for of in pages)]
    for name, title in {"median_ms": "median", "95_percent_ms": "95 %", "longest_ms": "longest"}.items():
        yield [f"frame while scrolling, {title}", *(f"{of['scrolling'][name]:,.0f} ms" for of in pages)]
    yield ["load of the machine meanwhile, of 2 cores", *(f"{of['load']:.1f}" for of in sizes.values())]


def explorer_server() -> Iterator[list[str]]:
    """Memory of the server, and time of its answers."""
    found = records.result("explorer/server")
    yield ["figure", "value"]
    yield ["weights of the model", f"{found['parameters_mb']:,.0f} MB"]
    yield from ([f"resident memory {when}", f"{size:,.0f} MB"] for when, size in found["resident_mb"].items())
    yield from ([f"{name}, median", f"{seconds:.2f} s"] for name, seconds in found["median_seconds"].items())
    yield ["load of the machine meanwhile, of 2 cores", f"{found['load_average'][0]:.1f}"]


def _sizes() -> dict[int, Any]:
    """Number of features -> what was measured, the smallest first."""
    measured = records.result("explorer/sizes")["sizes"]
    return {features: measured[str(features)] for features in sorted(map(int, measured))}


TABLES: dict[str, Callable[[], Iterator[list[str]]]] = {
    "explorer-sizes": explorer_sizes,
    "explorer-times": explorer_times,
    "explorer-server": explorer_server,
}
