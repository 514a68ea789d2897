"""Tables 2 to 4 of the paper: training time, data set statistics, and the effort of all experiments."""

from collections.abc import Mapping, Sequence

from raydistill.paper import published
from raydistill.paper.cells import SWEEP_COLUMN, Table, format_cell, paired_headers
from raydistill.paper.score_tables import METHOD_NAMES, group_rows, select_table_5_groups
from raydistill.paper.seed_groups import SeedGroup, Sweep, best_group

EXTRA_SUPERVISION = {"sft": "", "pl": "T's generations", "kd": "T's hidden states, logits"}
LOSS_NAMES = {"sft": "L_data", "pl": "L_pseudo", "kd": "L_kd"}

TeacherKey = tuple[str, str]  # teacher and data set


def training_cost_table(seed_groups: Sequence[SeedGroup]) -> Table:
    """Table 2: device-hours of each method, including teacher passes."""
    rows = []
    for key, sweep_name, groups in group_rows(select_table_5_groups(seed_groups), [published.TABLE_2_SETTING]):
        paper_hours = published.TABLE_2 if key == published.TABLE_2_SETTING else {}
        for method in ("sft", "pl", "kd"):
            best = best_group(group for group in groups if group.run.method == method)
            hours = format_cell(best.mean_device_hours if best else None, 3)
            cells = [METHOD_NAMES[method], EXTRA_SUPERVISION[method], hours, format_cell(paper_hours.get(method), 1)]
            rows.append([*key, sweep_name, *cells, LOSS_NAMES[method]])
    header = ["teacher", "size", "data", SWEEP_COLUMN, "technique", "extra supervision"]
    header += ["device-hours", "paper: GPU hours", "loss"]
    return Table("table2", "Table 2: training time of different distillation approaches, end to end", header, rows)


def corpus_table(sweeps: Sequence[Sweep]) -> Table:
    """Table 3: data set statistics, one row per distinct training split."""
    by_split: dict[tuple[str, str], list[Sweep]] = {}
    for sweep in sweeps:
        if sweep.dataset_name:
            by_split.setdefault((sweep.dataset_name, sweep.teacher.data.get("train", "")), []).append(sweep)
    names = dict.fromkeys([*published.TABLE_3, *(sweep.dataset_name for sweep in sweeps if sweep.dataset_name)])
    rows = []
    for name in names:
        for same_split in [group for (dataset, _), group in by_split.items() if dataset == name] or [[]]:
            rows.append([name, ", ".join(sweep.name for sweep in same_split), *_corpus_cells(name, same_split)])
    columns = paired_headers("training rows", "mean source words", "mean target words", "size (MB)")
    return Table("table3", "Table 3: data set statistics", ["data", SWEEP_COLUMN, *columns], rows)


def effort_table(sweeps: Sequence[Sweep]) -> Table:
    """Table 4: device-hours, including teacher passes, and number of experiments per teacher and data set.

    An artifact of a teacher pass that several sweeps share is counted once.
    """
    trial_hours: dict[TeacherKey, float] = {}
    artifact_hours: dict[TeacherKey, dict[str, float]] = {}
    num_trials: dict[TeacherKey, int] = {}
    for sweep in sweeps:
        if sweep.dataset_name is None:
            continue
        key = (sweep.teacher_name, sweep.dataset_name)
        trial_hours[key] = trial_hours.get(key, 0.0) + sum(trial.device_hours for trial in sweep.trials)
        artifact_hours.setdefault(key, {}).update(sweep.teacher.passes.hours_by_artifact)
        num_trials[key] = num_trials.get(key, 0) + len(sweep.trials)
    hours = {key: spent + sum(artifact_hours[key].values()) for key, spent in trial_hours.items()}
    paper_hours = {key: spent for key, (spent, _) in published.TABLE_4.items()}
    paper_runs = {key: count for key, (_, count) in published.TABLE_4.items()}
    rows = [
        [*key, *_share_cells(hours, paper_hours, key, 3), *_share_cells(num_trials, paper_runs, key, 0)]
        for key in dict.fromkeys([*published.TABLE_4, *hours])
    ]
    rows.append(["TOTALS", "", *_total_cells(hours, paper_hours, 3), *_total_cells(num_trials, paper_runs, 0)])
    header = ["teacher", "data", *paired_headers("device-hours", "% of hours", "experiments", "% of experiments")]
    note = (
        "The paper counts experiments of 15 minutes or more; the measured columns count all trials that were started."
    )
    return Table("table4", "Table 4: effort", header, rows, note)


def _corpus_cells(name: str, sweeps: list[Sweep]) -> list[str]:
    """Statistics of the training split that these sweeps share, and the paper's."""
    corpus = sweeps[0].teacher.corpus if sweeps else {}
    paper = published.TABLE_3.get(name)
    return [
        format_cell(corpus.get("rows"), 0),
        format_cell(paper and paper.rows, 0),
        format_cell(corpus.get("source_words_mean"), 1),
        format_cell(paper and paper.source_words, 0),
        format_cell(corpus.get("target_words_mean"), 1),
        format_cell(paper and paper.target_words, 0),
        format_cell(corpus["bytes"] / 1e6 if corpus else None, 1),
        format_cell(paper and paper.megabytes, 0),
    ]


def _share_cells(
    values: Mapping[TeacherKey, float], paper_values: Mapping[TeacherKey, float], key: TeacherKey, digits: int
) -> list[str]:
    """A value and its share of the total in per cent, measured and in the paper."""

    def share(column: Mapping[TeacherKey, float]) -> float | None:
        return 100 * column[key] / total if key in column and (total := sum(column.values())) else None

    cells = [format_cell(values.get(key), digits), format_cell(paper_values.get(key), 0)]
    return [*cells, format_cell(share(values), 0), format_cell(share(paper_values), 0)]


def _total_cells(
    values: Mapping[TeacherKey, float], paper_values: Mapping[TeacherKey, float], digits: int
) -> list[str]:
    total = format_cell(sum(values.values()) if values else None, digits)
    return [total, format_cell(sum(paper_values.values()), 0), "", ""]
