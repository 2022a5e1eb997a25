"""Fetches the tests of the installed release of transformers. The wheel has none.

The repository has all of them. Without it, the source distribution has those of its top level.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from modeling_mfn.demo.assets import cache_folder

REPOSITORY = "https://github.com/huggingface/transformers/archive/refs/tags"
FOLDER_VARIABLE = "TRANSFORMERS_TESTS"
"""Environment variable with a folder to take instead: `tests/` of a clone of the repository."""
FOLDERS = ("", "exporters", "generation", "utils")
"""Folders of `tests/` that are fetched."""


def fetch_tests() -> Path:
    """Returns a folder with transformers' `tests/`.

    The files are downloaded once per version, into the demo's cache outside the repository. They come from the
    repository, or from the package index if the repository cannot be reached.
    """
    if given := os.environ.get(FOLDER_VARIABLE):
        return Path(given)
    release, cache = version("transformers"), cache_folder()
    cache.mkdir(parents=True, exist_ok=True)
    whole, part = (cache / f"transformers-{release}-{name}" for name in ("repository-tests", "tests"))
    if whole.is_dir():
        return whole
    try:
        with urllib.request.urlopen(f"{REPOSITORY}/v{release}.tar.gz", timeout=60) as answer:
            return _kept(answer.read(), whole)
    except (OSError, urllib.error.URLError):
        return part if part.is_dir() else _kept(_source_distribution(release), part)


def lacks_suites(folder: Path) -> bool:
    """Returns True if a folder lacks the suites of generation and of causal LMs."""
    return not ((folder / "generation" / "test_utils.py").is_file() and (folder / "causal_lm_tester.py").is_file())


def _source_distribution(release: str) -> bytes:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", f"transformers=={release}", "-d"]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, folder], check=True)
        return next(Path(folder).glob("transformers-*.tar.gz")).read_bytes()


def _kept(archive: bytes, folder: Path) -> Path:
    """Unpacks the Python files of the tests into a folder."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        unpacked = Path(scratch, "tests")
        with tarfile.open(fileobj=io.BytesIO(archive)) as members:
            for member in members:
                path = PurePosixPath(member.name)
                # these folders alone, so that no member can be written outside the scratch folder
                inner = "/".join(path.parts[2:-1])
                if member.isfile() and path.parts[1:2] == ("tests",) and path.suffix == ".py" and inner in FOLDERS:
                    file = unpacked / inner / path.name
                    file.parent.mkdir(parents=True, exist_ok=True)
                    file.write_bytes(members.extractfile(member).read())
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder
