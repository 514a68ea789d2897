"""`python -m docs_build` writes docs/reference/ and checks the documents; `make docs` then builds the site."""

import sys
from pathlib import Path

from docs_build.checks import documents, problems
from docs_build.commands import commands_page
from docs_build.drawing import imports_svg
from docs_build.examples import example_problems
from docs_build.modules import modules_page, read_modules
from docs_build.settings import settings_page

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Exit status 1 where a document breaks a rule."""
    modules = read_modules(ROOT / "raydistill")
    pages = {
        "settings.md": settings_page(),
        "commands.md": commands_page(),
        "modules.md": modules_page(modules),
        "imports.svg": imports_svg(modules),
    }
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")
    found = problems(ROOT) + example_problems(documents(ROOT), ROOT)
    for problem in found:
        print(problem, file=sys.stderr)
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
