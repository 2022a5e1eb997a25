"""Third-party files of the explorer: as npm ships them, with licence and digest, and nothing else."""

import hashlib
import json
import re
from pathlib import Path

import pytest

from benchmarks.explorer.vendor import FOLDERS

ASSETS = Path(__file__).parents[2] / "modeling_mfn" / "explorer" / "assets"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.parent.name)
def test_vendored_files_are_those_of_the_packages(folder):
    records = json.loads((folder / "vendor.json").read_text(encoding="utf-8"))
    assert {record["file"] for record in records} | {"vendor.json"} == {file.name for file in folder.iterdir()}
    for record in records:
        assert hashlib.sha256((folder / record["file"]).read_bytes()).hexdigest() == record["sha256"], record["file"]
    listed = {(record["package"], record["version"], record["license"], record["file"]) for record in records}
    assert listed == {
        (part.package, part.version, part.license, name) for part in FOLDERS[folder] for name in part.files
    }
    for part in FOLDERS[folder]:
        assert any(name.startswith("LICENSE") for name in part.files), part.package


def test_the_page_names_files_that_are_there():
    page = (ASSETS / "index.html").read_text(encoding="utf-8")
    named = re.findall(r'(?:src|href)="([^"]+)"', page)
    own = {name for name in named if not name.startswith(("data:", "data/"))}
    assert all((ASSETS / name).is_file() for name in own)
    written = {f"app/{file.name}" for file in (ASSETS / "app").iterdir()}
    assert written <= own
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize("file", sorted((ASSETS / "app").glob("*.js")), ids=lambda file: file.name)
def test_own_scripts_write_text_only(file):
    code = file.read_text(encoding="utf-8")
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|dangerously|document\.write|\beval\(|new Function", code
    )
    assert len(code.splitlines()) <= 400
