"""Files that this package writes, told by their names. A folder with any other file is never replaced."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .readers import parse_json

ATLAS = ("atlas.json", "features.parquet", "examples.parquet", "labels.json")
MODEL = (
    *("config.json", "generation_config.json", "model*.safetensors", "model*.safetensors.index*.json"),
    *("adapter_config.json", "adapter_model.safetensors", "README.md", "LICENSE*", "NOTICE*"),
    "modeling_mfn.py",  # code of version 0.1.0
)
TOKENIZER = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "chat_template.*", "*.jinja"),
    *("vocab*", "merges.txt", "*.model", "*.spm", "*.codes", "*.tiktoken"),
)
TRAINING = (
    *("training_record.json", "trainer_state.json", "training_args.bin", "feature_statistics.safetensors"),
    *("optimizer.*", "scheduler.pt", "scaler.pt", "rng_state*.pth", "events.out.tfevents.*"),
)
UNWRAPPED = "unwrapped.json"
"""File next to a plain model that says which MFN model it was."""
RESULTS = (
    *("evaluation.json", "explanation.json", "explanation.png", "explanation.svg", "figures.json"),
    *("graph.json", "graph-metadata.json", UNWRAPPED),
)
STATE = (
    "harvest-*-of-*.safetensors",
    "activations.json",
    "input_ids.npy",
    "attention_mask.npy",
    "layer_*.npy",
    ".*.part",
)
NEURONPEDIA = ("model.jsonl", "sourceset.jsonl", "source.jsonl", "batch-*.jsonl.gz")
EXPORT = ("mfn_export.json", *NEURONPEDIA)
SAE = ("cfg.json", "sae_weights.safetensors", "sae.safetensors")
SITE = "mfn_explorer.json"
"""File of an explorer's folder that lists all others in it."""
FILES = (*MODEL, *TOKENIZER, *TRAINING, *ATLAS, *RESULTS, *STATE, *EXPORT, *SAE)
FOLDERS = (
    *("checkpoint-*", "features", "features.replaced", "features.unfinished", ".features-harvest"),
    *("runs", "???[0-9][0-9]_[0-9][0-9]-[0-9][0-9]-[0-9][0-9]_*"),
    *("blocks.*.hook_*", "*.mfn.hook_in"),
    *("additional_chat_templates", "model", "training", "cache", ".saved*", ".explanation-*", ".card-*"),
    *("[0-9]*-mfn", "activations", "explanations", "explorer"),
)
"""Folders inside an output, with those of a training's log and those that a killed command may leave."""
IGNORED = (".saving*", "__pycache__")
"""Folders whose content is not looked at: of a save that was killed, which the next save removes, and of Python."""
MARKERS = (
    *("training_record.json", "feature_statistics.safetensors", "atlas.json", "explanation.json", "activations.json"),
    *("harvest-*-of-*.safetensors", "mfn_export.json", UNWRAPPED, SITE),
)
"""Files that no other program writes."""
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def check_ours(folder: Path, names: Iterable[str] = FILES, marked: bool = True) -> None:
    """Checks that this package wrote everything in a folder, so that it may be replaced.

    Args:
        folder: The folder.
        names: Patterns of the names of its files.
        marked: Ask for a file that only this package writes, too.

    Raises:
        ValueError: If the folder has a file of another name, or no file that only this package writes.
    """
    if foreign := next(_foreign(folder, tuple(names)), None):
        raise ValueError(
            f"{folder} holds {foreign.relative_to(folder)}, which mfn did not write, and is not replaced; move that "
            "file away, or choose another folder"
        )
    if marked and not any(map(_is_marker, folder.rglob("*"))):
        raise ValueError(f"no file in {folder} shows that mfn wrote it, and it is not replaced; choose another folder")


def _foreign(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    if listed := _object(folder / SITE).get("files"):
        yield from _unlisted(folder, listed)
        return
    code = _code(folder)
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            if _matches(path.name, FOLDERS):
                yield from _foreign(path, names)
            elif not _matches(path.name, IGNORED):
                yield path
        elif not _matches(path.name, names) and path.name not in code:
            yield path


def _unlisted(folder: Path, listed: Any) -> Iterator[Path]:
    """Yields the files of an explorer's folder that its own list does not name."""
    known = {SITE, *(map(str, listed) if isinstance(listed, list) else ())}
    for path in sorted(folder.rglob("*")):
        if (path.is_symlink() or not path.is_dir()) and path.relative_to(folder).as_posix() not in known:
            yield path


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _is_marker(path: Path) -> bool:
    if path.name == "config.json":
        return _object(path).get("model_type") == "mfn"
    if path.name == "cfg.json":
        metadata = _object(path).get("metadata")
        return isinstance(metadata, dict) and "mfn_version" in metadata
    return path.is_file() and _matches(path.name, MARKERS)


def _code(folder: Path) -> set[str]:
    """Names of the code files that a model or its tokenizer names in its config, and of those that they import."""
    found: set[str] = set()
    configs = (_object(folder / file) for file in ("config.json", "tokenizer_config.json"))
    named = (each for config in configs for each in named_classes(config))
    wanted = {each.partition(".")[0] for each in named if isinstance(each, str)}
    while wanted:
        found |= wanted
        imported = {
            module
            for name in wanted
            if (folder / f"{name}.py").is_file()
            for module in RELATIVE_IMPORT.findall((folder / f"{name}.py").read_text(encoding="utf-8", errors="replace"))
        }
        wanted = imported - found
    return {f"{name}.py" for name in found}


def named_classes(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields what the `auto_map` of a config names: classes, as `module.Class`, and whatever a damaged file has."""
    written = config.get("auto_map") or {}
    for target in written.values() if isinstance(written, dict) else [written]:
        yield from target if isinstance(target, list) else [target]


def _object(file: Path) -> dict[str, Any]:
    """Content of a JSON file; {} if it holds no object. A damaged file says nothing of who wrote it."""
    try:
        return parse_json(file.read_bytes(), dict[str, Any])
    except (OSError, ValueError):
        return {}


__all__ = ["ATLAS", "SITE", "UNWRAPPED", "check_ours", "named_classes"]
