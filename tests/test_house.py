"""Plan of the package: imports go down its floors without circles, and the code for the Hub stands alone."""

import ast
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = [
    {"model", "data", "utils"},
    {"training", "features"},
    {"evaluation", "interop", "hub", "explorer"},
    {"auto_classes", "demo"},
    {"__init__"},
    {"cli", "benchmarks"},
    {"__main__"},
]
FLOOR = {folder: number for number, folders in enumerate(FLOORS) for folder in folders}
TRAVELS = {"torch", "transformers", "safetensors", "huggingface_hub"} | sys.stdlib_module_names


def modules() -> dict[str, Path]:
    """Dotted name of every module of the package and of the benchmarks -> its file."""
    files = [file for top in ("modeling_mfn", "benchmarks") for file in (ROOT / top).rglob("*.py")]
    dotted = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {
        name.removesuffix(".__init__"): file for name, file in dotted.items() if file.parent.parent.name != "metrics"
    }


MODULES = modules()


def imports(name: str) -> Iterator[tuple[str, int]]:
    """Yields absolute name and line of each import of a module, also in functions and under TYPE_CHECKING."""
    package = name.split(".") if MODULES[name].name == "__init__.py" else name.split(".")[:-1]
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((each.name, node.lineno) for each in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*above, *([node.module] if node.module else [])])
            # `from .. import name` may take a module or a name of the package
            for each in node.names:
                whole = f"{source}.{each.name}"
                yield (whole if whole in MODULES else source), node.lineno


def folder_of(name: str) -> str:
    top, *inner = name.split(".")
    return "benchmarks" if top == "benchmarks" else inner[0] if inner else "__init__"


def is_below(there: str, here: str) -> bool:
    return there == here or FLOOR[there] < FLOOR[here]


def test_imports_go_down_or_stay_in_their_folder():
    assert not {folder_of(name) for name in MODULES} - set(FLOOR), "a folder is on no floor"
    upwards = [
        f"{name}:{line} imports {imported}"
        for name in MODULES
        for imported, line in imports(name)
        if imported in MODULES and not is_below(folder_of(imported), folder_of(name))
    ]
    assert not upwards


def test_no_circle_of_imports():
    graph = {name: {imported for imported, _ in imports(name) if imported in MODULES} for name in MODULES}
    TopologicalSorter(graph).prepare()  # raises a CycleError that names the circle


def test_what_travels_imports_siblings_and_what_every_user_has():
    files = sorted((ROOT / "modeling_mfn" / "model").glob("*.py"))
    assert len(files) > 10
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.level:
                sibling = node.level == 1 and node.module and "." not in node.module
                assert sibling, f"{file.name}:{node.lineno}: only `from .name import` travels"
            elif isinstance(node, ast.ImportFrom | ast.Import):
                names = [node.module] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
                assert {name.split(".")[0] for name in names} <= TRAVELS, f"{file.name}:{node.lineno}: {names}"


def test_what_travels_shadows_no_module_where_a_model_is_the_working_directory():
    names = {file.stem for file in (ROOT / "modeling_mfn" / "model").glob("*.py")} - {"__init__"}
    assert not names & (sys.stdlib_module_names | packages_distributions().keys() | {"modeling_mfn"})
