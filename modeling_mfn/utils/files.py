"""Files and folders that appear complete or not at all, even if the writing process is killed."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .ours import check_ours
from .readers import ShapeT, parse_json

REPLACED = ".replaced"
"""Ending of the name that an older folder has while a new one takes its place."""
UNFINISHED = ".unfinished"
"""Ending of the name that a new folder has until it is complete and takes the place of an older one."""

CANNOT_ALLOCATE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that cannot allocate ahead. They say nothing of the space."""


def read_json(file: Path, shape: type[ShapeT]) -> ShapeT | None:
    """Reads a JSON file of a known shape, as `parse_json` does; None if there is no file.

    Raises:
        ValueError: If the file cannot be read or holds something else. The message names it.
    """
    if not file.is_file():
        return None
    try:
        return parse_json(file.read_bytes(), shape)
    except (OSError, ValueError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def write_whole(file: Path, content: str | bytes) -> None:
    """Writes a file so that it is never seen half written. Text is written in UTF-8."""
    beside = file.with_name(f".{file.name}.part")
    try:
        beside.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
        os.replace(beside, file)
    except OSError:
        beside.unlink(missing_ok=True)
        raise


def check_output(output: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> None:
    """Checks that a folder may be written.

    Args:
        output: The folder.
        overwrite: Allow a folder that is not empty, if `mfn` wrote all that is in it.
        inputs: Models and texts that are read. Names that are no local path are passed over.

    Raises:
        ValueError: If the output is a file or an input; if it is not empty, and may not be replaced; or if an earlier
            replacement was interrupted.
        OSError: If the folder cannot be written.
    """
    for source in inputs:
        if output.exists() and Path(source).exists() and output.resolve() == Path(source).resolve():
            raise ValueError(f"{output} is the model itself, or its text; choose another folder for the output")
        for removed in (_named(output, UNFINISHED), _named(output, REPLACED)):
            if Path(source).exists() and Path(source).resolve().is_relative_to(removed):
                raise ValueError(f"{source} is in {removed}, which the command would remove; rename that folder first")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; the output must be a folder")
    if not output.exists() and (trace := trace_of_replacement(output)):
        raise ValueError(trace)
    if is_filled(output):
        if not overwrite:
            raise ValueError(f"{output} exists and is not empty; choose another folder, or --overwrite to replace it")
        _check_place(output, inputs)
        check_ours(output)
        if is_filled(older := _named(output, REPLACED)):  # a part of what a killed command was removing
            check_ours(older, marked=False)
    check_space(output)


def is_filled(folder: Path) -> bool:
    """Returns True for a folder that is not empty."""
    return folder.is_dir() and any(folder.iterdir())


def trace_of_replacement(folder: Path) -> str:
    """Returns a sentence about the older folder that an interrupted replacement left under another name, or ""."""
    older = _named(folder, REPLACED)
    if not older.exists():
        return ""
    newer = _named(folder, UNFINISHED)
    new = f", and the new one is {newer}" if newer.exists() else ""
    return f"{folder} was being replaced when the command was killed: the older one is {older}{new}; rename one of them"


def _check_place(output: Path, inputs: Iterable[str | Path]) -> None:
    """Checks that a folder that would be replaced contains no input, no home, nor the current folder."""
    within = [("", Path(source)) for source in inputs if Path(source).exists()]
    within += [("the current folder, ", Path.cwd()), ("your home folder, ", Path.home())]
    for kind, place in within:
        if place.resolve().is_relative_to(output.resolve()):
            raise ValueError(f"{output} contains {kind}{place}, and is not replaced; choose another folder")
    if os.path.ismount(output):
        raise ValueError(f"{output} is a mount point and cannot be replaced; choose a folder inside it")


def check_space(folder: Path, size: int = 1) -> None:
    """Checks that `size` bytes can be written into a folder, which need not exist yet. Leaves nothing.

    Raises:
        OSError: If the folder is read-only, or the disk is full.
    """
    there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there) as probe:
            probe.write(b"0")
            probe.flush()
            allocate(probe.fileno(), size)
    except OSError as error:
        raise OSError(f"{folder} cannot take {size:,} bytes: {error.strerror}") from error


def allocate(file: int, size: int) -> None:
    """Gives an open file its space on the disk, where the system can, so that a later write cannot fail for lack of it.

    Raises:
        OSError: If the disk has too little space.
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
        except OSError as error:
            if error.errno not in CANNOT_ALLOCATE:
                raise


@contextmanager
def new_folder(output: Path, overwrite: bool, inputs: Iterable[str | Path] = ()) -> Iterator[Path]:
    """Gives a new, empty folder that becomes `output` at the end of the context. After an error nothing has changed.

    Arguments and errors are those of `check_output`.
    """
    check_output(output, overwrite, inputs)
    made = begin_unfinished(output)
    try:
        yield made
        replace_folder(made, output)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def begin_unfinished(output: Path) -> Path:
    """Makes an empty folder next to `output`, for `replace_folder`. Removes what an earlier, killed command left there.

    Raises:
        ValueError: If that folder holds files that `mfn` did not write.
    """
    made = unfinished(output)
    if is_filled(made):
        check_ours(made, marked=False)
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir(parents=True)
    return made


def unfinished(output: Path) -> Path:
    """Returns the place of the new folder that will become `output`, once it is complete."""
    return _named(output, UNFINISHED)


def replace_folder(made: Path, output: Path) -> None:
    """Moves a complete folder to the place of another one, which is removed last.

    After a kill between the two renames the older folder has the name `output` with `.replaced` at its end.
    """
    output = output.resolve()
    older = _named(output, REPLACED)
    if output.exists():
        shutil.rmtree(older, ignore_errors=True)
        os.replace(output, older)
    try:
        os.replace(made, output)
    except BaseException:
        if older.exists() and not output.exists():
            os.replace(older, output)
        raise
    shutil.rmtree(older, ignore_errors=True)


def _named(folder: Path, ending: str) -> Path:
    folder = folder.resolve()  # a link stays, and what it leads to is replaced
    return folder.with_name(folder.name + ending)


__all__ = [
    "allocate",
    "begin_unfinished",
    "check_output",
    "check_space",
    "is_filled",
    "new_folder",
    "read_json",
    "replace_folder",
    "trace_of_replacement",
    "unfinished",
    "write_whole",
]
