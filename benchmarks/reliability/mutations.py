"""Random damage to files and values."""

from __future__ import annotations

import copy
import gzip
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ODD_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2, 10**6, -(10**12), 10**30, 10**400,
    0.5, -0.0, 1e308, -1e-308, float("nan"), float("inf"),
    "", "0", "false", "nan", "L0/1", "none", "../../x", "/etc/passwd", "\x00", "\ud800", "[/red]", "x" * 10_000,
    [], {}, [[]], [None], {"": None}, [0, 0], ["a", 1], {"0": [0]}, {"a": {"b": {}}}, [-1], [10**30],
)  # fmt: skip
"""Values that a setting or a field of a file may be replaced with."""
DEEP = 100_000
"""Brackets of a nested value that no recursive reader survives."""


def odd_value(random_: random.Random) -> Any:
    """A value of any type, sometimes a wrong one within a right type."""
    return copy.deepcopy(random_.choice(ODD_VALUES))


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """All (container, key) of a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, of in list(items):
        yield value, key
        yield from places(of)


def damage_json(text: str, random_: random.Random) -> str:
    """Damages the value of a JSON text, or nests brackets deeply."""
    return "[" * DEEP if random_.random() < 0.02 else json.dumps(damage_value(json.loads(text), random_))


def damage_value(value: Any, random_: random.Random) -> Any:
    """Replaces, removes, repeats or nests one to three parts of a value."""
    value = {"value": value}
    for _ in range(random_.randint(1, 3)):
        found = list(places(value))
        if not found:
            break
        container, key = random_.choice(found)
        how = random_.random()
        if how < 0.6:
            container[key] = odd_value(random_)
        elif how < 0.75:
            del container[key]
        elif how < 0.9:
            other, place = random_.choice(found)
            container[key] = copy.deepcopy(other[place])
        else:
            container[key] = [container[key]]
    return value.get("value")


def damage_bytes(data: bytes, random_: random.Random) -> bytes:
    """Cuts, changes, repeats or inserts bytes."""
    found = bytearray(data)
    for _ in range(random_.randint(1, 4)):
        start = random_.randrange(len(found) + 1)
        end = min(len(found), start + random_.choice((1, 1, 1, 8, 64, 4096)))
        how = random_.randrange(5)
        if how == 0:
            del found[start:]
        elif how == 1:
            del found[start:end]
        elif how == 2:
            found[start:end] = random_.randbytes(end - start)
        elif how == 3:
            found[start:start] = found[start:end] * random_.choice((1, 2, 50))
        else:
            found[start:start] = random_.choice((b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b'"', b"\n\n", b"{", b"1e999"))
    return bytes(found)


def damage_file(file: Path, random_: random.Random) -> None:
    """Damages a file: as JSON if it is JSON, as bytes otherwise or sometimes, and inside its compression."""
    data = file.read_bytes()
    if data[:2] == b"\x1f\x8b" and random_.random() < 0.5:
        file.write_bytes(gzip.compress(damage_bytes(gzip.decompress(data), random_)))
        return
    try:
        text = data.decode()
        json.loads(text)
    except ValueError:
        file.write_bytes(damage_bytes(data, random_))
        return
    if random_.random() < 0.7:
        file.write_text(damage_json(text, random_), encoding="utf-8", errors="surrogatepass")
    else:
        file.write_bytes(damage_bytes(data, random_))


def damage_folder(folder: Path, random_: random.Random) -> None:
    """Damages one file of a folder, or replaces it by nothing, by an empty file or by a folder."""
    file = random_.choice(sorted(file for file in folder.rglob("*") if file.is_file()))
    how = random_.random()
    if how < 0.94:
        damage_file(file, random_)
    elif how < 0.96:
        file.unlink()
    elif how < 0.98:
        file.write_bytes(b"")
    else:
        file.unlink()
        file.mkdir()
