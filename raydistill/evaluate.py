"""`raydistill evaluate`: score and time a checkpoint, or compare two checkpoints."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydistill._app import make_app, run_app
from raydistill.config.metric_names import METRICS_HELP
from raydistill.core.console import format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

    from raydistill.config.metric_names import MetricChoice
    from raydistill.config.run import Dataset, Run
    from raydistill.data.corpus import Corpus
    from raydistill.evaluation.disagreement import RowDisagreement
    from raydistill.evaluation.metrics import Comparison
    from raydistill.evaluation.scoring import EvaluationResult
    from raydistill.inference.decoding import EngineOptions
    from raydistill.inference.engines import EngineName

ServingPrecision = Literal["auto", "fp32", "bf16", "fp16", "int8_float16", "int8"]
Device = Literal["auto", "cpu", "cuda"]

app = make_app()
SHOWN_DISAGREEMENTS = 5


@dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Attributes:
        metrics: The metric that decides, and the metrics that are reported next to it.
        corpus: The rows that were scored.
        reports: Scores, outputs and times by checkpoint.
        comparisons: Of two checkpoints, the difference (first - second) by each metric, the deciding metric first.
        disagreements: The rows on which metrics prefer different checkpoints, the largest disagreement first.
    """

    metrics: "MetricChoice"
    corpus: "Corpus"
    reports: "dict[str, CheckpointReport]"
    comparisons: "dict[str, Comparison]" = field(default_factory=dict)
    disagreements: "list[RowDisagreement]" = field(default_factory=list)

    @classmethod
    def create(cls, metrics: "MetricChoice", corpus: "Corpus", reports: "dict[str, CheckpointReport]") -> "Evaluation":
        """The evaluation of one checkpoint, or of two with their comparison by every metric."""
        if len(reports) == 1:
            return cls(metrics, corpus, reports)
        from raydistill.evaluation.disagreement import compare_metrics, find_row_disagreements

        first, second = (report.result.scores for report in reports.values())
        disagreements = find_row_disagreements(first, second, metrics.names)
        return cls(metrics, corpus, reports, compare_metrics(first, second), disagreements)

    @property
    def metric(self) -> str:
        """The deciding metric."""
        return self.metrics.deciding

    @property
    def comparison(self) -> dict[str, float] | None:
        """Difference (first - second) by the deciding metric, 95 % interval and p-value; None for one checkpoint."""
        return asdict(self.comparisons[self.metric]) if self.comparisons else None

    def largest_disagreements(self) -> list[dict[str, Any]]:
        """The rows with the largest disagreements of metrics: id, differences by metric, texts, outputs."""
        corpus = self.corpus
        return [
            {
                "id": corpus.ids[item.row],
                "differences": item.differences,
                "source": corpus.sources[item.row],
                "reference": corpus.targets[item.row],
                "outputs": {name: report.result.predictions[item.row] for name, report in self.reports.items()},
            }
            for item in self.disagreements[:SHOWN_DISAGREEMENTS]
        ]

    def to_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        fields = {
            "metric": self.metric,
            "checkpoints": {name: report.to_json() for name, report in self.reports.items()},
            "comparison": self.comparison,
        }
        if not self.comparisons:
            return fields
        largest = self.largest_disagreements()
        return {
            **fields,
            "comparisons": {name: asdict(comparison) for name, comparison in self.comparisons.items()},
            "disagreements": {"rows": len(self.disagreements), "largest": largest},
        }

    def to_pandas(self) -> "pd.DataFrame":
        """One row per text: id, source, reference, and the output and its score of each checkpoint."""
        import pandas as pd

        rows = [
            {
                "id": line["id"],
                "source": line["source"],
                "reference": line["reference"],
                **{f"output {name}": text for name, text in line["outputs"].items()},
                **{f"{self.metric} {name}": score for name, score in line["scores"].items()},
            }
            for line in self.rows()
        ]
        return pd.DataFrame(rows)

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield id, source and reference of each text, and by checkpoint the output and its score."""
        from raydistill.evaluation.metrics import row_scores

        scores = {name: row_scores(self.metric, r.result.scores.row_stats) for name, r in self.reports.items()}
        for i, row_id in enumerate(self.corpus.ids):
            yield {
                "id": row_id,
                "source": self.corpus.sources[i],
                "reference": self.corpus.targets[i],
                "outputs": {name: report.result.predictions[i] for name, report in self.reports.items()},
                "scores": {name: round(float(values[i]), 4) for name, values in scores.items()},
            }

    def write_predictions(self, path: Path) -> None:
        """Write `rows` as one JSON per line."""
        from raydistill.core.files import write_atomic

        lines = (json.dumps(row, ensure_ascii=False) for row in self.rows())
        write_atomic(path, "".join(f"{line}\n" for line in lines).encode())

    def write_page(self, path: Path) -> Path:
        """Write the page that shows the outputs of two checkpoints side by side, and return its path."""
        from raydistill.core.files import write_atomic
        from raydistill.results.outputs import TextRow
        from raydistill.results.page import render_comparison
        from raydistill.results.samples import make_samples, make_system
        from raydistill.results.tables import metric_name

        assert self.comparisons, "the page compares two checkpoints"
        corpus, reports, split = self.corpus, self.reports, self.corpus.split
        texts = zip(corpus.ids, corpus.sources, corpus.targets, strict=True)
        rows = [TextRow(id=row_id, source=source, reference=target) for row_id, source, target in texts]
        systems = [
            make_system(name, name, self.metric, report.result.scores.row_stats, report.result.predictions)
            for name, report in reports.items()
        ]
        signature = next(iter(reports.values())).signature
        header = [("data", f"{corpus.name}, {split}, {len(rows):,} rows"), ("signature", signature)]
        others = {name: item for name, item in self.comparisons.items() if name != self.metric}
        header += [(f"difference by {metric_name(name)}", _format_comparison(item)) for name, item in others.items()]
        summary = f"First minus second, difference: {_format_comparison(self.comparisons[self.metric])}."
        samples = make_samples(self.metric, f"the {split} split", rows, systems)
        table = _report_table(reports, f"{self.metric} on {split} [95 %]")
        html = render_comparison(" and ".join(reports), summary, header, samples, table)
        write_atomic(path, html.encode())
        return path


def evaluate(  # noqa: PLR0913
    checkpoint: str | Path,
    against: str | Path | None = None,
    *,
    dataset: str | None = None,
    split: str = "test",
    metric: str = "auto",
    report: Sequence[str] = (),
    beams: int | None = None,
    rows: int | None = None,
    engine: "EngineName" = "auto",
    precision: ServingPrecision = "auto",
    threads: int | None = None,
    languages: tuple[str, str] | None = None,
    source_prefix: str | None = None,
    device: Device = "auto",
) -> Evaluation:
    """Score a checkpoint on a split and time it, or compare two checkpoints on the same rows.

    The arguments are the options of `raydistill evaluate`.

    Raises:
        UserError: A checkpoint, the data or a metric do not exist, or the engine cannot load a checkpoint.
    """
    from raydistill.config.presets import check_teacher

    names = [str(name) for name in (checkpoint, against) if name is not None]
    if len(set(names)) < len(names):
        raise UserError(f"{names[0]}: give two different checkpoints to compare")
    for name in names:
        check_teacher(name)
    task = _resolve_task(names[0], dataset, metric, list(report))
    corpus = _load_corpus(task.dataset, split, rows)
    scored = ScoredRows(task.dataset, corpus, task.choose_metrics(corpus))
    print_progress(scored.metrics.describe())

    import torch

    from raydistill.core.machine import available_cores
    from raydistill.inference.decoding import EngineOptions

    options = EngineOptions(
        device=device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu",
        threads=threads or len(available_cores()),
        precision=precision,
        languages=languages,
        source_prefix=source_prefix,
    )
    reports = {name: _evaluate_checkpoint(name, scored, engine, options, beams) for name in names}
    return Evaluation.create(scored.metrics, corpus, reports)


@app.command("evaluate")
def evaluate_command(  # noqa: PLR0913
    checkpoint: Annotated[str, typer.Argument(help="a folder, a hub name or a named teacher such as bart")],
    against: Annotated[str | None, typer.Argument(help="a second checkpoint to compare with")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a named data set, a hub name, a file or a folder; default: the training data")
    ] = None,
    split: Annotated[str, typer.Option(help="which split")] = "test",
    metric: Annotated[str, typer.Option(help=f"{METRICS_HELP}; auto: as in training, else by data set")] = "auto",
    report: Annotated[
        list[str] | None,
        typer.Option(metavar="METRIC", help="a further metric to report; may be repeated; default: as in training"),
    ] = None,
    beams: Annotated[int | None, typer.Option(min=1, help="default: the checkpoint's generation config")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="only the first rows")] = None,
    engine: Annotated[
        Literal["auto", "ctranslate2", "transformers"],
        typer.Option(help="auto: ctranslate2 if it supports the model, else transformers"),
    ] = "auto",
    precision: Annotated[
        ServingPrecision,
        typer.Option(help="auto: as an exported student is served; else fp32 on a CPU, bf16 on a GPU"),
    ] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all cores")] = None,
    languages: Annotated[
        tuple[str, str] | None,
        typer.Option(help="languages of multilingual teachers, such as eng_Latn ron_Latn; default: as in training"),
    ] = None,
    source_prefix: Annotated[
        str | None, typer.Option(help="text before every source, such as 'summarize: '; default: the checkpoint's own")
    ] = None,
    device: Annotated[Device, typer.Option(help="auto: a GPU if available")] = "auto",
    predictions: Annotated[
        Path | None,
        typer.Option(
            help="write source, reference, outputs and scores of each row to this file, one JSON per line; with two "
            "checkpoints also a page that shows both side by side, next to the file"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Score a checkpoint on a split with a 95 % bootstrap interval, and time it on real rows.

    An exported student is scored with the beams, precision and shortlist that it is served with.

    A second checkpoint is compared with the first by a paired bootstrap over the same rows, by every metric. The rows
    on which the metrics disagree are counted, and the largest disagreements are shown.

    Example: `raydistill evaluate outputs/sweeps/quickstart/trials/KEY/best --dataset demo`
    """
    scored = evaluate(
        checkpoint,
        against,
        dataset=dataset,
        split=split,
        metric=metric,
        report=report or (),
        beams=beams,
        rows=rows,
        engine=engine,
        precision=precision,
        threads=threads,
        languages=languages,
        source_prefix=source_prefix,
        device=device,
    )
    _print_reports(scored, f"{scored.metric} on {split} [95 %]", as_json)
    if scored.comparisons:
        _print_comparison(scored, as_json)
    if predictions:
        scored.write_predictions(predictions)
        print_text(f"predictions: {predictions}", as_json)
        if scored.comparisons:
            print_text(f"side by side: {scored.write_page(predictions.with_suffix('.html'))}", as_json)
    print_json({"split": split, **scored.to_json()}, as_json)


@dataclass(frozen=True)
class EvaluationTask:
    """A data set, and the metrics to score it with as they were requested; `metric` may be "auto"."""

    dataset: "Dataset"
    metric: str
    report: list[str]

    def choose_metrics(self, corpus: "Corpus") -> "MetricChoice":
        """The metrics of the data, with modules of the user imported.

        Raises:
            UserError: A metric is unknown, or the module of a user's metric cannot be imported.
        """
        from raydistill.config.presets import resolve_metrics
        from raydistill.evaluation.metrics import get_metric

        choice = resolve_metrics(self.dataset, self.metric, self.report, corpus.columns)
        for name in choice.names:
            get_metric(name)
        return choice


@dataclass(frozen=True)
class ScoredRows:
    """The rows of a data set on which checkpoints are scored, and the metrics of the scores."""

    dataset: "Dataset"
    corpus: "Corpus"
    metrics: "MetricChoice"


@dataclass(frozen=True)
class CheckpointReport:
    """The result of one checkpoint. `params_m`: millions of parameters; `engine`: name and precision."""

    metric: str
    result: "EvaluationResult"
    ms_per_row: float
    engine: str
    params_m: float
    beams: int
    signature: str

    def to_json(self) -> dict[str, Any]:
        """Return the fields for `--json`."""
        return {
            "metrics": self.result.scores.metrics,
            "interval": list(self.result.score_interval),
            "repetition": self.result.repetition_rate,
            "ms_per_row": self.ms_per_row,
            "engine": self.engine,
            "params_m": self.params_m,
            "beams": self.beams,
            "signature": self.signature,
        }

    def table_row(self, name: str) -> list[str]:
        """Return the cells for the table of results."""
        low, high = self.result.score_interval
        score = f"{self.result.scores.metrics[self.metric]:.2f} [{low:.2f}, {high:.2f}]"
        return [name, score, f"{self.ms_per_row:.2f}", self.engine, f"{self.params_m:.1f}"]


def _resolve_task(checkpoint: str, name: str | None, metric: str, report: list[str]) -> EvaluationTask:
    """Return the requested data set and metrics; the default is the checkpoint's training run.

    Raises:
        UserError: The data set is unknown, or the training run used a metric of a user, whose code the metadata of a
            checkpoint cannot start.
    """
    from raydistill.config.metric_names import AUTO, check_recorded_metric, is_own_metric
    from raydistill.config.presets import default_dataset
    from raydistill.config.run import Dataset

    try:
        run = load_checkpoint_run(checkpoint)
    except UserError as error:
        if name is None:
            raise UserError(f"{error}; give --dataset") from None
        run = None
    dataset_name = name or (run.dataset.name if run else default_dataset(checkpoint))
    if dataset_name is None:
        raise UserError(
            f"{checkpoint}: give the data set to score it on with --dataset (a named data set, a hub name, a file or a "
            f"folder)"
        )
    if run is None or run.dataset.name != dataset_name:
        return EvaluationTask(Dataset(name=dataset_name), metric, report)
    if metric == AUTO:
        metric = check_recorded_metric(checkpoint, run.evaluation.metric)
    trained_report = [other for other in run.evaluation.report if not is_own_metric(other)]
    return EvaluationTask(run.dataset, metric, report or trained_report)


def load_checkpoint_run(checkpoint: str) -> "Run | None":
    """Return the training run recorded in a checkpoint's metadata, or None if it has none.

    Raises:
        UserError: The metadata is damaged.
    """
    from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata

    metadata = CheckpointMetadata.read_if_present(Path(checkpoint) / METADATA_FILE)
    return metadata.config if metadata else None


def training_languages(checkpoint: str, dataset: "Dataset") -> tuple[str, str] | None:
    """Return the languages that a checkpoint was trained with, whatever data set it is scored on."""
    from raydistill.models.tokenization import resolve_languages

    try:
        run = load_checkpoint_run(checkpoint)
    except UserError:  # damaged metadata is no error here, because --dataset replaces it
        run = None
    return resolve_languages(run.teacher, run.dataset) if run else resolve_languages(checkpoint, dataset)


def serving_options(checkpoint: str, options: "EngineOptions") -> "EngineOptions":
    """Return the options with the shortlist of an exported student, and its precision if none was requested."""
    from raydistill.models.metadata import METADATA_FILE, CheckpointMetadata

    try:
        metadata = CheckpointMetadata.read_if_present(Path(checkpoint) / METADATA_FILE)
    except UserError:  # as in `training_languages`
        metadata = None
    if metadata is None or metadata.serving is None:
        return options
    serving = metadata.serving
    return replace(
        options,
        precision=serving.config.precision if options.precision == "auto" else options.precision,
        shortlist=Path(checkpoint) / serving.vocabulary_map if serving.vocabulary_map else None,
    )


def _load_corpus(dataset: "Dataset", split: str, rows: int | None) -> "Corpus":
    from raydistill.data.corpus import check_split, read_corpus

    check_split(dataset, split)
    corpus = read_corpus(dataset, split)
    return corpus.head(rows) if rows else corpus


def _evaluate_checkpoint(
    checkpoint: str,
    rows: ScoredRows,
    engine_name: "EngineName",
    options: "EngineOptions",
    beams: int | None,
) -> CheckpointReport:
    """Score and time one checkpoint on the rows."""
    from raydistill.config.presets import teacher_preset
    from raydistill.config.run import Decoding
    from raydistill.evaluation.metrics import signatures
    from raydistill.evaluation.scoring import evaluate as score
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.inference.engines import open_engine
    from raydistill.models.families import count_parameters
    from raydistill.models.loading import load_config, locate_checkpoint
    from raydistill.models.tokenization import load_target_generation_config, resolve_max_tokens

    preset = teacher_preset(checkpoint, rows.dataset.name)
    location = locate_checkpoint(checkpoint, rows.dataset.name)
    config = load_config(location)
    options = replace(options, languages=options.languages or training_languages(checkpoint, rows.dataset))
    beam = resolve_decoding(
        Decoding(beams=beams),
        load_target_generation_config(location, options.languages, options.source_prefix),
        preset.decoding if preset else None,
        resolve_max_tokens("max_target_tokens", rows.dataset, preset, config),
    )
    print_progress(f"{checkpoint}: {len(rows.corpus)} rows, {'1 beam' if beam.beams == 1 else f'{beam.beams} beams'}")
    options = serving_options(checkpoint, options)
    engine = open_engine(location, engine_name, options, log=print_progress)
    max_source_tokens = resolve_max_tokens("max_source_tokens", rows.dataset, preset, config)
    result = score(engine, rows.corpus, rows.metrics, beam, max_source_tokens=max_source_tokens)
    return CheckpointReport(
        metric=rows.metrics.deciding,
        result=result,
        ms_per_row=1000 * result.seconds / len(rows.corpus),
        engine=result.engine,
        params_m=count_parameters(config) / 1e6,
        beams=beam.beams,
        signature=signatures(rows.metrics.names),
    )


def _print_reports(evaluation: Evaluation, score_title: str, as_json: bool) -> None:
    reports = evaluation.reports
    print_text(format_table(*_report_table(reports, score_title)), as_json)
    scores = [report.result.scores.metrics for report in reports.values()]
    header = ["metric", *(reports if len(reports) > 1 else ["score"])]
    rows = [[name, *(f"{values[name]:.2f}" for values in scores)] for name in scores[0]]
    print_text(format_table(header, rows), as_json)
    print_text(f"signature: {next(iter(reports.values())).signature}", as_json)


def _print_comparison(evaluation: Evaluation, as_json: bool) -> None:
    """Print the difference by every metric, and where the metrics disagree."""
    from raydistill.evaluation.disagreement import opposed_metrics

    names = list(evaluation.reports)
    rows = [[name, *_comparison_cells(comparison)] for name, comparison in evaluation.comparisons.items()]
    print_text(format_table(["difference", f"{names[0]} - {names[1]} [95 %]", "p", "verdict"], rows), as_json)
    prefer_first, prefer_second = opposed_metrics(evaluation.comparisons)
    if prefer_first and prefer_second:
        print_text(
            f"the metrics disagree: better by {', '.join(prefer_first)}: {names[0]}; better by "
            f"{', '.join(prefer_second)}: {names[1]}",
            as_json,
        )
    if evaluation.disagreements:
        count, total = len(evaluation.disagreements), len(evaluation.corpus)
        print_text(f"{', '.join(evaluation.metrics.names)} disagree on {count} of {total} rows", as_json)
    for row in evaluation.largest_disagreements():
        differences = ", ".join(f"{name} {value:+.1f}" for name, value in row["differences"].items())
        print_text(f"  row {row['id']}: {differences}", as_json)
        for name, text in {"reference": row["reference"], **row["outputs"]}.items():
            print_text(f"    {name}: {text}", as_json)


def _report_table(reports: dict[str, CheckpointReport], score_title: str) -> tuple[list[str], list[list[str]]]:
    rows = [report.table_row(name) for name, report in reports.items()]
    return ["checkpoint", score_title, "ms per row", "engine", "params M"], rows


def _comparison_cells(comparison: "Comparison") -> list[str]:
    """Difference with its interval, p-value, and verdict."""
    low, high = comparison.low, comparison.high
    verdict = "not distinguishable" if low <= 0 <= high else "distinguishable"
    return [f"{comparison.difference:+.2f} [{low:+.2f}, {high:+.2f}]", f"{comparison.p_value:.3f}", verdict]


def _format_comparison(comparison: "Comparison") -> str:
    difference, p_value, verdict = _comparison_cells(comparison)
    return f"{difference}, p {p_value}: {verdict}"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.evaluate import main as entry

    entry()
