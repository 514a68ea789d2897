"""`raydistill pseudolabel`: teacher beam search over a training set."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    from raydistill.config.run import Curation, Dataset

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
    n_best: Annotated[int, typer.Option(min=1, help="candidates kept per row, at most as many as beams")] = 1,
    engine: Annotated[
        Literal["auto", "ctranslate2", "transformers"], typer.Option(help="auto: ctranslate2 where it loads the model")
    ] = "auto",
    precision: Annotated[
        Literal["auto", "fp32", "bf16", "fp16", "int8"], typer.Option(help="auto: fp32 on a CPU, bf16 on a GPU")
    ] = "auto",
    fallback: Annotated[
        bool, typer.Option(help="take transformers where ctranslate2 cannot be used; without it, stop with the reason")
    ] = True,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=VALUE",
            help="curate: choose=rouge2, min_rouge2, min_length_ratio, max_length_ratio, max_repetition, "
            "max_copy_rate, agree_with and min_agreement; may be repeated",
        ),
    ] = None,
    metric: Annotated[
        Literal["auto", "rouge2", "bleu"],
        typer.Option(help="of the labels against the originals; auto: the data set's"),
    ] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPUs per teacher, where there is no GPU")] = 1,
    batch_chars: Annotated[
        int | None, typer.Option(min=1, help="source characters of a planned batch, the unit of resume")
    ] = None,
    languages: Annotated[
        tuple[str, str] | None,
        typer.Option(help="source and target for mBART and T5, such as en_XX ro_RO; default: the preset's"),
    ] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="leave out rows without text, and count them")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Label every row of a data set with what the teacher writes for it; killed, the same command goes on.

    `--teacher pegasus` alone means XSUM's training split. Targets are not needed.

    Examples:

        raydistill pseudolabel --teacher marian --dataset my_sentences.jsonl.gz

        raydistill pseudolabel --teacher demo --beams 4 --n-best 4 --keep choose=rouge2 --keep min_rouge2=20
    """
    from raydistill.config.presets import default_dataset
    from raydistill.config.run import Dataset, Decoding, PseudoLabeling

    name = dataset or default_dataset(teacher)
    if name is None:
        raise UserError(f"--teacher {teacher}: say what to label with --dataset (a known name, a file or a folder)")
    if n_best > (beams or n_best):
        raise UserError(f"--n-best {n_best} is more than --beams {beams}")
    pseudo = PseudoLabeling(n_best=n_best, precision=precision, curation=parse_curation(keep or []))
    if rows and split not in ("train", "validation", "test"):
        raise UserError(f"--rows goes with the splits train, validation and test, not with {split!r}")
    caps = {f"{split}_rows": rows} if rows else {}
    data = Dataset(name=name, skip_bad_rows=skip_bad_rows, languages=languages, **caps)
    check_inputs(teacher, data, split)

    from raydistill.cluster.start import cluster_device, ray_cluster
    from raydistill.jobs.pseudolabel import LabelJob
    from raydistill.jobs.pseudolabel import pseudolabel as label
    from raydistill.label_sets.label_set import PSEUDOLABEL_KEYS, read_manifest

    job = LabelJob(teacher, data, split, Decoding(beams=beams), engine, pseudo, metric, threads, batch_chars, fallback)
    with ray_cluster():
        folder = label(job, output or raydistill_home() / "labels", cluster_device())
    manifest = read_manifest(folder, PSEUDOLABEL_KEYS)
    print_progress("")
    print_text(format_table(["label set", folder.name], label_set_rows(manifest)), as_json)
    print_text(f"label set: {folder}", as_json)
    print_json({**manifest, "folder": str(folder)}, as_json)


def parse_curation(keep: list[str]) -> "Curation":
    """The curation that `--keep RULE=VALUE` options ask for; UserError names what is wrong."""
    from pydantic import ValidationError

    from raydistill.config.run import Curation

    pairs = [option.partition("=") for option in keep]
    wrong = [name for name, sign, _ in pairs if not sign or name not in Curation.model_fields]
    if wrong:
        raise UserError(f"--keep {wrong[0]}: expected RULE=VALUE, with one of {', '.join(Curation.model_fields)}")
    try:
        return Curation.model_validate({name: value for name, _, value in pairs})
    except ValidationError as error:
        first = error.errors()[0]
        where = f" {first['loc'][0]}" if first["loc"] else ""
        raise UserError(f"--keep{where}: {first['msg'].removeprefix('Value error, ')}") from None


def label_set_rows(manifest: dict[str, Any]) -> list[list[str]]:
    """What a person wants to know of a label set, as rows of a table."""
    rows = [
        ["rows", str(manifest["rows"])],
        ["empty", str(manifest["empty"])],
        *[[f"dropped: {rule}", str(count)] for rule, count in manifest.get("dropped", {}).items()],
        ["words, mean", f"{manifest['target_words_mean']:.1f}"],
        ["candidates per row", str(manifest.get("n_best", 1))],
        ["engine", manifest["engine"]],
        ["device-hours", f"{manifest['device_hours']:.4f}"],
        *[[f"{name} against the originals", f"{value:.2f}"] for name, value in (manifest["quality"] or {}).items()],
    ]
    return rows + ([["why not ctranslate2", manifest["engine_why"]]] if manifest.get("engine_why") else [])


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
