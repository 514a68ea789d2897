"""Checks of Markdown documents that the site builder lacks: line lengths, links, menu, module names."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

MAX_LINE = 120
MAX_README_LINES = 180
MODULE = re.compile(r"`(?:raydistill/)?((\w+)/[\w/]+\.py)`")
LINK = re.compile(r"(!?)\[[^\]]*\]\(([^)\s]+)\)")


def documents(root: Path) -> list[Path]:
    """All Markdown documents except generated pages and benchmark records."""
    generated = {root / "docs" / "reference", root / "benchmarks" / "results"}
    folders = [root.glob("*.md"), (root / "docs").rglob("*.md"), (root / "benchmarks").rglob("*.md")]
    paths = {path for matches in folders for path in matches}
    return sorted(path for path in paths if path.parent not in generated)


def problems(root: Path) -> list[str]:
    """The problems of the documents, one message each."""
    messages = [problem for path in documents(root) for problem in _document(path, root)]
    lines = (root / "README.md").read_text(encoding="utf-8").count("\n")
    if lines > MAX_README_LINES:
        messages.append(f"README.md: {lines} lines, {MAX_README_LINES} at most")
    return messages + list(_menu(root)) + list(_packages(root))


def _document(path: Path, root: Path) -> Iterator[str]:
    name = path.relative_to(root).as_posix()
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
            continue
        if not fenced and len(line) > MAX_LINE and not line.startswith("|"):
            yield f"{name}:{number}: {len(line)} characters, {MAX_LINE} at most"
        if not fenced:
            reasons = [*_links(line, path, root), *_modules(line, root)]
            yield from (f"{name}:{number}: {reason}" for reason in reasons)


def _links(line: str, path: Path, root: Path) -> Iterator[str]:
    for image, target in LINK.findall(re.sub(r"`[^`]*`", "", line)):
        target = target.partition("#")[0]
        if not target or re.match(r"[a-z]+:", target):
            continue
        if not (path.parent / target).exists():
            yield f"no such {'image' if image else 'file'}: {target}"
        elif root / "docs" in path.parents and root / "docs" not in (path.parent / target).resolve().parents:
            yield f"{target} is outside docs/ and so not on the site; name the path as code"


def _modules(line: str, root: Path) -> Iterator[str]:
    """Messages for modules such as `training/loop.py` that a line names but that do not exist."""
    for path, package in MODULE.findall(line):
        if (root / "raydistill" / package).is_dir() and not (root / "raydistill" / path).is_file():
            yield f"no such module: raydistill/{path}"


def _packages(root: Path) -> Iterator[str]:
    text = (root / "docs" / "architecture.md").read_text(encoding="utf-8")
    for init in sorted((root / "raydistill").glob("*/__init__.py")):
        if f"`{init.parent.name}/`" not in text:
            yield f"docs/architecture.md: does not describe the package {init.parent.name}/"


def _menu(root: Path) -> Iterator[str]:
    config = tomllib.loads((root / "zensical.toml").read_text(encoding="utf-8"))
    listed = set(_pages(config["project"]["nav"]))
    docs = root / "docs"
    existing = {path.relative_to(docs).as_posix() for path in docs.rglob("*.md")}
    yield from (f"docs/{page}: not in the menu of zensical.toml" for page in sorted(existing - listed))
    yield from (f"zensical.toml: no such page: docs/{page}" for page in sorted(listed - existing))


def _pages(menu: list | dict | str) -> Iterator[str]:
    if isinstance(menu, str):
        yield menu
    for entry in menu.values() if isinstance(menu, dict) else menu if isinstance(menu, list) else ():
        yield from _pages(entry)
