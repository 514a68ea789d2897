"""`raydistill labels`: list, describe, compare and curate label sets."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import format_table, print_json, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.pseudolabel import label_set_rows, parse_curation

if TYPE_CHECKING:
    from raydistill.label_sets.manifest import PseudolabelManifest

app = make_app()
JsonOption = Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")]
RootOption = Annotated[Path | None, typer.Option(help="folder of the label sets; default: outputs/labels")]
MetricOption = Annotated[str | None, typer.Option(help="metric of the labels; default: the metric of the label set")]
NameArgument = Annotated[str, typer.Argument(help="folder of a label set, its name, or the beginning of its name")]


@app.callback()
def labels() -> None:
    """Label sets: the texts that teachers wrote for the rows of a data set (see `raydistill pseudolabel`).

    With `--json` each command ends with one JSON object on stdout.

    Examples:

        raydistill labels list

        raydistill labels describe demo-train

        raydistill labels compare outputs/labels/SET outputs/labels/OTHER

        raydistill labels curate demo-train --keep min_rouge2=20 --keep max_copy_rate=0.8
    """


@app.command("list")
def list_(root: RootOption = None, as_json: JsonOption = False) -> None:
    """List complete label sets, one per line, and unfinished jobs."""
    from raydistill.label_sets.label_set import list_label_sets

    root = root or raydistill_home() / "labels"
    label_sets, errors = list_label_sets(root)
    unfinished = sorted(path.name[1:].removesuffix(".work") for path in root.glob(".*.work"))
    rows = [
        [folder.name, str(m.rows), m.teacher_name, m.engine, f"{m.device_hours:.3f}", _format_quality(m)]
        for folder, m in label_sets
    ]
    print_text(format_table(["label set", "rows", "teacher", "engine", "device h", "quality"], rows), as_json)
    for error in errors:
        print_text(f"skipped: {error}", as_json)
    for name in unfinished:
        print_text(f"not finished: {name} (run its command again to resume)", as_json)
    records = {folder.name: manifest.to_json() for folder, manifest in label_sets}
    print_json({"label_sets": records, "unfinished": unfinished, "skipped": [str(e) for e in errors]}, as_json)


@app.command()
def describe(
    name: NameArgument,
    root: RootOption = None,
    rows: Annotated[int, typer.Option(min=0, help="number of rows to show")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Show counts, quality, teacher and decoding of a label set, and its first rows."""
    from itertools import islice

    from raydistill.label_sets.label_set import read_candidates, read_pseudolabel_manifest

    folder = find_label_set(name, root)
    manifest = read_pseudolabel_manifest(folder)
    decoding = ", ".join(f"{key} {value}" for key, value in manifest.decoding.items() if value is not None)
    print_text(format_table(["label set", folder.name], label_set_rows(manifest)), as_json)
    print_text(f"teacher: {manifest.teacher.name} ({manifest.teacher.fingerprint})\ndecoding: {decoding}", as_json)
    if manifest.curation is not None:
        rules = ", ".join(f"{rule}={value}" for rule, value in manifest.curation.items())
        print_text(f"curation of {manifest.source_label_set}: {rules}", as_json)
    first = {row_id: candidates for row_id, candidates in islice(read_candidates(folder), rows)}
    for row_id, candidates in first.items():
        for rank, (text, score) in enumerate(candidates):
            print_text(f"  {row_id} [{rank}] {score:.3f} {text}", as_json)
    print_json({**manifest.to_json(), "folder": str(folder), "first": first}, as_json)


@app.command()
def compare(
    first: NameArgument,
    second: NameArgument,
    metric: MetricOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare two label sets of the same data: share of equal labels, scores of the first against the second."""
    from raydistill.label_sets.curation import compare_label_sets
    from raydistill.label_sets.label_set import read_pseudolabel_manifest

    first_dir, second_dir = find_label_set(first, root), find_label_set(second, root)
    chosen_metric = _choose_metric(first_dir, read_pseudolabel_manifest(first_dir), metric)
    comparison = compare_label_sets(first_dir, second_dir, chosen_metric)
    rows = [[name, f"{value:.4g}"] for name, value in comparison.items()]
    print_text(format_table([first_dir.name, "against " + second_dir.name], rows), as_json)
    print_json({"first": str(first_dir), "second": str(second_dir), **comparison}, as_json)


@app.command()
def curate(
    name: NameArgument,
    keep: Annotated[
        list[str], typer.Option(metavar="RULE=VALUE", help="a rule of `raydistill pseudolabel`; may be repeated")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="the data that the set was made for; default: the data named in its manifest")
    ] = None,
    metric: MetricOption = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Derive a curated label set from a complete one, which remains. No text is generated again."""
    from raydistill.config.run import Dataset
    from raydistill.config.validation import validate
    from raydistill.core.artifact import MANIFEST
    from raydistill.label_sets.curation import curate as derive
    from raydistill.label_sets.label_set import read_pseudolabel_manifest

    rules = parse_curation(keep)
    folder = find_label_set(name, root)
    source = read_pseudolabel_manifest(folder)
    if source.data is None:
        raise UserError(f"{folder}: {MANIFEST} lacks data, which `raydistill pseudolabel` writes")
    settings = {**source.data.dataset, **({"name": dataset} if dataset else {})}
    data = validate(Dataset, settings, folder / MANIFEST)
    output_dir = derive(folder, data, source.data.split, rules, _choose_metric(folder, source, metric))
    manifest = read_pseudolabel_manifest(output_dir)
    print_text(format_table(["label set", output_dir.name], label_set_rows(manifest)), as_json)
    print_text(f"label set: {output_dir}", as_json)
    print_json({**manifest.to_json(), "folder": str(output_dir)}, as_json)


def find_label_set(name: str, root: Path | None) -> Path:
    """Resolve a path, a name or the beginning of a name to the folder of a label set.

    If a set and sets that were curated from it match, the set that was not curated is meant.

    Raises:
        UserError: No label set or several label sets match, or a label set that matches is damaged.
    """
    from raydistill.core import artifact
    from raydistill.label_sets.label_set import find_label_set_folders, read_manifest

    if artifact.is_complete(Path(name)):
        return Path(name)
    root = root or raydistill_home() / "labels"
    folders = find_label_set_folders(root)
    matching = [folder for folder in folders if folder.name == name] or [f for f in folders if f.name.startswith(name)]
    if len(matching) > 1:  # the name of a curated set begins like the name of the set that it was derived from
        matching_names = {folder.name for folder in matching}
        matching = [folder for folder in matching if read_manifest(folder).source_label_set not in matching_names]
    if len(matching) != 1:
        reason = "several label sets match" if matching else "no such label set"
        names = ", ".join(folder.name for folder in (matching or folders)) or "none"
        raise UserError(f"{name}: {reason} in {root}: {names}")
    return matching[0]


def _choose_metric(folder: Path, manifest: "PseudolabelManifest", requested: str | None) -> str:
    """The requested metric, else the metric of a label set.

    Raises:
        UserError: The metric is unknown, or is a user's metric that only the label set names.
    """
    from raydistill.config.metric_names import check_recorded_metric
    from raydistill.evaluation.metrics import get_metric

    if requested is None:
        return check_recorded_metric(folder, manifest.metric)
    get_metric(requested)
    return requested


def _format_quality(manifest: "PseudolabelManifest") -> str:
    score = (manifest.quality or {}).get(manifest.metric)
    return "-" if score is None else f"{manifest.metric} {score:.2f}"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.labels import main as entry  # the imported module, so that its classes exist once

    entry()
