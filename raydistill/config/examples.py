"""The spaces that come with the package: `example:NAME` in place of a path."""

from pathlib import Path

from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name

FOLDER = Path(__file__).parents[1] / "search_spaces"  # a link in the repository, a folder in the wheel
PREFIX = "example:"


def example_names() -> list[str]:
    """The names of all example spaces, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def locate_space(path: Path) -> Path:
    """The file of a space: `example:NAME` becomes the file of the example, any other path is returned.

    Raises:
        UserError: There is no example of this name.
    """
    if not str(path).startswith(PREFIX):
        return path
    name = str(path).removeprefix(PREFIX).removesuffix(".yaml")
    names = example_names()
    if name in names:
        return FOLDER / f"{name}.yaml"
    similar = closest_name(name, names)
    hint = f"did you mean {PREFIX}{similar}?" if similar else f"examples: {', '.join(names)}"
    raise UserError(f"{path}: no such example; {hint}")
