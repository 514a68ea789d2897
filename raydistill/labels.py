"""`raydistill labels`: which label sets are there, what is in them, how two differ, and curated ones made of them."""

from pathlib import Path
from typing import Annotated

import typer

from raydistill._app import make_app, run_app
from raydistill.core.console import format_table, print_json, print_text
from raydistill.core.errors import UserError
from raydistill.core.paths import raydistill_home
from raydistill.pseudolabel import label_set_rows, parse_curation

app = make_app()
JsonOption = Annotated[bool, typer.Option("--json", help="end with one JSON object on stdout")]
RootOption = Annotated[Path | None, typer.Option(help="where label sets are; default: outputs/labels")]
NameArgument = Annotated[str, typer.Argument(help="a label set's folder, or its name or the name's beginning")]


@app.callback()
def labels() -> None:
    """Label sets: what teachers wrote for the rows of a data set (made by `raydistill pseudolabel`).

    With `--json` each of these ends with one JSON object on stdout.

    Examples:

        raydistill labels list

        raydistill labels describe demo-train

        raydistill labels compare outputs/labels/SET outputs/labels/OTHER

        raydistill labels curate demo-train --keep min_rouge2=20 --keep max_copy_rate=0.8
    """


@app.command("list")
def list_(root: RootOption = None, as_json: JsonOption = False) -> None:
    """The finished label sets, one a line, and jobs that were begun and not ended."""
    from raydistill.label_sets.label_set import list_label_sets

    place = root or raydistill_home() / "labels"
    found, wrong = list_label_sets(place)
    begun = sorted(path.name[1:].removesuffix(".work") for path in place.glob(".*.work"))
    rows = [
        [folder.name, str(m["rows"]), m["teacher"]["name"], m["engine"], f"{m['device_hours']:.3f}", _format_quality(m)]
        for folder, m in found
    ]
    print_text(format_table(["label set", "rows", "teacher", "engine", "device h", "quality"], rows), as_json)
    for error in wrong:
        print_text(f"skipped: {error}", as_json)
    for name in begun:
        print_text(f"not finished: {name} (run its command again to go on)", as_json)
    sets = {folder.name: manifest for folder, manifest in found}
    print_json({"label_sets": sets, "unfinished": begun, "skipped": [str(error) for error in wrong]}, as_json)


@app.command()
def describe(name: NameArgument, root: RootOption = None, rows: int = 3, as_json: JsonOption = False) -> None:
    """Counts, quality, teacher and decoding of a label set, and its first texts."""
    from itertools import islice

    from raydistill.label_sets.label_set import PSEUDOLABEL_KEYS, read_candidates, read_manifest

    folder = find_label_set(name, root)
    manifest = read_manifest(folder, PSEUDOLABEL_KEYS)
    decoding = ", ".join(f"{key} {value}" for key, value in manifest["decoding"].items() if value is not None)
    print_text(format_table(["label set", folder.name], label_set_rows(manifest)), as_json)
    print_text(
        f"teacher: {manifest['teacher']['name']} ({manifest['teacher']['fingerprint']})\ndecoding: {decoding}", as_json
    )
    if "curation" in manifest:
        rules = ", ".join(f"{rule}={value}" for rule, value in manifest["curation"].items())
        print_text(f"curation of {manifest.get('of')}: {rules}", as_json)
    first = {row_id: candidates for row_id, candidates in islice(read_candidates(folder), rows)}
    for row_id, candidates in first.items():
        for rank, (text, score) in enumerate(candidates):
            print_text(f"  {row_id} [{rank}] {score:.3f} {text}", as_json)
    print_json({**manifest, "folder": str(folder), "first": first}, as_json)


@app.command()
def compare(first: NameArgument, second: NameArgument, root: RootOption = None, as_json: JsonOption = False) -> None:
    """How far two label sets of the same data agree: equal texts, and the scores of the first against the second."""
    from raydistill.evaluation.metrics import ScoreAccumulator
    from raydistill.label_sets.curation import compare_label_sets
    from raydistill.label_sets.label_set import read_manifest

    a, b = find_label_set(first, root), find_label_set(second, root)
    found = compare_label_sets(a, b, ScoreAccumulator(read_manifest(a, ["metric"])["metric"]))
    print_text(
        format_table([a.name, "against " + b.name], [[name, f"{value:.4g}"] for name, value in found.items()]), as_json
    )
    print_json({"first": str(a), "second": str(b), **found}, as_json)


@app.command()
def curate(
    name: NameArgument,
    keep: Annotated[
        list[str], typer.Option(metavar="RULE=VALUE", help="as of `raydistill pseudolabel`; may be repeated")
    ],
    dataset: Annotated[
        str | None, typer.Option(help="the data the set was made for; default: as its manifest says")
    ] = None,
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a curated label set of a whole one, which stays; nothing is generated again."""
    from raydistill.config.run import Dataset
    from raydistill.config.validation import validate
    from raydistill.evaluation.metrics import ScoreAccumulator, rouge2_rows
    from raydistill.label_sets.curation import curate as make
    from raydistill.label_sets.label_set import MANIFEST, PSEUDOLABEL_KEYS, read_manifest

    rules = parse_curation(keep)
    folder = find_label_set(name, root)
    whole = read_manifest(folder, [*PSEUDOLABEL_KEYS, "data.dataset", "data.split"])
    about = whole["data"]
    data = validate(Dataset, {**about["dataset"], **({"name": dataset} if dataset else {})}, folder / MANIFEST)
    made = make(folder, data, about["split"], rules, rouge2_rows, ScoreAccumulator(whole["metric"]))
    manifest = read_manifest(made)
    print_text(format_table(["label set", made.name], label_set_rows(manifest)), as_json)
    print_text(f"label set: {made}", as_json)
    print_json({**manifest, "folder": str(made)}, as_json)


def find_label_set(name: str, root: Path | None) -> Path:
    """The folder that a path, a name or a name's beginning means; UserError where it is none or several."""
    from raydistill.label_sets.label_set import find_label_set_folders, is_complete

    if is_complete(Path(name)):
        return Path(name)
    place = root or raydistill_home() / "labels"
    there = find_label_set_folders(place)
    found = [folder for folder in there if folder.name == name] or [f for f in there if f.name.startswith(name)]
    if len(found) != 1:
        known = ", ".join(folder.name for folder in (found or there)) or "none"
        raise UserError(
            f"{name}: {'several label sets begin so' if found else 'no such label set'} in {place}: {known}"
        )
    return found[0]


def _format_quality(manifest: dict) -> str:
    quality = manifest["quality"] or {}
    return next((f"{name} {quality[name]:.2f}" for name in ("bleu", "rouge2") if name in quality), "-")


def main() -> None:
    """The command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.labels import main as entry  # the real module, so that its classes exist once

    entry()
