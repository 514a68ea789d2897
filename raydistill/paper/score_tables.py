"""Tables 5, 6, 7 and 10 of the paper: scores of methods, sizes and pseudo-labelling strategies."""

from collections.abc import Iterable, Mapping, Sequence

from raydistill.paper import published
from raydistill.paper.ablations import select_table_5_losses
from raydistill.paper.cells import SWEEP_COLUMN, Table, format_cell, format_difference, paired_headers
from raydistill.paper.published import PaperKey, SizeResult
from raydistill.paper.seed_groups import (
    SeedGroup,
    Sweep,
    best_group,
    compare_groups,
    compare_to_teacher,
    group_by_sweep,
)
from raydistill.results.tables import METRIC_NAMES, metric_name

METHOD_NAMES = {"sft": "SFT", "kd": "KD", "pl": "Pseudo"}
DEFAULT_LABEL_KIND = {"sft": "original", "kd": "original", "pl": "pseudo"}
LABEL_STRATEGIES = {
    "Orig": ("original",),
    "PL": ("pseudo",),
    "Orig+PL": ("original", "pseudo"),
    "Orig+PL+PL*": ("original", "pseudo", "other"),
}
INTERVAL_NOTE = (
    "Differences are between means over the n seeds that both sides have. Brackets hold the 95 % interval of a paired "
    "bootstrap over the test rows, which covers the sampling of rows and not of seeds."
)

SizeKey = tuple[str, str]  # teacher and size
ScoreNames = tuple[str, str]  # the main score and ROUGE-L, as metrics name them


def main_results_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 5: score and cost of the three methods, and the gains of KD and pseudo-labels over SFT."""
    rows = []
    for key, sweep_name, groups in group_rows(select_table_5_groups(seed_groups), published.TABLE_5):
        paper = published.TABLE_5.get(key)
        best = {method: best_group(group for group in groups if group.run.method == method) for method in METHOD_NAMES}
        row = [*key, sweep_name, *_teacher_cells(groups, paper and paper.teacher)]
        for method, group in best.items():
            row += _method_cells(group, getattr(paper, method) if paper else None)
        row += [_format_group_difference(best[method], best["sft"]) for method in ("kd", "pl")]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP_COLUMN, *paired_headers("teacher score")]
    for name in METHOD_NAMES.values():
        header += [*paired_headers(f"{name} score", f"{name} cost"), f"{name} seeds"]
    header += ["KD - SFT", "Pseudo - SFT"]
    return Table("table5", "Table 5: main results", header, rows, INTERVAL_NOTE)


def best_by_size_table(sweeps: Sequence[Sweep], seed_groups: Sequence[SeedGroup], dataset_name: str) -> Table:
    """Table 6 (XSUM), 7 (CNN) or the equivalent for other data: the best student of each size over all methods.

    The teacher has its own row, also if there is a student of the same depth.
    """
    own_sweeps = [sweep for sweep in sweeps if sweep.dataset_name == dataset_name]
    metric = own_sweeps[0].metric if own_sweeps else "rouge2"
    scores: ScoreNames = (metric, published.rouge_l_metric(dataset_name))
    paper_rows = {key[:2]: row for key, row in published.TABLES_6_7.items() if key[2] == dataset_name}
    teachers: dict[SizeKey, list[Sweep]] = {}
    for sweep in own_sweeps:
        teachers.setdefault((sweep.teacher_name, sweep.teacher.size), []).append(sweep)
    students: dict[SizeKey, list[SeedGroup]] = {}
    for group in seed_groups:
        if group.dataset_name == dataset_name:
            students.setdefault((group.teacher_name, group.size), []).append(group)
    rows: list[list[str]] = []
    for key in _sort_by_teacher([*paper_rows, *students, *teachers]):
        paper_row = paper_rows.get(key)
        measured = [_teacher_row(key, sweep, scores, paper_row) for sweep in teachers.get(key, [])]
        # The paper's row of the teacher's size describes the teacher, not a student
        student_paper_row = None if key in teachers else paper_row
        for sweep, groups in group_by_sweep(students.get(key, [])):
            if best := best_group(groups):
                measured.append(_student_row(key, sweep, best, scores, student_paper_row))
        if not measured and paper_row:
            measured.append([*key, "", "", *_result_cells({}, {}, scores, paper_row)])
        rows += measured
    number = {"XSUM": "Table 6", "CNN": "Table 7"}.get(dataset_name, "As Tables 6 and 7")
    name = {"XSUM": "table6", "CNN": "table7"}.get(dataset_name, f"table6_{dataset_name}")
    main_score = metric_name(metric)
    columns = paired_headers("params (M)", "ms for 32", "speed-up", main_score, METRIC_NAMES[scores[1]])
    header = ["teacher", "size", SWEEP_COLUMN, "our method", *columns]
    note = "The paper's times are on an Nvidia RTX 2080 (BART in mixed precision); ours are on the sweep's machine."
    return Table(name, f"{number}: best {dataset_name} results of each size across all methods", header, rows, note)


def label_strategy_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 10: difference student - teacher by the labels that the student was trained on."""
    rows = []
    for key, sweep_name, groups in group_rows(_select_table_10_groups(seed_groups), published.TABLE_10):
        paper = published.TABLE_10.get(key)
        row = [*key, sweep_name, *_teacher_cells(groups, paper and paper.teacher)]
        paper_differences = paper[1:] if paper else (None,) * len(LABEL_STRATEGIES)
        for kinds, paper_difference in zip(LABEL_STRATEGIES.values(), paper_differences, strict=True):
            best = best_group(group for group in groups if group.label_kinds == kinds)
            row += [_format_teacher_difference(best), format_cell(paper_difference, 1, sign=True)]
        rows.append(row)
    header = ["teacher", "size", "data", SWEEP_COLUMN, *paired_headers("teacher score", *LABEL_STRATEGIES)]
    note = f"Student less teacher. {INTERVAL_NOTE} PL*: with the labels of another teacher added."
    return Table("table10", "Table 10: pseudo-labelling strategies", header, rows, note)


def label_quality_table(sweeps: Sequence[Sweep]) -> Table:
    """Supplement to Table 10: scores of each pseudo-label set against the original targets."""
    qualities = [label_set.quality or {} for sweep in sweeps for label_set in sweep.teacher.label_sets.values()]
    metrics = list(dict.fromkeys([*METRIC_NAMES, *(name for quality in qualities for name in quality)]))
    rows = []
    for sweep in sweeps:
        for name, label_set in sweep.teacher.label_sets.items():
            quality = label_set.quality or {}
            teacher = published.teacher_name(label_set.teacher) if label_set.teacher else ""
            scores = [format_cell(quality.get(metric), 2) for metric in metrics]
            num_rows = format_cell(label_set.rows, 0)
            rows.append([teacher, sweep.dataset_name or "", sweep.name, name, num_rows, *scores])
    header = ["teacher", "data", SWEEP_COLUMN, "label set", "rows", *map(metric_name, metrics)]
    return Table("table10_labels", "The pseudo-labels of Table 10 against the originals", header, rows)


def select_table_5_groups(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """The groups that Table 5 compares: spaced layers, the paper's losses, and the default labels of each method."""
    return select_table_5_losses(
        group
        for group in seed_groups
        if group.is_spaced and group.label_kinds == (DEFAULT_LABEL_KIND[group.run.method],)
    )


def group_rows(
    seed_groups: Sequence[SeedGroup], paper_keys: Iterable[PaperKey]
) -> list[tuple[PaperKey, str, list[SeedGroup]]]:
    """Rows of a table as (key, sweep name, groups): the paper's keys first, then the other measured keys.

    A key without measurements has one row, with "" as the sweep name and no groups.
    """
    rows: list[tuple[PaperKey, str, list[SeedGroup]]] = []
    for key in dict.fromkeys([*paper_keys, *(group.paper_key for group in seed_groups)]):
        by_sweep = group_by_sweep(group for group in seed_groups if group.paper_key == key)
        rows += [(key, sweep.name, groups) for sweep, groups in by_sweep] or [(key, "", [])]
    return rows


def _select_table_10_groups(seed_groups: Sequence[SeedGroup]) -> list[SeedGroup]:
    """The groups that Table 10 compares: fine-tuning on one of its unweighted mixes of labels."""
    candidates = (group for group in seed_groups if group.run.method in ("sft", "pl") and group.is_spaced)
    strategies = LABEL_STRATEGIES.values()
    return [g for g in candidates if g.label_kinds in strategies and "*" not in g.run.resolved_labels]


def _method_cells(group: SeedGroup | None, paper: tuple[float, float] | None) -> list[str]:
    """Score and cost of a method, measured and in the paper, and the number of seeds."""
    score, hours = (group.mean_test_score(group.sweep.metric), group.mean_device_hours) if group else (None, None)
    paper_score, paper_hours = paper or (None, None)
    cells = [format_cell(score, 2), format_cell(paper_score, 2), format_cell(hours, 3), format_cell(paper_hours, 1)]
    return [*cells, str(group.num_seeds) if group else ""]


def _teacher_row(key: SizeKey, sweep: Sweep, names: ScoreNames, paper_row: SizeResult | None) -> list[str]:
    values = {**sweep.teacher.costs, "speedup": 1.0}
    scores = sweep.teacher.test.metrics if sweep.teacher.test else {}
    return [*key, sweep.name, "teacher", *_result_cells(values, scores, names, paper_row)]


def _student_row(
    key: SizeKey, sweep: Sweep, group: SeedGroup, names: ScoreNames, paper_row: SizeResult | None
) -> list[str]:
    values = {name: group.mean_metric(name) for name in ("params_m", "latency_ms", "speedup")}
    scores = {name: group.mean_test_score(name) for name in names}
    recipe = f"{METHOD_NAMES[group.run.method]} on {group.label_description}, n = {group.num_seeds}"
    return [*key, sweep.name, recipe, *_result_cells(values, scores, names, paper_row)]


def _result_cells(
    values: Mapping[str, float | None],
    scores: Mapping[str, float | None],
    names: ScoreNames,
    paper_row: SizeResult | None,
) -> list[str]:
    """The values of a row of Tables 6 and 7, measured and in the paper."""
    return [
        format_cell(values.get("params_m"), 1),
        format_cell(paper_row and paper_row.params, 0),
        format_cell(values.get("latency_ms"), 0),
        format_cell(paper_row and paper_row.latency_ms, 0),
        format_cell(values.get("speedup"), 2),
        format_cell(paper_row and paper_row.speedup, 2),
        format_cell(scores.get(names[0]), 2),
        format_cell(paper_row.rouge2 if paper_row and names[0] == "rouge2" else None, 2),
        format_cell(scores.get(names[1]), 2),
        format_cell(paper_row and paper_row.rougeL, 2),
    ]


def _format_group_difference(a: SeedGroup | None, b: SeedGroup | None) -> str:
    comparison = compare_groups(a, b) if a and b else None
    return format_difference(*comparison) if comparison else ""


def _format_teacher_difference(group: SeedGroup | None) -> str:
    """The difference to the teacher with its interval, or without an interval if per-row statistics are missing."""
    if group is None:
        return ""
    if comparison := compare_to_teacher(group):
        return format_difference(*comparison)
    score, teacher_score = group.mean_test_score(group.sweep.metric), group.sweep.teacher_test_score
    return "" if score is None or teacher_score is None else f"{score - teacher_score:+.2f}, n = {group.num_seeds}"


def _teacher_cells(seed_groups: Sequence[SeedGroup], paper_score: float | None) -> list[str]:
    """The teacher's test score, measured and in the paper."""
    score = seed_groups[0].sweep.teacher_test_score if seed_groups else None
    return [format_cell(score, 2), format_cell(paper_score, 2)]


def _sort_by_teacher(keys: list[SizeKey]) -> list[SizeKey]:
    """Distinct keys grouped by teacher, in the order of first occurrence."""
    teachers = list(dict.fromkeys(teacher for teacher, _ in keys))
    return sorted(dict.fromkeys(keys), key=lambda key: teachers.index(key[0]))
