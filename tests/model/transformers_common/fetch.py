"""Fetches tests from the source distribution of the installed transformers. The wheel has none."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
from importlib.metadata import version
from pathlib import Path, PurePosixPath

from modeling_mfn.demo.assets import cache_folder


def fetch_tests() -> Path:
    """Returns a folder with the top-level files of transformers' `tests/`.

    The files are downloaded from the package index once per version, into the demo's cache outside the repository.
    """
    release = version("transformers")
    cache = cache_folder()
    folder = cache / f"transformers-{release}-tests"
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        unpacked = Path(scratch, "tests")
        unpacked.mkdir()
        _unpack(_download(release, scratch), unpacked)
        try:
            unpacked.rename(folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _download(release: str, folder: str) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-binary", "transformers", f"transformers=={release}", "-d", folder]
    subprocess.run(command, check=True)
    return next(Path(folder).glob("transformers-*.tar.gz"))


def _unpack(archive: Path, folder: Path) -> None:
    # bare file names, so that no member can be written outside the folder
    with tarfile.open(archive) as members:
        for member in members:
            path = PurePosixPath(member.name)
            if member.isfile() and path.parts[1:-1] == ("tests",) and path.suffix == ".py":
                (folder / path.name).write_bytes(members.extractfile(member).read())
