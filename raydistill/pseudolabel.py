"""`raydistill pseudolabel`: label a data set with the beam search of a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydistill._app import make_app, run_app
from raydistill.config.metric_names import AUTO, METRICS_HELP
from raydistill.core.console import format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home

if TYPE_CHECKING:
    import pandas as pd

    from raydistill.config.run import Curation, Dataset
    from raydistill.label_sets.manifest import PseudolabelManifest

EngineName = Literal["auto", "ctranslate2", "transformers"]
LabelPrecision = Literal["auto", "fp32", "bf16", "fp16", "int8"]
OverlapPolicy = Literal["reject", "drop"]

app = make_app()


@dataclass(frozen=True)
class LabelResult:
    """The result of `pseudolabel`.

    Attributes:
        folder: The label set.
        manifest: Its numbers: rows, dropped rows, quality, device-hours.
    """

    folder: Path
    manifest: "PseudolabelManifest"

    def to_pandas(self) -> "pd.DataFrame":
        """One row per label: id, label, and its rank and score among the candidates of the row."""
        import pandas as pd

        from raydistill.label_sets.label_set import read_candidates

        rows = [
            {"id": row_id, "rank": rank, "label": candidate.target, "score": candidate.score}
            for row_id, candidates in read_candidates(self.folder)
            for rank, candidate in enumerate(candidates)
        ]
        return pd.DataFrame(rows, columns=["id", "rank", "label", "score"])


def pseudolabel(  # noqa: PLR0913
    teacher: str,
    dataset: str | None = None,
    *,
    split: str = "train",
    extra: str | None = None,
    extra_overlap: OverlapPolicy = "reject",
    output: Path | None = None,
    beams: int | None = None,
    rows: int | None = None,
    n_best: int = 1,
    engine: EngineName = "auto",
    precision: LabelPrecision = "auto",
    fallback: bool = True,
    allow_repetitive: bool = False,
    keep: "Mapping[str, Any] | Curation | None" = None,
    metric: str = "auto",
    threads: int = 1,
    batch_chars: int | None = None,
    languages: tuple[str, str] | None = None,
    source_prefix: str | None = None,
    skip_bad_rows: bool = False,
) -> LabelResult:
    """Label every row of a data set with the output of a teacher. If killed, the same call resumes.

    The arguments are the options of `raydistill pseudolabel`; `keep` are rules of curation by name, such as
    `{"min_rouge2": 20}`.

    Raises:
        UserError: An argument is not valid, or teacher, data or metric do not exist.
    """
    from raydistill.config.presets import default_dataset
    from raydistill.config.run import Curation, Dataset, Decoding, PseudoLabeling
    from raydistill.evaluation.metrics import get_metric

    name = dataset or default_dataset(teacher)
    if name is None:
        raise UserError(
            f"--teacher {teacher}: name the data with --dataset (a named data set, a hub name, a file or a folder)"
        )
    if n_best > (beams or n_best):
        raise UserError(f"--n-best {n_best} is more than --beams {beams}")
    curation = keep if isinstance(keep, Curation) else make_curation(keep or {})
    pseudo = PseudoLabeling(n_best=n_best, precision=precision, curation=curation)
    if rows and split not in ("train", "validation", "test"):
        raise UserError(f"--rows applies to the splits train, validation and test, not to {split!r}")
    row_limits = {f"{split}_rows": rows} if rows and not extra else {}
    data = Dataset(
        name=name, skip_bad_rows=skip_bad_rows, languages=languages, source_prefix=source_prefix, **row_limits
    )
    check_inputs(teacher, data, split)
    if metric != AUTO:
        get_metric(metric)  # the metric exists, and the module of a user's metric can be imported
    sources = prepare_extra(data, extra, rows, extra_overlap) if extra else None

    from raydistill.cluster.start import cluster_device, ray_cluster
    from raydistill.jobs.pseudolabel import LabelJob
    from raydistill.jobs.pseudolabel import pseudolabel as run_job
    from raydistill.label_sets.label_set import read_pseudolabel_manifest

    job = LabelJob(
        teacher,
        data,
        split,
        Decoding(beams=beams),
        engine,
        pseudo,
        metric,
        threads,
        batch_chars,
        allow_fallback=fallback,
        allow_repetitive=allow_repetitive,
        sources=sources,
    )
    with ray_cluster():
        folder = run_job(job, output or raydistill_home() / "labels", cluster_device())
    return LabelResult(folder, read_pseudolabel_manifest(folder))


@app.command("pseudolabel")
def pseudolabel_command(  # noqa: PLR0913
    teacher: Annotated[str, typer.Option(help="a named teacher (such as bart, nllb or demo), a hub name or a path")],
    dataset: Annotated[
        str | None,
        typer.Option(help="a named data set, a hub name, a file or a folder; default: the teacher's data set"),
    ] = None,
    split: Annotated[str, typer.Option(help="the split to label")] = "train",
    extra: Annotated[
        str | None,
        typer.Option(
            help="label these texts (a file, a folder or a hub name) as pseudo.extra of a run on the data set does: "
            "without rows of its training split, and checked against its validation and test splits"
        ),
    ] = None,
    extra_overlap: Annotated[
        Literal["reject", "drop"],
        typer.Option(help="near duplicates of validation and test rows: an error, or left out"),
    ] = "reject",
    output: Annotated[Path | None, typer.Option(help="folder of the label sets; default: outputs/labels")] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="default: from the checkpoint, else from the preset")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="label the first rows only")] = None,
    n_best: Annotated[int, typer.Option(min=1, help="candidates kept per row, at most as many as beams")] = 1,
    engine: Annotated[
        EngineName,
        typer.Option(help="auto: ctranslate2 if it can load the model, else transformers"),
    ] = "auto",
    precision: Annotated[LabelPrecision, typer.Option(help="auto: fp32 on a CPU, bf16 on a GPU")] = "auto",
    fallback: Annotated[
        bool, typer.Option(help="use transformers if ctranslate2 cannot be used; without it, stop with the reason")
    ] = True,
    allow_repetitive: Annotated[
        bool, typer.Option("--allow-repetitive", help="keep labels of which most repeat themselves")
    ] = False,
    keep: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE=VALUE",
            help="curate: choose=rouge2 or chrf, min_rouge2, min_length_ratio and max_length_ratio compare with the "
            "original; min_score, min_source_ratio, max_source_ratio, source_language, target_language, "
            "max_repetition, max_copy_rate, reverse_model and max_reverse_loss need no original; agree_with and "
            "min_agreement compare with another teacher; may be repeated",
        ),
    ] = None,
    metric: Annotated[
        str,
        typer.Option(help=f"metric of the labels against the original targets: {METRICS_HELP}; auto: by data set"),
    ] = "auto",
    threads: Annotated[int, typer.Option(min=1, help="CPUs per teacher on machines without a GPU")] = 1,
    batch_chars: Annotated[
        int | None, typer.Option(min=1, help="source characters of a planned batch, the unit of resume")
    ] = None,
    languages: Annotated[
        tuple[str, str] | None,
        typer.Option(help="languages of multilingual teachers, such as eng_Latn ron_Latn; default: from the preset"),
    ] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="text before every source, such as 'summarize: '; default: the teacher's own")
    ] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="skip and count rows without text")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Label every row of a data set with the output of the teacher. If killed, the same command resumes.

    `--teacher pegasus` alone labels the training split of XSUM. The data needs no targets.

    Examples:

        raydistill pseudolabel --teacher marian --dataset my_sentences.jsonl.gz

        raydistill pseudolabel --teacher my_teacher --dataset my_news/ --extra more_news.jsonl.gz

        raydistill pseudolabel --teacher demo --beams 4 --n-best 4 --keep choose=rouge2 --keep min_rouge2=20
    """
    labelled = pseudolabel(
        teacher,
        dataset,
        split=split,
        extra=extra,
        extra_overlap=extra_overlap,
        output=output,
        beams=beams,
        rows=rows,
        n_best=n_best,
        engine=engine,
        precision=precision,
        fallback=fallback,
        allow_repetitive=allow_repetitive,
        keep=parse_curation(keep or []),
        metric=metric,
        threads=threads,
        batch_chars=batch_chars,
        languages=languages,
        source_prefix=source_prefix,
        skip_bad_rows=skip_bad_rows,
    )
    folder, manifest = labelled.folder, labelled.manifest
    print_progress("")
    print_text(format_table(["label set", folder.name], label_set_rows(manifest)), as_json)
    print_text(f"label set: {folder}", as_json)
    print_json({**manifest.to_json(), "folder": str(folder)}, as_json)


def prepare_extra(dataset: "Dataset", name: str, rows: int | None, overlap: Literal["reject", "drop"]) -> "Dataset":
    """The extra sources with a name, without the rows that repeat rows of a data set; `rows` limits their number.

    Raises:
        UserError: The texts cannot be read, or overlap with the evaluation splits.
    """
    from raydistill.cluster import snapshots
    from raydistill.config.run import ExtraSources
    from raydistill.data.extra import ensure_extra, extra_dataset

    extra = ExtraSources(name=name, skip_bad_rows=dataset.skip_bad_rows)
    folder = ensure_extra(dataset, extra, raydistill_home() / "extra", max_rows=rows, overlap=overlap)
    snapshots.save(folder)
    return extra_dataset(folder)


def parse_curation(options: list[str]) -> "Curation":
    """Parse `--keep RULE=VALUE` options.

    Raises:
        UserError: An option is no RULE=VALUE, the rule is unknown, or the value is invalid.
    """
    from raydistill.config.run import Curation

    pairs = [option.partition("=") for option in options]
    unknown = [name for name, sign, _ in pairs if not sign or name not in Curation.model_fields]
    if unknown:
        raise UserError(f"--keep {unknown[0]}: expected RULE=VALUE, with one of {', '.join(Curation.model_fields)}")
    return make_curation({name: value for name, _, value in pairs})


def make_curation(rules: Mapping[str, Any]) -> "Curation":
    """The rules of curation by name.

    Raises:
        UserError: A rule is unknown, or its value is invalid.
    """
    from pydantic import ValidationError

    from raydistill.config.run import Curation

    try:
        return Curation.model_validate(dict(rules))
    except ValidationError as error:
        first = error.errors()[0]
        rule = f" {first['loc'][0]}" if first["loc"] else ""
        raise UserError(f"--keep{rule}: {first['msg'].removeprefix('Value error, ')}") from None


def label_set_rows(manifest: "PseudolabelManifest") -> list[list[str]]:
    """The rows of a table that summarises a label set."""
    rows = [
        ["rows", str(manifest.rows)],
        ["empty", str(manifest.empty)],
        *[[f"dropped: {rule}", str(count)] for rule, count in manifest.dropped.items()],
        ["words, mean", f"{manifest.target_words_mean:.1f}"],
        ["candidates per row", str(manifest.n_best)],
        ["engine", manifest.engine],
        ["device-hours", f"{manifest.device_hours:.4f}"],
        *[[f"{name} against the originals", f"{value:.2f}"] for name, value in (manifest.quality or {}).items()],
    ]
    reason = manifest.engine_fallback_reason
    return [*rows, ["reason for transformers", reason]] if reason else rows


def check_inputs(teacher: str, dataset: "Dataset", split: str) -> None:
    """Check what can be checked at once: the teacher is known or exists, and the data exists and has the split.

    Raises:
        UserError: A check fails.
    """
    from raydistill.config.presets import check_teacher
    from raydistill.data.corpus import check_split

    check_teacher(teacher)
    if Path(dataset.name).exists() or dataset.name == "demo":
        check_split(dataset, split)


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.pseudolabel import main as entry

    entry()
