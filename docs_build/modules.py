"""The module reference and the import graph of packages, from the syntax trees of the source files."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from docs_build.markdown import cell, code, table

ROOT = "raydistill"
COMMANDS = "commands"  # the modules at the top level of the package
INTRODUCTION = """\
# Module reference

`make docs` generates this page from the docstrings and the import statements of the package.
[Architecture](../architecture.md) explains the packages. Packages are listed from the commands downwards.
"""


@dataclass
class Module:
    """A module: its path in the package, the first paragraph of its docstring, and the modules that it imports."""

    path: str
    summary: str
    imports: set[str] = field(default_factory=set)

    @property
    def package(self) -> str:
        """The folder under the root, or `commands`."""
        return package_of(self.path)


def package_of(path: str) -> str:
    """The package of a module's path such as `search/sweep.py`."""
    return path.split("/")[0] if "/" in path else COMMANDS


def read_modules(folder: Path) -> list[Module]:
    """Every module under `folder`, `__init__.py` files included."""
    modules = []
    for file in sorted(folder.rglob("*.py")):
        path = file.relative_to(folder).as_posix()
        tree = ast.parse(file.read_text(encoding="utf-8"))
        summary = (ast.get_docstring(tree) or "").split("\n\n")[0]
        modules.append(Module(path, " ".join(summary.split()), set(imported(tree, path, folder))))
    return modules


def imported(tree: ast.Module, path: str, folder: Path) -> Iterator[str]:
    """Paths of modules of the package that a module imports, also in functions; type-checking imports are ignored."""
    package = [ROOT, *path.split("/")[:-1]]
    for node in _runtime_nodes(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield from _module_path(alias.name.split("."), folder)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            parts = base + (node.module.split(".") if node.module else [])
            for alias in node.names:
                submodule = list(_module_path([*parts, alias.name], folder))
                yield from submodule or _module_path(parts, folder)


def _runtime_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            continue
        yield node
        yield from _runtime_nodes(node)


def _module_path(parts: list[str], folder: Path) -> Iterator[str]:
    if parts[:1] != [ROOT] or len(parts) < 2:
        return
    path = "/".join(parts[1:])
    if (folder / f"{path}.py").is_file():
        yield f"{path}.py"
    elif (folder / path / "__init__.py").is_file():
        yield f"{path}/__init__.py"


def package_graph(modules: list[Module]) -> dict[str, set[str]]:
    """The packages that each package imports, without itself."""
    graph: dict[str, set[str]] = {}
    for module in modules:
        imported_packages = graph.setdefault(module.package, set())
        imported_packages |= {package_of(path) for path in module.imports} - {module.package}
    return graph


def levels(graph: dict[str, set[str]]) -> dict[str, int]:
    """The level of each package: 0 without imports, else one above the highest imported package.

    Edges of `cycle_edges` are ignored.
    """
    ignored = cycle_edges(graph)
    level_by_name: dict[str, int] = {}

    def level(name: str) -> int:
        if name not in level_by_name:
            below = [level(other) for other in graph[name] if (name, other) not in ignored]
            level_by_name[name] = max(below, default=-1) + 1
        return level_by_name[name]

    for name in graph:
        level(name)
    return level_by_name


def cycle_edges(graph: dict[str, set[str]]) -> set[tuple[str, str]]:
    """Edges whose removal makes the graph acyclic: the back edges of a depth-first search."""
    state: dict[str, str] = {}
    back: set[tuple[str, str]] = set()

    def visit(name: str) -> None:
        state[name] = "open"
        for other in sorted(graph[name]):
            if state.get(other) == "open":
                back.add((name, other))
            elif other not in state:
                visit(other)
        state[name] = "done"

    for name in sorted(graph, key=lambda name: (name != COMMANDS, name)):
        if name not in state:
            visit(name)
    return back


def reduced(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The transitive reduction of the graph without `cycle_edges`."""
    ignored = cycle_edges(graph)
    acyclic = {name: {other for other in imported if (name, other) not in ignored} for name, imported in graph.items()}

    def reachable(name: str) -> set[str]:
        return {name}.union(*(reachable(other) for other in acyclic[name]))

    return {
        name: {other for other in imported if not any(other in reachable(via) for via in imported - {other})}
        for name, imported in acyclic.items()
    }


def modules_page(modules: list[Module]) -> str:
    """The page in Markdown."""
    graph = package_graph(modules)
    level = levels(graph)
    parts = [INTRODUCTION]
    for package in sorted(graph, key=lambda name: (-level[name], name)):
        title = f"{ROOT}/*.py: the commands" if package == COMMANDS else f"{ROOT}/{package}/"
        parts += [f"## {title}", ""]
        members = [m for m in modules if m.package == package]
        summary = next((m.summary for m in members if m.path == f"{package}/__init__.py"), "")
        imported_names = ", ".join(code(name) for name in sorted(graph[package], key=lambda n: (-level[n], n)))
        parts += ([summary, ""] if summary else []) + [f"Imports {imported_names or 'no other package'}.", ""]
        rows = [[code(m.path.split("/", 1)[-1]), cell(m.summary)] for m in members if "__init__" not in m.path]
        parts += [table(["module", "content"], rows), ""]
    return "\n".join(parts)
