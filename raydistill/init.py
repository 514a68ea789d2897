"""`raydistill init`: a space file for the user's own data and teacher, and a recipe for a new teacher."""

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.config.metric_names import AUTO, METRICS_HELP
from raydistill.config.run import NAME_PATTERN, Columns, Dataset
from raydistill.core.console import print_json, print_progress, print_text
from raydistill.core.errors import UserError

app = make_app()


@app.command()
def init(  # noqa: PLR0913
    data: Annotated[
        str | None, typer.Argument(help="a named data set, a hub name or a folder; a terminal is asked for it")
    ] = None,
    teacher: Annotated[
        str | None, typer.Option(help="the teacher: a folder, a hub name or a named teacher such as bart")
    ] = None,
    start: Annotated[bool, typer.Option("--start", help="write also a recipe that trains a new teacher")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="the space file; default: NAME.yaml")] = None,
    name: Annotated[str | None, typer.Option(help="name of the sweep; default: that of the data")] = None,
    metric: Annotated[
        str,
        typer.Option(
            help=f"{METRICS_HELP}; auto: chrf++ if the data look like a translation, which a terminal confirms, else "
            "rouge2"
        ),
    ] = AUTO,
    source: Annotated[str | None, typer.Option(help="column of the source; dots address nested values")] = None,
    target: Annotated[str | None, typer.Option(help="column of the target")] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="column of the row id")] = None,
    config: Annotated[str | None, typer.Option(help="configuration of a data set of the hub")] = None,
    languages: Annotated[
        tuple[str, str] | None,
        typer.Option(help="languages of multilingual teachers and T5, such as eng_Latn ron_Latn"),
    ] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="text before every source, such as 'summarize: '; default: the teacher's own")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace existing files")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Write a space file for your data and teacher, with comments on every choice.

    The command reads all rows and the teacher's configuration and tokenizer. Columns, task, lengths, sizes of students,
    learning rate and epochs follow from them. The file is checked as `raydistill sweep` checks it.

    Examples:

        raydistill init my_news/ --teacher my_teacher/

        raydistill init my_pairs/ --start --metric chrf++
    """
    data = data or _ask("data set: a folder, a hub name or a named data set", "DATA")
    if start and teacher is not None:
        raise UserError("give either --teacher or --start, which writes a recipe for a new teacher")
    if not start and teacher is None:
        teacher = _ask("teacher: a folder, a hub name or a named teacher", "--teacher, or --start to train a new one")
    if source is None and (target is not None or id_column is not None):
        raise UserError("--target and --id also need --source")
    if teacher is not None:
        from raydistill.config.presets import check_teacher

        check_teacher(teacher)
    if metric != AUTO:
        from raydistill.evaluation.metrics import get_metric

        get_metric(metric)  # the metric exists, and the module of a user's metric can be imported
    name = name or re.sub(r"[^A-Za-z0-9._-]+", "-", Path(data).name).strip("-._") or "my-space"
    path = output or Path(f"{name}.yaml")
    if not re.fullmatch(NAME_PATTERN, name) or len(name) > 100:
        raise UserError(
            f"name {name!r}: letters, digits, dots, dashes and underscores only; name the sweep with --name"
        )
    from raydistill.search.new_space import Request, is_guessed_translation, recipe_path, write_space
    from raydistill.search.user_inputs import read_data

    if not force:
        _check_absent(path, *([recipe_path(path)] if start else []))
    columns = Columns(source=source, target=target, id=id_column) if source is not None else None
    dataset = Dataset(name=data, config=config, columns=columns, languages=languages, source_prefix=source_prefix)
    print_progress(f"reading {data}")
    user_data = read_data(dataset)
    is_guess = metric == AUTO and is_guessed_translation(dataset, user_data)
    if is_guess and not _confirm_translation(user_data.task.reason):
        metric = "rouge2"
    written = write_space(Request(name, dataset, teacher, metric, path), user_data)
    for line in written.summary():
        print_text(line, as_json)
    print_json(written.to_json(), as_json)


def _ask(question: str, option: str) -> str:
    """The answer of a user at a terminal; elsewhere a UserError that names the argument to give."""
    if not sys.stdin.isatty():
        raise UserError(f"name the {question} ({option})")
    return str(typer.prompt(question, err=True))


def _confirm_translation(reason: str) -> bool:
    """Whether data that look like a translation are one: the answer at a terminal, else yes with a message."""
    text = f"the data look like a translation: {reason}"
    if sys.stdin.isatty():
        return typer.confirm(f"{text}. Score with chrF++?", default=True, err=True)
    print_progress(f"{text}; the metric is chrF++ (--metric rouge2 for another task)")
    return True


def _check_absent(*paths: Path) -> None:
    if existing := [str(path) for path in paths if path.exists()]:
        raise UserError(f"{', '.join(existing)}: exists; replace with --force, or name another file with --output")


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.init import main as entry

    entry()
