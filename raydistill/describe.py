"""`raydistill describe`: read and check a data set, and print statistics."""

from collections import defaultdict
from typing import Annotated, Any

import typer

from raydistill._app import make_app, run_app
from raydistill.config.presets import DATASETS
from raydistill.config.run import Columns, Dataset, ExtraSources
from raydistill.core.console import format_table, print_json, print_text
from raydistill.core.errors import UserError
from raydistill.data.corpus import (
    DUPLICATES_REMEDY,
    BadRow,
    Corpus,
    DuplicateRow,
    corpus_statistics,
    inspect_corpus,
    split_names,
)
from raydistill.data.extra import ExtraReport, describe_extra, format_extra, overlap_message

app = make_app()


@app.command()
def describe(  # noqa: PLR0913
    data: Annotated[str, typer.Argument(help="a named data set, a hub name, a file or a folder")],
    split: Annotated[str | None, typer.Option(help="split to read; default: all splits")] = None,
    source: Annotated[str | None, typer.Option(help="column of the source; dots address nested values")] = None,
    target: Annotated[str | None, typer.Option(help="column of the target")] = None,
    id_column: Annotated[str | None, typer.Option("--id", help="column of the row id")] = None,
    config: Annotated[str | None, typer.Option(help="configuration of a data set of the hub")] = None,
    skip_bad_rows: Annotated[bool, typer.Option(help="skip rows that cannot be used")] = False,
    extra: Annotated[
        str | None,
        typer.Option(
            help="texts to label in addition (pseudo.extra), which are compared with train, validation and test"
        ),
    ] = None,
    json: Annotated[bool, typer.Option(help="end with one JSON object on stdout")] = False,
) -> None:
    """Read and check a data set, and print columns, word counts and bad rows.

    Every row of every split is read. The exit status is 2 if a training run would reject the data.

    Examples:

        raydistill describe demo

        raydistill describe news/ --split validation --source body --target headline

        raydistill describe news/ --extra more_news.jsonl.gz
    """
    if source is None and (target is not None or id_column is not None):
        raise UserError("--target and --id also need --source")
    columns = Columns(source=source, target=target, id=id_column) if source is not None else None
    dataset = Dataset(name=data, config=config, columns=columns, skip_bad_rows=skip_bad_rows)
    splits = split_names(dataset)
    reports, problems = {}, []
    for name in [split] if split else splits:
        corpus, duplicates = inspect_corpus(dataset, name, need_targets=target is not None or source is None)
        reports[name] = _split_record(corpus, duplicates)
        print_text(_format_split(name, corpus, duplicates), json)
        if name == "train" and (paper := _paper_rows(data)):
            reports[name]["paper_rows"] = paper
            print_text(f"Table 3 of the paper: {paper:,} training rows", json)
        problems += [] if skip_bad_rows else corpus.skipped
        problems += duplicates
    print_text(f"splits: {', '.join(splits)}", json)
    usable = not problems and all(report["rows"] for report in reports.values())
    extra_report = (
        describe_extra(dataset, ExtraSources(name=extra, skip_bad_rows=skip_bad_rows)) if extra and usable else None
    )
    if extra_report:
        print_text(format_extra(extra_report), json)
    record = {"data": data, "splits": splits, "usable": usable, "described": reports}
    print_json({**record, **({"extra": _extra_record(extra_report)} if extra_report else {})}, json)
    if not usable:
        raise UserError(_format_problems(data, reports, skip_bad_rows))
    if extra_report and extra_report.overlaps:
        raise UserError(overlap_message(extra_report))


def _extra_record(report: ExtraReport) -> dict[str, Any]:
    return {
        "name": report.name,
        "rows": report.num_kept,
        "fingerprint": report.scan.fingerprint,
        "dropped": [
            {"file": row.location[0], "row": row.location[1], "split": row.split, "reason": row.reason}
            for row in report.dropped
        ],
    }


def _paper_rows(data: str) -> int | None:
    """The number of training rows of a named data set in Table 3 of the paper."""
    preset = DATASETS.get(data)
    return preset.paper_stats[0] if preset and preset.paper_stats else None


def _split_record(corpus: Corpus, duplicates: list[BadRow]) -> dict[str, Any]:
    return {
        **corpus_statistics(corpus),
        "columns": corpus.columns.model_dump(),
        "labelled": corpus.labelled,
        "fingerprint": corpus.fingerprint,
        "first_ids": corpus.ids[:3],
        "bad_rows": [vars(row) for row in corpus.skipped],
        "duplicate_ids": [vars(row) for row in duplicates],
    }


def _format_split(split: str, corpus: Corpus, duplicates: list[BadRow]) -> str:
    statistics = corpus_statistics(corpus)
    columns = corpus.columns
    word_rows = [
        (
            side,
            f"{statistics[f'{side}_words_mean']:.1f}",
            *(str(statistics[f"{side}_words_{name}"]) for name in ("p50", "p95", "max")),
        )
        for side in ("source", "target")
        if f"{side}_words_mean" in statistics
    ]
    lines = [
        f"{split}: {len(corpus)} rows, {_format_size(statistics['bytes'])}, fingerprint {corpus.fingerprint}",
        f"columns: source {columns.source}, target {columns.target or '(none: unlabelled)'}, "
        f"id {columns.id or '(none: row numbers)'}",
        f"first ids: {', '.join(corpus.ids[:3]) or '-'}",
        "",
        format_table(("words", "mean", "median", "95 %", "max"), word_rows),
        "",
    ]
    for title, rows in (("bad rows", corpus.skipped), ("rows with a repeated id", duplicates)):
        if rows:
            lines += [f"{title}: {len(rows)}", *_format_by_reason(rows), ""]
    return "\n".join(lines)


def _format_by_reason(rows: list[BadRow], max_shown: int = 5) -> list[str]:
    """Bad rows grouped by reason, largest group first, with the first rows of each group."""
    groups: dict[str, list[BadRow]] = defaultdict(list)
    for row in rows:
        # The reasons of duplicates name the id, and reasons of JSON errors the column.
        reason = "id is not unique" if isinstance(row, DuplicateRow) else row.reason.split(" at column ")[0]
        groups[reason].append(row)
    lines = []
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"  {len(group)} x {reason}")
        lines += [f"    {row}" for row in group[:max_shown]]
        lines += [f"    ... and {len(group) - max_shown} more"] if len(group) > max_shown else []
    return lines


def _format_problems(data: str, reports: dict[str, dict[str, Any]], skip_bad_rows: bool) -> str:
    num_bad = sum(len(report["bad_rows"]) for report in reports.values())
    num_duplicates = sum(len(report["duplicate_ids"]) for report in reports.values())
    empty = [split for split, report in reports.items() if not report["rows"]]
    messages = []
    if num_bad and not skip_bad_rows:
        messages.append(
            f"{num_bad} rows cannot be used; correct them, or skip them with --skip-bad-rows "
            "(in YAML dataset: {skip_bad_rows: true})"
        )
    if num_duplicates:
        messages.append(f"{num_duplicates} rows repeat an id; {DUPLICATES_REMEDY}")
    if empty:
        messages.append(f"no usable row in {', '.join(empty)}")
    return f"{data}: " + "; ".join(messages)


def _format_size(count: int) -> str:
    for unit, size in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def main() -> None:
    """Run the command."""
    run_app(app)


if __name__ == "__main__":
    from raydistill.describe import main as run  # import the module, so that its classes exist only once

    run()
