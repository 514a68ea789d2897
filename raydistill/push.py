"""`raydistill push EXPORT owner/name`: upload an exported student to the Hugging Face hub."""

from pathlib import Path
from typing import Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import print_json, print_text

app = make_app()


@app.command()
def push(
    export: Annotated[Path, typer.Argument(help="an exported student: outputs/sweeps/NAME/exports/STUDENT")],
    repository: Annotated[str, typer.Argument(help="the model repository, as owner/name; created if missing")],
    private: Annotated[bool, typer.Option("--private", help="make a new repository private")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Upload weights, converted model and model card of an exported student to the Hugging Face hub.

    The token is read from the environment variable HF_TOKEN, and from nowhere else. Local paths in the metadata are
    replaced by names. The card has sample texts of the data: check that you may publish them.

        raydistill push outputs/sweeps/my-news/exports/STUDENT my-team/news-12-3
    """
    from raydistill.tracking.hub_push import push_export

    url = push_export(export, repository, private=private)
    print_text(f"uploaded: {url}", as_json)
    print_json({"repository": repository, "commit": url}, as_json)


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.push import main as entry

    entry()
