"""`raydistill evaluate`: score and time a checkpoint, or two against each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import format_table, print_json, print_progress, print_text
from raydistill.core.errors import UserError

if TYPE_CHECKING:
    from raydistill.config.run import Dataset, Run

app = make_app()


@app.command()
def evaluate(
    checkpoint: Annotated[str, typer.Argument(help="a folder, a hub name or a known name")],
    against: Annotated[str | None, typer.Argument(help="a second checkpoint to compare with")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="a known name, a hub name, a file or a folder; default: what it was trained on")
    ] = None,
    split: Annotated[str, typer.Option(help="which split")] = "test",
    metric: Annotated[
        Literal["auto", "rouge2", "bleu"], typer.Option(help="auto: bleu where the data set translates")
    ] = "auto",
    beams: Annotated[int | None, typer.Option(min=1, help="default: the checkpoint's own")] = None,
    rows: Annotated[int | None, typer.Option(min=1, help="only the first rows")] = None,
    engine: Annotated[
        Literal["auto", "ctranslate2", "transformers"], typer.Option(help="auto: ctranslate2 where it loads the model")
    ] = "auto",
    precision: Annotated[Literal["auto", "fp32", "bf16", "int8"], typer.Option(help="of the engine")] = "auto",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; default: all")] = None,
    languages: Annotated[
        tuple[str, str] | None,
        typer.Option(help="source and target for mBART and T5, such as en_XX ro_RO; default: as it was trained"),
    ] = None,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="auto: a GPU where there is one")] = "auto",
    predictions: Annotated[Path | None, typer.Option(help="write what it wrote, one JSON object a row")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")] = False,
) -> None:
    """Score a checkpoint on a split, with a 95 % bootstrap interval, and time it on real rows.

    With two checkpoints their difference is a paired bootstrap over the same rows.

    Example: `raydistill evaluate outputs/sweeps/quickstart/trials/KEY/best --dataset demo`
    """
    from raydistill.config.presets import check_teacher

    for name in (checkpoint, *([against] if against else [])):
        check_teacher(name)
    about = resolve_dataset(checkpoint, dataset, metric) | {"languages": languages}
    corpus = _load_corpus(about["dataset"], split, rows)

    import torch

    from raydistill.core.machine import available_cores
    from raydistill.evaluation.metrics import paired_bootstrap

    used = threads or len(available_cores())
    names = [checkpoint, *([against] if against else [])]
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    found = [_evaluate_checkpoint(name, about, corpus, engine, precision, used, beams, place) for name in names]
    header = ["checkpoint", f"{about['metric']} on {split} [95 %]", "ms per row", "engine", "params M"]
    print_text(
        format_table(header, [_table_row(*pair, about["metric"]) for pair in zip(names, found, strict=True)]), as_json
    )
    for name, value in found[0]["metrics"].items():
        print_text(f"  {name} {value:.2f}", as_json)
    print_text(f"signature: {found[0]['signature']}", as_json)
    comparison = None
    if against:
        c = paired_bootstrap(about["metric"], found[0]["rows"], found[1]["rows"])
        comparison = {"difference": c.difference, "low": c.low, "high": c.high, "p": c.p}
        verdict = "not distinguishable" if c.low <= 0 <= c.high else "distinguishable"
        print_text(f"difference: {c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}], p {c.p:.3f}: {verdict}", as_json)
    if predictions:
        _write_predictions(predictions, corpus, names, found)
        print_text(f"predictions: {predictions}", as_json)
    data = [{k: v for k, v in one.items() if k not in ("rows", "predictions")} for one in found]
    print_json({"split": split, "checkpoints": dict(zip(names, data, strict=True)), "comparison": comparison}, as_json)


def resolve_dataset(checkpoint: str, name: str | None, metric: str) -> dict[str, Any]:
    """The data set and the metric: as asked, else as the checkpoint's card tells."""
    from raydistill.config.presets import default_dataset, resolve_metric
    from raydistill.config.run import Dataset

    try:
        run = load_checkpoint_run(checkpoint)
    except UserError as error:
        if name is None:
            raise UserError(f"{error}; give --dataset") from None
        run = None
    wanted = name or (run.dataset.name if run else default_dataset(checkpoint))
    if wanted is None:
        raise UserError(f"{checkpoint}: say what to score it on with --dataset (a known name, a file or a folder)")
    same = run is not None and run.dataset.name == wanted
    dataset = run.dataset if run is not None and same else Dataset(name=wanted)
    if metric == "auto" and run is not None and same and run.evaluation.metric != "auto":
        metric = run.evaluation.metric
    return {"dataset": dataset, "metric": resolve_metric(wanted, metric)}


def load_checkpoint_run(checkpoint: str) -> "Run | None":
    """The run that made a checkpoint, from its card; None where there is none. A UserError where it is damaged."""
    from raydistill.config.run import Run
    from raydistill.core.files import CHECKPOINT_METADATA, read_json

    path = Path(checkpoint) / CHECKPOINT_METADATA
    try:
        card = read_json(path) if path.is_file() else {}
        return Run.model_validate(card["config"]) if "config" in card else None
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error})") from None


def training_languages(checkpoint: str, dataset: "Dataset") -> tuple[str, str] | None:
    """A student's languages are those of the run that made it, whatever it is scored on."""
    from raydistill.models.loading import resolve_languages

    try:
        run = load_checkpoint_run(checkpoint)
    except UserError:  # `--dataset` was given in its place
        run = None
    return resolve_languages(run.teacher, run.dataset) if run else resolve_languages(checkpoint, dataset)


def _load_corpus(dataset: Any, split: str, rows: int | None) -> Any:
    from raydistill.data.corpus import check_split, read_corpus

    check_split(dataset, split)
    corpus = read_corpus(dataset, split)
    return corpus.head(rows) if rows else corpus


def _evaluate_checkpoint(
    checkpoint: str,
    task: dict[str, Any],
    corpus: Any,
    engine_kind: Any,
    precision: str,
    threads: int,
    beams: int | None,
    device: str,
) -> dict[str, Any]:
    """Everything about one checkpoint on the corpus."""
    from raydistill.config.presets import teacher_preset
    from raydistill.config.run import Decoding
    from raydistill.evaluation.latency import count_parameters
    from raydistill.evaluation.metrics import signature
    from raydistill.evaluation.scoring import evaluate as score
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.inference.engines import open_engine
    from raydistill.models.loading import load_config, load_generation_config, locate_checkpoint, resolve_max_tokens

    preset = teacher_preset(checkpoint, task["dataset"].name)
    where = locate_checkpoint(checkpoint, task["dataset"].name)
    config = load_config(where)
    beam = resolve_decoding(
        Decoding(beams=beams),
        load_generation_config(where),
        preset.decoding if preset else None,
        resolve_max_tokens("max_target_tokens", task["dataset"], preset, config),
    )
    print_progress(f"{checkpoint}: {len(corpus)} rows, {beam.beams} beams")
    engine = open_engine(
        where,
        engine_kind,
        device=device,
        threads=threads,
        precision=precision,
        languages=task["languages"] or training_languages(checkpoint, task["dataset"]),
        log=print_progress,
    )
    limit = resolve_max_tokens("max_source_tokens", task["dataset"], preset, config)
    found = score(engine, corpus.sources, corpus.targets, task["metric"], beam, max_source_tokens=limit)
    return {
        "metrics": found.scored.metrics,
        "interval": list(found.interval),
        "repetition": found.repetition,
        "rows": found.scored.rows,
        "predictions": found.predictions,
        "ms_per_row": 1000 * found.seconds / len(corpus),
        "engine": f"{engine.name} {engine.precision}",
        "params_m": count_parameters(config) / 1e6,
        "beams": beam.beams,
        "signature": signature(task["metric"]),
    }


def _table_row(name: str, result: dict[str, Any], metric: str) -> list[str]:
    """One checkpoint's line of the table."""
    low, high = result["interval"]
    score = f"{result['metrics'][metric]:.2f} [{low:.2f}, {high:.2f}]"
    return [name, score, f"{result['ms_per_row']:.2f}", result["engine"], f"{result['params_m']:.1f}"]


def _write_predictions(path: Path, corpus: Any, names: list[str], results: list[dict[str, Any]]) -> None:
    import json

    from raydistill.core.files import write_atomic

    lines = []
    for i, row_id in enumerate(corpus.ids):
        outputs = {name: one["predictions"][i] for name, one in zip(names, results, strict=True)}
        lines.append(json.dumps({"id": row_id, "target": corpus.targets[i], **outputs}, ensure_ascii=False))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.evaluate import main as entry

    entry()
