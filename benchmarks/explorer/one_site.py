"""Writes the explorer of one model in this process alone, and prints time and memory as JSON.

python -m benchmarks.explorer.one_site MODEL SITE
"""

from __future__ import annotations

import json
import resource
import sys
import time
from pathlib import Path

from modeling_mfn import FeatureAtlas
from modeling_mfn.explorer.site import write_site


def peak_mb() -> float:
    """Largest resident memory of this process so far, in MiB."""
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)


def main(model: Path, site: Path) -> None:
    """Writes the site and prints what it took."""
    site.mkdir()
    before, clock, processor = peak_mb(), time.perf_counter(), time.process_time()
    atlas = FeatureAtlas.from_pretrained(model)
    write_site(atlas, model, site, name="invented")
    taken = {"seconds": time.perf_counter() - clock, "processor_seconds": time.process_time() - processor}
    print(json.dumps({name: round(value, 1) for name, value in taken.items()} | {"peak_mb": [before, peak_mb()]}))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
