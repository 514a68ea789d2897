"""`raydistill pseudolabel`: teacher beam search over a training set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from raydistill.config.console import finish, home, make_app, progress, run_app, show, table
from raydistill.config.errors import UserError

if TYPE_CHECKING:
    from raydistill.config.run import Dataset

app = make_app()


@app.command()
def pseudolabel(
    teacher: Annotated[
        str, typer.Option(help="a known name (bart, pegasus, mbart, marian, t5, demo), a hub name or a path")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="a known name, a hub name, a file or a folder; default: the teacher's own")
    ] = None,
    split: Annotated[str, typer.Option(help="which split to label")] = "train",
    output: Annotated[Path | None, typer.Option(help="where label sets go; default: outputs/labels")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="default: the checkpoint's own, else the preset's")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="only the first rows")] = None,
    n_best: Annotated[int, typer.Option(min=1, help="candidates kept per row")] = 1,
    engine: Annotated[
        Literal["auto", "ctranslate2", "transformers"], typer.Option(help="auto: ctranslate2 where it loads the model")
    ] = "auto",
    skip_bad_rows: Annotated[bool, typer.Option(help="leave out rows without text, and count them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Label every row of a data set with what the teacher writes for it; killed, the same command goes on.

    `--teacher pegasus` alone means XSUM's training split. Targets are not needed.

    Example: `raydistill pseudolabel --teacher marian --dataset my_sentences.jsonl.gz`
    """
    from raydistill.config.presets import default_dataset
    from raydistill.config.run import Dataset, Decoding

    name = dataset or default_dataset(teacher)
    if name is None:
        raise UserError(f"--teacher {teacher}: say what to label with --dataset (a known name, a file or a folder)")
    if n_best > (beams or n_best):
        raise UserError(f"--n-best {n_best} is more than --beams {beams}")
    caps = {f"{split}_rows": rows} if rows and split in ("train", "validation", "test") else {}
    data = Dataset(name=name, skip_bad_rows=skip_bad_rows, **caps)
    check_inputs(teacher, data, split)

    from raydistill.cluster.pseudolabel import Job
    from raydistill.cluster.pseudolabel import pseudolabel as label
    from raydistill.cluster.start import cluster, device
    from raydistill.data.labels import read_label_set

    job = Job(teacher, data, split, Decoding(beams=beams), engine, n_best)
    with cluster():
        folder = label(job, output or home() / "labels", device())
    manifest = read_label_set(folder).manifest
    progress("")
    quality = manifest["quality"] or {}
    facts = [
        ["rows", str(manifest["rows"])],
        ["empty", str(manifest["empty"])],
        ["words, mean", f"{manifest['target_words_mean']:.1f}"],
        ["engine", manifest["engine"]],
        ["device-hours", f"{manifest['device_hours']:.4f}"],
        *[[f"{k} against the originals", f"{v:.2f}"] for k, v in quality.items()],
    ]
    show(table(["label set", folder.name], facts), as_json)
    show(f"label set: {folder}", as_json)
    finish({**manifest, "folder": str(folder)}, as_json)


def check_inputs(teacher: str, dataset: "Dataset", split: str) -> None:
    """What can be known at once: the teacher can be one, the data set is there and has the split."""
    from raydistill.config.presets import check_teacher
    from raydistill.data.corpus import check_split

    check_teacher(teacher)
    if Path(dataset.name).exists() or dataset.name == "demo":
        check_split(dataset, split)


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.pseudolabel import main as entry

    entry()
