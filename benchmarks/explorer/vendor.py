"""Copies third-party parts of the explorer from pinned npm packages (`python -m benchmarks.explorer.vendor`)."""

from __future__ import annotations

import hashlib
import json
import subprocess
import tarfile
import tempfile
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]


class Part(NamedTuple):
    """One npm package, and the files that are copied from it."""

    package: str
    version: str
    license: str
    files: dict[str, str]  # name here -> path inside the package


PARTS = [
    Part(
        "preact",
        "10.29.8",
        "MIT",
        {
            "preact.js": "dist/preact.min.umd.js",
            "preact_hooks.js": "hooks/dist/hooks.umd.js",
            "LICENSE.preact": "LICENSE",
        },
    ),
    Part("htm", "3.1.1", "Apache-2.0", {"htm.js": "dist/htm.umd.js", "LICENSE.htm": "LICENSE"}),
    Part(
        "ag-grid-community",
        "36.2.0",
        "MIT",
        {"ag_grid.js": "dist/ag-grid-community.min.noStyle.js", "LICENSE.ag-grid-community": "LICENSE.txt"},
    ),
    Part("d3", "7.9.2", "ISC", {"d3.js": "dist/d3.min.js", "LICENSE.d3": "LICENSE"}),
    Part("@observablehq/plot", "0.6.17", "ISC", {"plot.js": "dist/plot.umd.min.js", "LICENSE.plot": "LICENSE"}),
]
TEST_PARTS = [Part("axe-core", "4.14.1", "MPL-2.0", {"axe.js": "axe.min.js", "LICENSE.axe-core": "LICENSE"})]
FOLDERS = {
    REPOSITORY / "modeling_mfn" / "explorer" / "assets" / "vendor": PARTS,
    REPOSITORY / "tests" / "explorer" / "vendor": TEST_PARTS,
}


def copy_part(part: Part, out: Path, scratch: Path) -> list[dict[str, str]]:
    """Downloads a package with npm, copies its files, and returns their records."""
    command = ["npm", "pack", "--silent", f"{part.package}@{part.version}"]
    archive = subprocess.run(command, cwd=scratch, check=True, capture_output=True, text=True).stdout.split()[-1]
    records = []
    with tarfile.open(scratch / archive) as packed:
        for name, source in part.files.items():
            member = packed.extractfile(f"package/{source}")
            if member is None:
                raise FileNotFoundError(f"{part.package}@{part.version} has no file {source}")
            data = member.read()
            (out / name).write_bytes(data)
            origin = {"package": part.package, "version": part.version, "license": part.license, "source": source}
            records.append({"file": name, **origin, "sha256": hashlib.sha256(data).hexdigest()})
    return records


def main() -> None:
    for out, parts in FOLDERS.items():
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as scratch:
            records = [record for part in parts for record in copy_part(part, out, Path(scratch))]
        (out / "vendor.json").write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(f"{out.relative_to(REPOSITORY)}: {len(records)} files")


if __name__ == "__main__":
    main()
