"""The report in the paper's form: its figures, ours worked out by hand, and nothing made up."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from raydistill.config.errors import UserError
from raydistill.config.run import Run
from raydistill.results import paper
from raydistill.results.report import tables
from raydistill.results.settings import read_settings
from tests.world import command, last_json

ROWS = 40


def write_trial(sweep: Path, name: str, score: float, seed: int = 0, hours: float = 0.5, **run) -> Path:
    """A finished trial as a run leaves it; every row of test has the same score, so its mean is known."""
    folder = sweep / "trials" / name
    folder.mkdir(parents=True)
    settings = Run(name="s", teacher="marian", dataset="wmt16_en_ro", training={"seed": seed}, **run)
    (folder / "run.json").write_text(settings.model_dump_json())
    rows = np.full(ROWS, score)
    np.savez(folder / "rows.npz", validation=rows, test=rows)
    layers = settings.student.copied.decoder or [0, 2, 5]
    result = {
        "status": "done",
        "method": settings.method,
        "size": settings.student.size,
        "copied": {"encoder": None, "decoder": None if settings.student.init == "random" else layers},
        "labels": settings.label_source,
        "metrics": {"score": score, "gpu_hours": hours, "latency_ms": 50.0, "speedup": 2.0, "params_m": 3.5},
        "test": {"rouge2": score, "rougeL": score + 10, "interval": [score - 1, score + 1]},
        "seed": seed,
    }
    (folder / "result.json").write_text(json.dumps(result))
    checks = [{"step": 1, "epoch": 0.1, "val_loss": 3.0 - score / 100}, {"step": 9, "epoch": 1.0, "val_loss": 2.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in checks))
    return folder


@pytest.fixture
def sweep(tmp_path) -> Path:
    """Marian 6-3 on en-ro with all methods at two seeds, three initialisations and all label mixes."""
    folder = tmp_path / "outputs" / "sweeps" / "one"
    size = {"size": "6-3"}
    write_trial(folder, "a", 24.0, 0, student=size)
    write_trial(folder, "b", 26.0, 1, student=size)
    write_trial(folder, "c", 28.0, 0, method="kd", student=size)
    write_trial(folder, "d", 27.0, 0, method="pl", student=size)
    write_trial(folder, "e", 10.0, 0, student={**size, "init": "random"})
    write_trial(folder, "f", 20.0, 0, student={**size, "copied": {"decoder": [0, 1, 2]}})
    write_trial(folder, "g", 26.5, 0, student=size, labels="original+pseudo")
    write_trial(folder, "h", 29.0, 0, student=size, labels="original+pseudo+/other/set")
    passes = {
        "labels": {
            "original": {},
            "pseudo": {"own": 2.0},
            "original+pseudo": {"own": 2.0},
            "original+pseudo+/other/set": {"own": 2.0, "others": 4.0},
        },
        "cache": 1.0,
    }
    teacher = {
        "name": "marian",
        "key": "k",
        "size": "6-6",
        "passes": passes,
        "test": {"rouge2": 30.0, "rougeL": 41.0, "interval": [29, 31]},
        "costs": {"latency_ms": 100.0, "params_m": 4.0},
        "corpus": {"rows": 29000, "source_words_mean": 11.9, "target_words_mean": 11.1, "bytes": 3_900_000},
    }
    info = {"name": "one", "metric": "rouge2", "teacher": teacher, "teacher_gpu_hours": 7.0}
    (folder / "sweep.json").write_text(json.dumps(info))
    np.savez(folder / "teacher_rows.npz", test=np.full(ROWS, 30.0))
    return folder


def table(folders, name: str) -> list[dict[str, str]]:
    """A table's rows by column."""
    [found] = [t for t in tables(*read_settings(folders)) if t.name == name]
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


def row(folders, name: str, **where: str) -> dict[str, str]:
    [found] = [r for r in table(folders, name) if all(r[k] == v for k, v in where.items())]
    return found


def test_table_5_has_means_over_seeds_costs_end_to_end_and_paired_differences(sweep):
    found = row([sweep], "table5", teacher="Marian", size="6-3", data="EN-RO")
    assert (found["SFT score"], found["SFT score (paper)"], found["SFT seeds"]) == ("25.00", "25.91", "2")
    assert (found["KD score"], found["Pseudo score"]) == ("28.00", "27.00")
    assert (found["teacher score"], found["teacher score (paper)"]) == ("30.00", "27.69")
    # 0.5 hours each; kd needs the cache (1), pl the label set (2).
    assert (found["SFT cost"], found["KD cost"], found["Pseudo cost"]) == ("0.500", "1.500", "2.500")
    assert found["KD - SFT"] == "+3.00 [+3.00, +3.00], n = 1"
    assert found["Pseudo - SFT"] == "+2.00 [+2.00, +2.00], n = 1"


def second_sweep(first: Path, name: str, change: dict | None = None) -> Path:
    """Another sweep of the same teacher, which tried plain fine-tuning and kd by a better recipe."""
    folder = first.parent / name
    recipe = {"student": {"size": "6-3"}, "hours": 0.25}
    write_trial(folder, "a", 28.5, 0, **recipe)
    write_trial(folder, "b", 27.5, 0, method="kd", **recipe)
    info = json.loads((first / "sweep.json").read_text())
    info["teacher"] |= change or {}
    (folder / "sweep.json").write_text(json.dumps(info))
    np.savez(folder / "teacher_rows.npz", test=np.full(ROWS, 30.0))
    return folder


def test_of_two_sweeps_each_has_a_row_and_no_row_has_figures_of_both(sweep):
    other = second_sweep(sweep, "two")
    both = [sweep, other]
    assert "sweep" not in table([sweep], "table5")[0]
    for place in ("table2", "table5", "table9", "table10"):
        assert {r["sweep"] for r in table(both, place) if r["teacher"] == "Marian"} <= {"one", "two", ""}
    rows = {r["sweep"]: r for r in table(both, "table5") if r["teacher"] == "Marian"}
    assert {k: (r["SFT score"], r["KD score"], r["Pseudo score"]) for k, r in rows.items()} == {
        "one": ("25.00", "28.00", "27.00"),
        "two": ("28.50", "27.50", ""),
    }
    rows = {r["sweep"]: r for r in table(both, "table10") if r["teacher"] == "Marian"}
    assert {k: (r["Orig"].split(" ")[0], r["PL"].split(" ")[0]) for k, r in rows.items()} == {
        "one": ("-5.00", "-3.00"),
        "two": ("-1.50", ""),
    }
    rows = {(r["sweep"], r["size"]): r["ours by"] for r in table(both, "table6_EN-RO")}
    assert rows == {
        ("one", "6-3"): "SFT on original+pseudo+set, n = 1",
        ("two", "6-3"): "SFT on original, n = 1",
        ("one", "6-6"): "teacher",
        ("two", "6-6"): "teacher",
    }
    # Only the first compares starts: the second's fine-tuning is no row of Table 9.
    assert {r["sweep"] for r in table(both, "table9") if r["seeds"]} == {"one"}


@pytest.mark.parametrize(("change", "what"), [({"key": "l"}, "teacher"), ({"data": {"test": "y"}}, "test split")])
def test_sweeps_of_two_teachers_or_data_sets_of_one_name_are_not_reported_together(sweep, change, what):
    info = json.loads((sweep / "sweep.json").read_text())
    info["teacher"]["data"] = {"train": "w", "test": "x"}
    (sweep / "sweep.json").write_text(json.dumps(info))
    assert tables(*read_settings([sweep, second_sweep(sweep, "two")]))
    with pytest.raises(UserError, match=f"the {what} of one is not the other's; report them apart"):
        tables(*read_settings([sweep, second_sweep(sweep, "three", change)]))


def test_a_full_depth_student_does_not_take_the_teachers_row(sweep):
    write_trial(sweep, "z", 31.0, 0, student={"size": "6-6"})
    rows = {r["ours by"]: r["ROUGE-2"] for r in table([sweep], "table6_EN-RO") if r["size"] == "6-6"}
    assert rows == {"teacher": "30.00", "SFT on original, n = 1": "31.00"}


def test_what_nobody_has_is_an_empty_cell(sweep):
    ours = row([sweep], "table5", teacher="BART", size="12-3")
    assert (ours["SFT score"], ours["KD - SFT"], ours["SFT score (paper)"]) == ("", "", "21.08")
    assert row([sweep], "table5", teacher="Pegasus", data="CNN")["KD score (paper)"] == ""


def test_changing_one_stored_score_changes_its_cell_and_no_other(sweep):
    before = {t.name: t.rows for t in tables(*read_settings([sweep]))}
    path = sweep / "trials" / "a" / "result.json"
    result = json.loads(path.read_text())
    result["test"]["rouge2"] = 25.0
    path.write_text(json.dumps(result))
    after = {t.name: t.rows for t in tables(*read_settings([sweep]))}
    changed = [
        (name, old, new)
        for name in before
        for a, b in zip(before[name], after[name], strict=True)
        for old, new in zip(a, b, strict=True)
        if old != new
    ]
    assert changed == [("table5", "25.00", "25.50")]


def test_a_trial_that_is_not_finished_is_in_no_score(sweep):
    (sweep / "trials" / "b" / "result.json").unlink()
    assert row([sweep], "table5", teacher="Marian")["SFT score"] == "24.00"


def test_table_2_and_4_add_up_runs_and_passes(sweep):
    costs = {r["technique"]: r["device-hours"] for r in table([sweep], "table2") if r["teacher"] == "Marian"}
    assert costs == {"SFT": "0.500", "Pseudo": "2.500", "KD": "1.500"}
    theirs = {r["technique"]: r["paper: GPU hours"] for r in table([sweep], "table2") if r["data"] == "CNN"}
    assert theirs == {"SFT": "2.5", "Pseudo": "19.0", "KD": "14.0"}
    found = row([sweep], "table4", teacher="Marian")
    assert (found["device-hours"], found["device-hours (paper)"]) == ("11.000", "185")  # 8 x 0.5 + 7
    assert (found["experiments"], found["% of hours"], found["% of hours (paper)"]) == ("8", "100", "7")


def test_table_3_describes_the_corpus(sweep):
    found = row([sweep], "table3", data="EN-RO")
    assert (found["training rows"], found["training rows (paper)"]) == ("29000", "610319")
    assert (found["mean source words"], found["size (MB)"], found["size (MB) (paper)"]) == ("11.9", "3.9", "178")


def test_best_by_size_takes_the_best_on_validation_of_all_methods(sweep):
    student = row([sweep], "table6_EN-RO", size="6-3")
    assert student["ours by"] == "SFT on original+pseudo+set, n = 1"
    assert (student["ROUGE-2"], student["speed-up"]) == ("29.00", "2.00")
    teacher = row([sweep], "table6_EN-RO", size="6-6")
    assert (teacher["ours by"], teacher["ROUGE-2"], teacher["ms for 32"]) == ("teacher", "30.00", "100")


def test_table_9_is_by_what_the_decoder_started_from(sweep):
    found = {r["layers copied"]: r for r in table([sweep], "table9") if r["data"] == "EN-RO"}
    assert {k: (r["min loss"], r["min loss (paper)"], r["seeds"]) for k, r in found.items()} == {
        "0,2,5": ("2.500", "1.66", "2"),
        "3,4,5": ("", "1.70", ""),
        "0,1,2": ("2.500", "1.88", "1"),
        "-": ("2.500", "2.20", "1"),
    }
    assert found["0,2,5"]["tenth of epoch"] == "2.750"  # the mean of 2.76 and 2.74


def test_table_10_is_less_the_teacher(sweep):
    found = row([sweep], "table10", teacher="Marian")
    cells = [found[name] for name in ("Orig", "PL", "Orig+PL", "Orig+PL+PL*")]
    assert [cell.split(" ")[0] for cell in cells] == ["-5.00", "-3.00", "-3.50", "-1.00"]
    assert cells[0] == "-5.00 [-5.00, -5.00], n = 2"
    assert (found["PL (paper)"], found["Orig+PL+PL* (paper)"]) == ("-0.8", "")
    (sweep / "teacher_rows.npz").unlink()
    assert row([sweep], "table10", teacher="Marian")["Orig"] == "-5.00, n = 2"


def test_the_papers_figures_agree_with_each_other():
    """Slips of copying show where the paper's own numbers can be worked out from each other."""
    assert sum(hours for hours, _ in paper.TABLE_4.values()) == 2631
    assert sum(runs for _, runs in paper.TABLE_4.values()) == 287
    for (teacher, size, data), found in paper.TABLES_6_7.items():
        depth = {"BART": "12-12", "Pegasus": "16-16"}.get(teacher)
        if depth and size != depth:
            base = paper.TABLES_6_7[teacher, depth, data].ms
            assert found.speedup == pytest.approx(base / found.ms, abs=0.01), (teacher, size, data)


def test_the_command_prints_and_writes_everything(sweep, tmp_path):
    done = last_json(command(tmp_path / "outputs", "report", "one", "--json"))
    place = Path(done["folder"])
    assert place == tmp_path / "outputs" / "reports" / "one"
    with (place / "table5.csv").open() as file:
        by_place = {(r["teacher"], r["data"]): r for r in csv.DictReader(file)}
    assert by_place["Marian", "EN-RO"]["KD score"] == "28.00"
    text = (place / "report.md").read_text()
    for n in range(2, 11):
        assert f"## Table {n}: " in text
    for name in ("figure1.png", "figure2.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    refused = command(tmp_path / "outputs", "report", "nothing")
    assert refused.returncode == 2
    assert "no such sweep" in refused.stderr
