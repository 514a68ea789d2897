"""Device-hours by method, including the teacher passes."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from raydistill.core.files import SCHEMA_VERSION, write_json_atomic
from raydistill.results.records import Trial
from raydistill.results.selection import load_selection
from raydistill.results.sweep_record import TeacherPasses
from raydistill.results.tables import label_cost_table, method_table

MIXED_LABELS = "original+pseudo+/other"


def write_run(
    folder: Path, method: str, size: str, score: float, hours: float, labels: str = "auto", **settings: Any
) -> Trial:
    """A finished trial of which only run.json is written."""
    key = f"{method}{size}{score}"
    run = {"name": "m", "teacher": "t", "dataset": {"name": "d"}, "method": method, "labels": labels, **settings}
    write_json_atomic(folder / key / "run.json", {"schema": SCHEMA_VERSION, **run})
    return Trial(key, folder / key, "done", method=method, size=size, metrics={"rouge2": score, "device_hours": hours})


def sft_and_pl_trials(folder: Path) -> list[Trial]:
    return [
        write_run(folder, method, size, score, hours)
        for method, size, score, hours in (
            ("sft", "2-2", 10, 1),
            ("sft", "2-2", 12, 1),
            ("sft", "2-1", 5, 1),
            ("pl", "2-2", 13, 2),
            ("pl", "2-1", 8, 1),
            ("pl", "2-3", 99, 1),
        )
    ]


def test_method_hours_include_every_required_teacher_pass_once(sweep: Path) -> None:
    trials = sft_and_pl_trials(sweep / "runs")
    selection = load_selection(sweep)
    labels: dict[str, dict[str, float]] = {
        "original": {},
        "pseudo": {"own": 4.0},
        MIXED_LABELS: {"own": 4.0, "others": 2.0},
    }

    def rows_of_methods(stores: dict[str, float]) -> list[list[str]]:
        passes = TeacherPasses(labels=labels, stores=stores)
        teacher = selection.teacher.model_copy(update={"passes": passes})
        return method_table(replace(selection, trials=trials, teacher=teacher))[1]

    assert rows_of_methods({"decoder-1/layer-02": 9.0}) == [
        ["pl", "3", "4.000", "4.000"],
        ["sft", "3", "3.000", "0.000"],
    ]
    trials += [
        write_run(sweep / "runs", "kd", "2-2", 22, 1, "pseudo"),
        write_run(sweep / "runs", "kd", "2-2", 11, 1, MIXED_LABELS),
        write_run(sweep / "runs", "sft", "2-2", 6, 1, MIXED_LABELS),
    ]
    assert rows_of_methods({"decoder-1/layer-02": 9.0}) == [
        ["kd", "2", "2.000", "15.000"],  # own 4, others 2, the cache 9
        ["pl", "3", "4.000", "4.000"],
        ["sft", "4", "4.000", "6.000"],
    ]
    # 3 of the cache's 9 hours are for encoder states, which every method reads
    rows = rows_of_methods({"encoder-1/states": 3.0, "decoder-1/layer-02": 6.0})
    assert [row[3] for row in rows] == ["15.000", "7.000", "9.000"]


def test_methods_are_not_compared_by_the_best_of_unequal_numbers_of_trials(sweep: Path) -> None:
    """Formerly 20 trials of equal students against one gave the method of the 20 a gain of points per device-hour."""
    trials = [write_run(sweep / "runs", "kd", "2-2", score, 1) for score in range(20)]
    trials.append(write_run(sweep / "runs", "sft", "2-2", 9.5, 1))
    header, rows = method_table(replace(load_selection(sweep), trials=trials))
    assert header == ["method", "trials", "device h, trials", "device h, teacher"]
    assert [row[:2] for row in rows] == [["kd", "20"], ["sft", "1"]]


def test_runs_that_share_a_label_set_by_different_parts_count_its_largest_part() -> None:
    """A run on 100 of 1,000 extra rows needs a tenth of the hours of their label set."""
    passes = TeacherPasses(labels={"pseudo 1000": {"extra": 5.0, "own": 4.0}, "pseudo 100": {"own": 4.0, "extra": 0.5}})
    assert passes.hours_by_artifact == {"own": 4.0, "extra": 5.0}
    assert passes.total_hours == 9.0


def test_scores_are_listed_against_the_label_cost_of_each_number_of_extra_rows(sweep: Path) -> None:
    selection = load_selection(sweep)
    assert label_cost_table(selection) is None  # the search does not vary the number
    labels, trials = {}, []
    for count, hours, scores in ((0, 0.0, [10, 11, 30]), (100, 0.5, [20]), (None, 5.0, [24, 26])):
        pseudo = {"extra": {"name": "f"}, "extra_rows": count}
        for score in scores:
            trial = write_run(sweep / f"runs{count}", "pl", "2-2", score, 1, pseudo=pseudo)
            trials.append(replace(trial, params={"pseudo.extra_rows": count}))
        labels[trial.run_config().label_key] = {"own": 4.0, "extra": hours}
    teacher = selection.teacher.model_copy(update={"passes": TeacherPasses(labels=labels)})
    assert label_cost_table(replace(selection, trials=trials, teacher=teacher)) == (
        ["extra rows", "trials", "ROUGE-2, median", "device h, labels"],
        [["0", "3", "11.00", "4.000"], ["100", "1", "20.00", "4.500"], ["all", "2", "25.00", "9.000"]],
    )
