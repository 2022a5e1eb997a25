"""Docstrings and help texts of the package stand alone."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LEANING = re.compile(
    r"(?:What|Of|Those|The same|As|Whether|How|Where|Which|That|It|Its|They|Their|On|By|In|Likewise|Also|So)\b"
)
"""Beginnings that lean on a neighbour: a docstring is shown alone in an editor and in the reference."""

STANDS_ALONE = re.compile(r"[A-Z`\"'\d(|]|[a-z]\b|[a-z]+_")
"""Beginnings that are fine: a capital, code, a number, or a symbol of the equations such as `h` or `z_tilde`."""


def documented(node: ast.AST, name: str) -> Iterator[tuple[str, ast.Constant]]:
    """Yields public name and docstring of a module, class or function, of its members, and of the fields of a class."""
    body = getattr(node, "body", [])
    for place, child in enumerate(body):
        text = child.value if isinstance(child, ast.Expr) and isinstance(child.value, ast.Constant) else None
        if text is not None and isinstance(text.value, str):
            before = body[place - 1] if place else None
            target = getattr(before, "target", None) or next(iter(getattr(before, "targets", [])), None)
            field = getattr(target, "id", None)
            if place == 0:
                yield name, text
            elif field and not field.startswith("_"):
                yield f"{name}.{field}", text
        elif isinstance(child, ast.ClassDef | ast.FunctionDef) and not child.name.startswith("_"):
            inner = f"{name}.{child.name}"
            yield from documented(child, inner) if isinstance(child, ast.ClassDef) else own(child, inner)


def own(function: ast.FunctionDef, name: str) -> Iterator[tuple[str, ast.Constant]]:
    first = function.body[0]
    if ast.get_docstring(function) is not None:
        yield name, first.value


def helps(tree: ast.AST) -> Iterator[ast.Constant]:
    """Yields the texts of `help=`, and the texts of training arguments, `_option(default, text)`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            texts = [each.value for each in node.keywords if each.arg == "help"]
            if getattr(node.func, "id", None) == "_option":
                texts += node.args[1:2]
            yield from (text for text in texts if isinstance(text, ast.Constant))


def leaning() -> list[str]:
    found = []
    for file in sorted((ROOT / "modeling_mfn").rglob("*.py")):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        place = file.relative_to(ROOT).as_posix()
        texts = [*documented(tree, file.stem), *(("help", text) for text in helps(tree))]
        for name, text in texts:
            words = text.value.strip()
            if LEANING.match(words) or not STANDS_ALONE.match(words):
                found.append(f"{place}:{text.lineno} {name}: {words.splitlines()[0][:70]}")
    return found


def test_docstrings_and_help_texts_stand_alone():
    assert leaning() == []


if __name__ == "__main__":
    print("\n".join(leaning()))
