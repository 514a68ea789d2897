"""Write docs/reference/ and check the documents: `python -m docs_build`. `make docs` then builds the site."""

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
    """Write the reference pages and print problems; exit status 1 if there are any."""
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
    all_problems = problems(ROOT) + example_problems(documents(ROOT), ROOT)
    for problem in all_problems:
        print(problem, file=sys.stderr)
    sys.exit(1 if all_problems else 0)


if __name__ == "__main__":
    main()
