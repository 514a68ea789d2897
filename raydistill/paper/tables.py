"""The paper's Tables 2 to 10 from sweeps, the paper's own figure beside each of ours, an empty cell where one has none.

Every figure of ours is read from the trials' folders when the table is made: nothing is kept in between. Scores are on
test and means over seeds; what a table shows of several settings is the one with the best validation score. Ours in a
row are of one sweep, so of one recipe; of several sweeps each has a row.
"""

from collections.abc import Iterable, Mapping, Sequence

from raydistill.core.files import corrupt_file_error, read_json
from raydistill.paper import published
from raydistill.paper.ablations import ablation_table, select_table_5_losses
from raydistill.paper.cells import (
    SWEEP_COLUMN,
    Table,
    drop_sweep_column,
    format_difference,
    format_number,
    paired_headers,
)
from raydistill.paper.initialisations import initialisation_tables
from raydistill.paper.seed_groups import (
    SeedGroup,
    Sweep,
    best_group,
    check_comparable,
    compare_groups,
    compare_to_teacher,
    group_by_sweep,
)
from raydistill.results.tables import format_trial_counts

METHOD_NAMES = {"sft": "SFT", "kd": "KD", "pl": "Pseudo"}
EXTRA_SUPERVISION = {"sft": "", "pl": "T's generations", "kd": "T's hidden states, logits"}
LOSS_NAMES = {"sft": "L_data", "pl": "L_pseudo", "kd": "L_kd"}
DEFAULT_LABEL_KIND = {"sft": "original", "kd": "original", "pl": "pseudo"}
LABEL_STRATEGIES = {
    "Orig": ("original",),
    "PL": ("pseudo",),
    "Orig+PL": ("original", "pseudo"),
    "Orig+PL+PL*": ("original", "pseudo", "other"),
}
LABEL_QUALITY_METRICS = {
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "rougeLsum": "ROUGE-Lsum",
    "bleu": "BLEU",
}
INTERVAL_NOTE = (
    "Differences are of the means over the n seeds that both sides have, in brackets the 95 % interval of a paired "
    "bootstrap over the test rows: it tells of the rows' chance and not of the seeds'."
)


def make_tables(sweeps: Sequence[Sweep], seed_groups: Sequence[SeedGroup]) -> list[Table]:
    """All of them, in the paper's order; UserError where sweeps cannot stand in one report."""
    check_comparable(sweeps)
    made = [
        training_cost_table(seed_groups),
        corpus_table(sweeps),
        effort_table(sweeps),
        main_results_table(seed_groups),
        *[best_by_size_table(sweeps, seed_groups, data) for data in _best_table_datasets(sweeps)],
        *initialisation_tables(seed_groups),
        label_strategy_table(seed_groups),
        label_quality_table(sweeps),
        ablation_table(seed_groups),
    ]
    return made if len(sweeps) > 1 else list(map(drop_sweep_column, made))


def describe_sweeps(sweeps: Sequence[Sweep]) -> list[str]:
    """A line about each sweep: what became of its trials, since the failed are in no score, and how it was run."""
    return [f"{sweep.name}: {format_trial_counts(sweep.trials)}; {'; '.join(_describe_run(sweep))}" for sweep in sweeps]


def _describe_run(sweep: Sweep) -> list[str]:
    """Teacher, alignment, engine, machine, versions, seeds and dates; nothing for what the sweep does not tell."""
    results = [read_json(t.folder / "result.json") for t in sweep.trials if t.status != "running"]
    apart = [found["alignment"] for found in results if found.get("alignment") is not None]
    with corrupt_file_error(sweep.folder / "sweep.json"):
        known = dict(sweep.teacher.get("machine") or {})
        machine = f"{known['name']} ({known['kind']}, {known['threads']} threads)" if known else ""
        versions = dict(sweep.info.get("versions") or {})
    days = sorted({str(found["ended_at"])[:10] for found in results if found.get("ended_at")})
    told = {
        "teacher": " at commit ".join(str(sweep.teacher[key]) for key in ("name", "commit") if sweep.teacher.get(key)),
        "a full-depth copy of it differs by": f"{max(apart):.1e} of the largest logit" if apart else "",
        "engine": str(sweep.teacher.get("engine") or ""),
        "machine": machine,
        "hosts": ", ".join(sorted({str(found["host"]) for found in results if found.get("host")})),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items()),
        "seeds": ", ".join(map(str, sorted({trial.seed for trial in sweep.trials}))),
        "ended": " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "",
    }
    return [f"{what} {value}" for what, value in told.items() if value]


def training_cost_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 2: what each technique costs end to end."""
    rows = []
    for place, sweep, mine in _group_rows(_select_table_5_groups(seed_groups), [published.TABLE_2_SETTING]):
        theirs = published.TABLE_2 if place == published.TABLE_2_SETTING else {}
        for method in ("sft", "pl", "kd"):
            ours = best_group(s for s in mine if s.run.method == method)
            cells = [
                METHOD_NAMES[method],
                EXTRA_SUPERVISION[method],
                format_number(ours.cost if ours else None, 3),
                format_number(theirs.get(method), 1),
            ]
            rows.append([*place, sweep, *cells, LOSS_NAMES[method]])
    header = ["teacher", "size", "data", SWEEP_COLUMN, "technique", "extra supervision"]
    header += ["device-hours", "paper: GPU hours", "loss"]
    return Table("table2", "Table 2: training time of different distillation approaches, end to end", header, rows)


def corpus_table(sweeps: Sequence[Sweep]) -> Table:
    """Table 3: data set statistics, a row for each training split that differs."""
    ours: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in sweeps:
        if sweep.data and "corpus" in sweep.teacher:
            mark = (sweep.teacher.get("data") or {}).get("train", "")
            ours.setdefault((sweep.data, mark), []).append(sweep)
    names = dict.fromkeys([*published.TABLE_3, *(sweep.data for sweep in sweeps if sweep.data)])
    rows = []
    for name in names:
        theirs = published.TABLE_3.get(name)
        for same in [found for (data, _), found in ours.items() if data == name] or [[]]:
            own = same[0].teacher["corpus"] if same else None
            rows.append(
                [
                    name,
                    ", ".join(sweep.name for sweep in same),
                    format_number(own and own["rows"], 0),
                    format_number(theirs and theirs.rows, 0),
                    format_number(own and own["source_words_mean"], 1),
                    format_number(theirs and theirs.source_words, 0),
                    format_number(own and own["target_words_mean"], 1),
                    format_number(theirs and theirs.target_words, 0),
                    format_number(own and own["bytes"] / 1e6, 1),
                    format_number(theirs and theirs.megabytes, 0),
                ]
            )
    header = [
        "data",
        SWEEP_COLUMN,
        *paired_headers("training rows", "mean source words", "mean target words", "size (MB)"),
    ]
    return Table("table3", "Table 3: data set statistics", header, rows)


def effort_table(sweeps: Sequence[Sweep]) -> Table:
    """Table 4: device-hours and experiments per teacher and data set, the teacher's passes among them.

    What several sweeps read of one pass is counted once.
    """
    hours: dict[tuple[str, str], float] = {}
    made: dict[tuple[str, str], dict[str, float]] = {}
    runs: dict[tuple[str, str], int] = {}
    for sweep in sweeps:
        if sweep.data is None:
            continue
        key = (sweep.teacher_name, sweep.data)
        hours[key] = hours.get(key, 0.0) + sum(trial.device_hours for trial in sweep.trials)
        made.setdefault(key, {}).update(sweep.hours_by_artifact)
        runs[key] = runs.get(key, 0) + len(sweep.trials)
    hours = {key: spent + sum(made[key].values()) for key, spent in hours.items()}
    theirs_hours = {key: spent for key, (spent, _) in published.TABLE_4.items()}
    theirs_runs = {key: count for key, (_, count) in published.TABLE_4.items()}
    keys = dict.fromkeys([*published.TABLE_4, *hours])
    rows = [
        [*key, *_share_cells(hours, theirs_hours, key, 3), *_share_cells(runs, theirs_runs, key, 0)] for key in keys
    ]
    totals = [
        format_number(sum(hours.values()) if hours else None, 3),
        format_number(sum(theirs_hours.values()), 0),
        "",
        "",
    ]
    totals += [
        format_number(sum(runs.values()) if runs else None, 0),
        format_number(sum(theirs_runs.values()), 0),
        "",
        "",
    ]
    rows.append(["TOTALS", "", *totals])
    header = ["teacher", "data", *paired_headers("device-hours", "% of hours", "experiments", "% of experiments")]
    note = "The paper counts experiments of 15 minutes or more; ours are all trials that were begun."
    return Table("table4", "Table 4: effort", header, rows, note)


def main_results_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 5: the three methods, their cost, and what kd and pl gain over sft."""
    rows = []
    for place, sweep, mine in _group_rows(_select_table_5_groups(seed_groups), published.TABLE_5):
        theirs = published.TABLE_5.get(place)
        found = {method: best_group(s for s in mine if s.run.method == method) for method in METHOD_NAMES}
        row = [*place, sweep, *_teacher_cells(mine, theirs and theirs.teacher)]
        for method, ours in found.items():
            pair = getattr(theirs, method) if theirs else None
            row += [_format_test_score(ours), format_number(pair and pair[0], 2)]
            row += [
                format_number(ours.cost if ours else None, 3),
                format_number(pair and pair[1], 1),
                str(ours.num_seeds) if ours else "",
            ]
        row += [_format_group_difference(found[method], found["sft"]) for method in ("kd", "pl")]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP_COLUMN, *paired_headers("teacher score")]
    for name in METHOD_NAMES.values():
        header += [*paired_headers(f"{name} score", f"{name} cost"), f"{name} seeds"]
    header += ["KD - SFT", "Pseudo - SFT"]
    return Table("table5", "Table 5: main results", header, rows, INTERVAL_NOTE)


def best_by_size_table(sweeps: Sequence[Sweep], seed_groups: Sequence[SeedGroup], dataset_name: str) -> Table:
    """Tables 6 (XSUM) and 7 (CNN), and the same of other data: the best student of each size, whatever the method.

    The teacher has a row of its own, also where a student is as deep.
    """
    mine = [sweep for sweep in sweeps if sweep.data == dataset_name]
    theirs = {key[:2]: row for key, row in published.TABLES_6_7.items() if key[2] == dataset_name}
    teachers: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in mine:
        teachers.setdefault((sweep.teacher_name, str(sweep.teacher.get("size"))), []).append(sweep)
    students: dict[tuple[str, str], list[SeedGroup]] = {}
    for s in seed_groups:
        if s.paper_key[2] == dataset_name:
            students.setdefault(s.paper_key[:2], []).append(s)
    metric = mine[0].metric if mine else "rouge2"
    rows: list[list[str]] = []
    for key in _sort_by_teacher([*theirs, *students, *teachers]):
        row, known = theirs.get(key), len(rows)
        rows += [_teacher_row(key, sweep, metric, row) for sweep in teachers.get(key, [])]
        for sweep, same in group_by_sweep(students.get(key, [])):
            # The paper's row of a teacher's size is the teacher's.
            if chosen := best_group(same):
                rows.append(_student_row(key, sweep, chosen, metric, None if key in teachers else row))
        if len(rows) == known and row:
            rows.append([*key, "", "", *_result_cells({}, {}, metric, row)])
    number_of = {"XSUM": "Table 6", "CNN": "Table 7"}.get(dataset_name, "As Tables 6 and 7")
    main = "BLEU" if metric == "bleu" else "ROUGE-2"
    header = [
        "teacher",
        "size",
        SWEEP_COLUMN,
        "ours by",
        *paired_headers("params (M)", "ms for 32", "speed-up", main, "ROUGE-L"),
    ]
    name = {"XSUM": "table6", "CNN": "table7"}.get(dataset_name, f"table6_{dataset_name}")
    note = "The paper's times are on an Nvidia RTX 2080 (BART in mixed precision); ours on the machine of the sweep."
    return Table(name, f"{number_of}: best {dataset_name} results of each size across all methods", header, rows, note)


def _teacher_row(key: tuple[str, str], sweep: Sweep, metric: str, paper_row: published.SizeResult | None) -> list[str]:
    measured = sweep.teacher.get("costs") or {}
    values = {**measured, "speedup": 1.0 if measured else None}
    return [*key, sweep.name, "teacher", *_result_cells(values, sweep.teacher.get("test") or {}, metric, paper_row)]


def _student_row(
    key: tuple[str, str], sweep: Sweep, group: SeedGroup, metric: str, paper_row: published.SizeResult | None
) -> list[str]:
    values = {name: group.measure(name) for name in ("params_m", "latency_ms", "speedup")}
    scores = {name: group.test(name) for name in (metric, "rougeL")}
    how = f"{METHOD_NAMES[group.run.method]} on {group.labels}, n = {group.num_seeds}"
    return [*key, sweep.name, how, *_result_cells(values, scores, metric, paper_row)]


def _result_cells(
    values: Mapping[str, float | None],
    scores: Mapping[str, float | None],
    metric: str,
    paper_row: published.SizeResult | None,
) -> list[str]:
    """The figures of a row of Tables 6 and 7, ours and the paper's."""
    return [
        format_number(values.get("params_m"), 1),
        format_number(paper_row and paper_row.params, 0),
        format_number(values.get("latency_ms"), 0),
        format_number(paper_row and paper_row.latency_ms, 0),
        format_number(values.get("speedup"), 2),
        format_number(paper_row and paper_row.speedup, 2),
        format_number(scores.get(metric), 2),
        format_number(paper_row and paper_row.rouge2, 2),
        format_number(scores.get("rougeL"), 2),
        format_number(paper_row and paper_row.rougeL, 2),
    ]


def label_strategy_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 10: students' scores less their teacher's, by what they were trained to write."""
    rows = []
    for place, sweep, mine in _group_rows(_select_table_10_groups(seed_groups), published.TABLE_10):
        theirs = published.TABLE_10.get(place)
        found = {
            name: best_group(s for s in mine if s.label_kinds == kinds) for name, kinds in LABEL_STRATEGIES.items()
        }
        row = [*place, sweep, *_teacher_cells(mine, theirs and theirs.teacher)]
        figures = theirs[1:] if theirs else (None,) * len(LABEL_STRATEGIES)
        for ours, figure in zip(found.values(), figures, strict=True):
            row += [_format_teacher_difference(ours), format_number(figure, 1, sign=True)]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP_COLUMN, *paired_headers("teacher score", *LABEL_STRATEGIES)]
    note = f"Student less teacher. {INTERVAL_NOTE} PL*: with another teacher's labels added."
    return Table("table10", "Table 10: pseudo-labelling strategies", header, rows, note)


def label_quality_table(sweeps: Sequence[Sweep]) -> Table:
    """Under Table 10: the scores of the pseudo-labels against the originals, a row for each set."""
    rows = []
    for sweep in sweeps:
        for name, told in (sweep.teacher.get("label_sets") or {}).items():
            quality = told.get("quality") or {}
            who = published.teacher_name(told["teacher"]) if told.get("teacher") else ""
            scores = [format_number(quality.get(metric), 2) for metric in LABEL_QUALITY_METRICS]
            rows.append([who, sweep.data or "", sweep.name, name, format_number(told.get("rows"), 0), *scores])
    header = ["teacher", "data", SWEEP_COLUMN, "label set", "rows", *LABEL_QUALITY_METRICS.values()]
    return Table("table10_labels", "The pseudo-labels of Table 10 against the originals", header, rows)


def _format_group_difference(a: SeedGroup | None, b: SeedGroup | None) -> str:
    found = compare_groups(a, b) if a and b else None
    return format_difference(*found) if found else ""


def _format_teacher_difference(group: SeedGroup | None) -> str:
    """With its interval where the rows of both are there; else the plain difference."""
    if group is None:
        return ""
    if found := compare_to_teacher(group):
        return format_difference(*found)
    metric = group.sweep.metric
    score, theirs = group.test(metric), (group.sweep.teacher.get("test") or {}).get(metric)
    return "" if score is None or theirs is None else f"{score - theirs:+.2f}, n = {group.num_seeds}"


def _format_test_score(group: SeedGroup | None) -> str:
    return format_number(group.test(group.sweep.metric) if group else None, 2)


def _teacher_cells(seed_groups: Sequence[SeedGroup], paper_score: float | None) -> list[str]:
    """Our teacher's score on test, and the paper's."""
    sweep = seed_groups[0].sweep if seed_groups else None
    score = (sweep.teacher.get("test") or {}).get(sweep.metric) if sweep else None
    return [format_number(score, 2), format_number(paper_score, 2)]


def _select_table_5_groups(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """The methods as Table 5 means them: spaced layers, the paper's losses, and labels as the method has them."""
    return select_table_5_losses(
        s for s in seed_groups if s.is_spaced and s.label_kinds == (DEFAULT_LABEL_KIND[s.run.method],)
    )


def _select_table_10_groups(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """What Table 10 compares: fine-tuning on one of its mixes, none weighted."""
    mine = (s for s in seed_groups if s.run.method in ("sft", "pl") and s.is_spaced)
    return [s for s in mine if s.label_kinds in LABEL_STRATEGIES.values() and "*" not in s.run.resolved_labels]


def _group_rows(
    seed_groups: Sequence[SeedGroup], paper_keys: Iterable[published.PaperKey]
) -> list[tuple[published.PaperKey, str, list[SeedGroup]]]:
    """A row's place, sweep and settings: the paper's places, then ours that it does not have; "" without a sweep."""
    rows: list[tuple[published.PaperKey, str, list[SeedGroup]]] = []
    for place in dict.fromkeys([*paper_keys, *(s.paper_key for s in seed_groups)]):
        ours = group_by_sweep(s for s in seed_groups if s.paper_key == place)
        rows += [(place, sweep.name, mine) for sweep, mine in ours] or [(place, "", [])]
    return rows


def _best_table_datasets(sweeps: Sequence[Sweep]) -> list[str]:
    return list(dict.fromkeys(["XSUM", "CNN", *(sweep.data for sweep in sweeps if sweep.data)]))


def _sort_by_teacher(keys: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each once, a teacher's together, in the order of first sight."""
    teachers = list(dict.fromkeys(teacher for teacher, _ in keys))
    return sorted(dict.fromkeys(keys), key=lambda key: teachers.index(key[0]))


def _share_cells(
    sweep_values: Mapping[tuple[str, str], float],
    paper_values: Mapping[tuple[str, str], float],
    key: tuple[str, str],
    digits: int,
) -> list[str]:
    """A figure and its share of the sum in per cent, ours and the paper's."""

    def share(values: Mapping[tuple[str, str], float]) -> float | None:
        return 100 * values[key] / total if key in values and (total := sum(values.values())) else None

    figures = [format_number(sweep_values.get(key), digits), format_number(paper_values.get(key), 0)]
    return [*figures, format_number(share(sweep_values), 0), format_number(share(paper_values), 0)]
