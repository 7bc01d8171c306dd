"""The design's import table, proved from the source, and what importing a part may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "src" / "axolotl"

# Each part, and those that it may import. What stands in GROUND may be imported by all but kernels.
GROUND = {"errors", "registry", "console", "config", ""}
BELOW_METHODS = {"data", "model", "optim", "distributed", "kernels"}
BELOW_RUN = BELOW_METHODS | {"methods"}
PEERS = {"plan", "report", "train", "weights", "inference"}
MAY_IMPORT = {
    "errors": set(),
    "console": {"errors"},
    "registry": {"errors", "console"},
    "config": {"errors", "registry", "console", ""},
    "kernels": set(),
    "data": GROUND,
    "model": GROUND | {"kernels", "distributed"},
    "optim": GROUND | {"kernels", "distributed"},
    "distributed": GROUND | {"kernels"},
    "methods": GROUND | BELOW_METHODS,
    **dict.fromkeys(PEERS, GROUND | BELOW_RUN | PEERS),
    "run": GROUND | BELOW_RUN | PEERS,
    "cli": GROUND | BELOW_RUN | PEERS | {"run"},
    "": {"errors", "registry", "console", "config", "run"},
    "__main__": {"cli"},
}
FORBIDDEN_WORDS = {
    "utils",
    "util",
    "manager",
    "helper",
    "helpers",
    "handler",
    "handlers",
    "common",
    "misc",
    "core",
}
# Names that transformers gave to methods which we replace.
GIVEN_NAMES = {"compute_loss_context_manager"}
HEAVY = {
    "torch",
    "transformers",
    "datasets",
    "peft",
    "accelerate",
    "trl",
    "numpy",
    "pyarrow",
    "tokenizers",
    "rich",
    "jinja2",
}


def files() -> list[Path]:
    return sorted(f for f in SOURCE.rglob("*.py") if "__pycache__" not in f.parts)


def part_of(module: str) -> str:
    """`axolotl.data.packing` → `data`; `axolotl` itself → the empty name."""
    return module.split(".")[1] if "." in module else ""


def module_of(file: Path) -> str:
    names = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


@cache
def _known_modules() -> frozenset[str]:
    return frozenset(map(module_of, files()))


def imported(node: ast.AST) -> Iterator[str]:
    """The modules that an import statement names; `from axolotl import run` is axolotl.run."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        for alias in node.names:
            deeper = f"{node.module}.{alias.name}"
            yield deeper if deeper in _known_modules() else node.module


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def imports(node: ast.AST, inside_function: bool = False) -> Iterator[tuple[str, bool, int]]:
    """(module, whether inside a function, line) of every import that runs."""
    for child in ast.iter_child_nodes(node):
        if _is_type_checking(child):
            continue
        for name in imported(child):
            yield name, inside_function, child.lineno
        deeper = inside_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        yield from imports(child, deeper)


def type_imports(file: Path) -> Iterator[str]:
    for node in ast.walk(tree(file)):
        yield from imported(node)


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_imports_go_down_only(file: Path) -> None:
    part = part_of(module_of(file))
    assert part in MAY_IMPORT, f"`{part}` has no row in the table of layers"
    for name in type_imports(file):
        if name.split(".")[0] != "axolotl" or part_of(name) == part:
            continue
        assert part_of(name) in MAY_IMPORT[part], f"{part} may not import {name}"


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_imports_stand_at_the_top(file: Path) -> None:
    module = module_of(file)
    if part_of(module) == "cli":
        return
    allowed = {"axolotl.console": {"rich.console", "rich.progress"}}.get(module, set())
    inside = [
        f"{name} (line {line})"
        for name, inside, line in imports(tree(file))
        if inside and name not in allowed
    ]
    assert not inside, f"{module} imports inside a function: {', '.join(inside)}"


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_relative_imports_are_not_used(file: Path) -> None:
    assert not [n.lineno for n in ast.walk(tree(file)) if isinstance(n, ast.ImportFrom) and n.level]


def test_folders_have_no_cycle() -> None:
    """Among folders, at run time: whoever imports is never imported back, over any number of steps."""
    edges: dict[str, set[str]] = {}
    for file in files():
        part = part_of(module_of(file))
        for name, _, _ in imports(tree(file)):
            if name.split(".")[0] == "axolotl" and part_of(name) not in (part, ""):
                edges.setdefault(part, set()).add(part_of(name))
    edges.pop("", None)

    def reaches(start: str, goal: str, seen: frozenset[str] = frozenset()) -> bool:
        return any(
            following == goal or reaches(following, goal, seen | {following})
            for following in edges.get(start, set()) - seen
        )

    assert not [part for part in edges if reaches(part, part)]


def test_ground_and_config_know_no_heavy_library() -> None:
    for file in files():
        if part_of(module_of(file)) in {"config", "errors", "registry", "console"}:
            top = {name.split(".")[0] for name, inside, _ in imports(tree(file)) if not inside}
            assert not top & HEAVY, f"{module_of(file)} imports {top & HEAVY}"


def test_names_say_something() -> None:
    for file in files():
        words = set(re.split(r"[_.]", module_of(file).lower()))
        assert not words & FORBIDDEN_WORDS, file


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_names_inside_say_something(file: Path) -> None:
    for node in ast.walk(tree(file)):
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            and node.name not in GIVEN_NAMES
        ):
            words = {w.lower() for w in re.findall(r"[A-Z]?[a-z]+", node.name)}
            assert not words & FORBIDDEN_WORDS, f"{node.name} (line {node.lineno})"


@pytest.mark.parametrize("file", files(), ids=module_of)
def test_every_file_says_what_it_is(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    if text.strip():
        assert ast.get_docstring(tree(file)), "no docstring in the first line"
    assert len(text.splitlines()) <= 480, "far longer than 400 lines"


@pytest.mark.parametrize(
    ("statement", "forbidden"),
    [
        ("import axolotl", HEAVY | {"pydantic", "yaml", "click"}),
        ("import axolotl.errors, axolotl.registry, axolotl.console", HEAVY | {"pydantic"}),
        ("import axolotl.config", HEAVY),
        ("import axolotl.cli.main", HEAVY | {"pydantic", "yaml"}),
    ],
)
def test_importing_loads_nothing_heavy(statement: str, forbidden: set[str]) -> None:
    code = f"import sys; {statement}; print(*sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not forbidden & set(loaded)
