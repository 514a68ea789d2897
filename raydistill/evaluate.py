"""`raydistill evaluate`: score and time a checkpoint, or two against each other."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from raydistill.core.console import finish, make_app, progress, run_app, show, table
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
    about = dataset_of(checkpoint, dataset, metric) | {"languages": languages}
    corpus = _corpus(about["dataset"], split, rows)

    import torch

    from raydistill.core.machine import own_cores
    from raydistill.evaluation.metrics import paired_bootstrap

    used = threads or len(own_cores())
    names = [checkpoint, *([against] if against else [])]
    place = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    found = [_score(name, about, corpus, engine, precision, used, beams, place) for name in names]
    header = ["checkpoint", f"{about['metric']} on {split} [95 %]", "ms per row", "engine", "params M"]
    show(table(header, [_row(*pair, about["metric"]) for pair in zip(names, found, strict=True)]), as_json)
    for name, value in found[0]["metrics"].items():
        show(f"  {name} {value:.2f}", as_json)
    show(f"signature: {found[0]['signature']}", as_json)
    comparison = None
    if against:
        c = paired_bootstrap(about["metric"], found[0]["rows"], found[1]["rows"])
        comparison = {"difference": c.difference, "low": c.low, "high": c.high, "p": c.p}
        verdict = "not distinguishable" if c.low <= 0 <= c.high else "distinguishable"
        show(f"difference: {c.difference:+.2f} [{c.low:+.2f}, {c.high:+.2f}], p {c.p:.3f}: {verdict}", as_json)
    if predictions:
        _write(predictions, corpus, names, found)
        show(f"predictions: {predictions}", as_json)
    data = [{k: v for k, v in one.items() if k not in ("rows", "predictions")} for one in found]
    finish({"split": split, "checkpoints": dict(zip(names, data, strict=True)), "comparison": comparison}, as_json)


def dataset_of(checkpoint: str, name: str | None, metric: str) -> dict[str, Any]:
    """The data set and the metric: as asked, else as the checkpoint's card tells."""
    from raydistill.config.presets import default_dataset, metric_for
    from raydistill.config.run import Dataset

    try:
        run = run_of(checkpoint)
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
    return {"dataset": dataset, "metric": metric_for(wanted, metric)}


def run_of(checkpoint: str) -> "Run | None":
    """The run that made a checkpoint, from its card; None where there is none. A UserError where it is damaged."""
    from raydistill.config.run import Run
    from raydistill.core.files import CARD, read_json

    path = Path(checkpoint) / CARD
    try:
        card = read_json(path) if path.is_file() else {}
        return Run.model_validate(card["config"]) if "config" in card else None
    except (ValueError, UserError) as error:
        raise UserError(f"{path}: damaged, or of another version ({error})") from None


def languages_trained_with(checkpoint: str, dataset: "Dataset") -> tuple[str, str] | None:
    """A student's languages are those of the run that made it, whatever it is scored on."""
    from raydistill.models.loading import languages_of

    try:
        run = run_of(checkpoint)
    except UserError:  # `--dataset` was given in its place
        run = None
    return languages_of(run.teacher, run.dataset) if run else languages_of(checkpoint, dataset)


def _corpus(dataset: Any, split: str, rows: int | None) -> Any:
    from raydistill.data.corpus import check_split, read_corpus

    check_split(dataset, split)
    corpus = read_corpus(dataset, split)
    return corpus.head(rows) if rows else corpus


def _score(
    checkpoint: str,
    about: dict[str, Any],
    corpus: Any,
    kind: Any,
    precision: str,
    threads: int,
    beams: int | None,
    device: str,
) -> dict[str, Any]:
    """Everything about one checkpoint on the corpus."""
    from raydistill.config.presets import teacher_preset
    from raydistill.config.run import Decoding
    from raydistill.evaluation.checkpoint import evaluate as score
    from raydistill.evaluation.latency import parameters
    from raydistill.evaluation.metrics import signature
    from raydistill.inference.decoding import resolve_decoding
    from raydistill.inference.engines import open_engine
    from raydistill.models.loading import load_config, load_generation_config, locate, max_tokens

    preset = teacher_preset(checkpoint, about["dataset"].name)
    where = locate(checkpoint, about["dataset"].name)
    config = load_config(where)
    beam = resolve_decoding(
        Decoding(beams=beams),
        load_generation_config(where),
        preset.decoding if preset else None,
        max_tokens("max_target_tokens", about["dataset"], preset, config),
    )
    progress(f"{checkpoint}: {len(corpus)} rows, {beam.beams} beams")
    engine = open_engine(
        where,
        kind,
        device=device,
        threads=threads,
        precision=precision,
        languages=about["languages"] or languages_trained_with(checkpoint, about["dataset"]),
        say=progress,
    )
    limit = max_tokens("max_source_tokens", about["dataset"], preset, config)
    found = score(engine, corpus.sources, corpus.targets, about["metric"], beam, max_source_tokens=limit)
    return {
        "metrics": found.scored.metrics,
        "interval": list(found.interval),
        "repetition": found.repetition,
        "rows": found.scored.rows,
        "predictions": found.predictions,
        "ms_per_row": 1000 * found.seconds / len(corpus),
        "engine": f"{engine.name} {engine.precision}",
        "params_m": parameters(config) / 1e6,
        "beams": beam.beams,
        "signature": signature(about["metric"]),
    }


def _row(name: str, one: dict[str, Any], metric: str) -> list[str]:
    """One checkpoint's line of the table."""
    low, high = one["interval"]
    score = f"{one['metrics'][metric]:.2f} [{low:.2f}, {high:.2f}]"
    return [name, score, f"{one['ms_per_row']:.2f}", one["engine"], f"{one['params_m']:.1f}"]


def _write(path: Path, corpus: Any, names: list[str], found: list[dict[str, Any]]) -> None:
    import json

    from raydistill.core.files import write_atomic

    lines = []
    for i, row_id in enumerate(corpus.ids):
        outputs = {name: one["predictions"][i] for name, one in zip(names, found, strict=True)}
        lines.append(json.dumps({"id": row_id, "target": corpus.targets[i], **outputs}, ensure_ascii=False))
    write_atomic(path, ("\n".join(lines) + "\n").encode())


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.evaluate import main as entry

    entry()
