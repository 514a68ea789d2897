"""Tables of the paper's report, compared with values computed by hand."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.paper import published
from raydistill.paper.seed_groups import load_seed_groups
from raydistill.paper.tables import describe_sweeps, make_tables
from raydistill.results.sweep_record import read_sweep
from raydistill.training.records import write_run as write_run_record
from tests.factories.sweeps import change_result, change_sweep, sweep_record, sweep_teacher, write_result
from tests.factories.workspace import command, last_json

ROWS = 40
VALIDATIONS = ((1, 0.1), (9, 1.0))  # step and epoch
SPREAD = np.linspace(-4, 4, ROWS)  # per-row differences to a trial's score, with mean 0


def rows_of(name: str, score: float) -> np.ndarray:
    """Distinct rows with this mean, in an order that depends on the trial."""
    return score + np.random.default_rng(list(name.encode())).permutation(SPREAD)


def write_run(sweep: Path, name: str, losses: tuple[float, float], settings: dict) -> tuple[Path, Run]:
    """Write a run without a result: validation losses after a tenth of an epoch and at the end."""
    folder = sweep / "trials" / name
    folder.mkdir(parents=True)
    run = Run.model_validate({"name": "s", "teacher": "bart", "dataset": "xsum", **settings})
    write_run_record(folder / "run.json", run)
    history = [
        {"step": step, "total_steps": VALIDATIONS[-1][0], "epoch": epoch}
        | {"metric": "val_loss", "val_loss": loss, "score": -loss}
        for (step, epoch), loss in zip(VALIDATIONS, losses, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in history))
    return folder, run


def write_trial(
    sweep: Path, name: str, score: float, seed: int = 0, hours: float = 0.5, losses=(3.0, 2.5), **settings
) -> Path:
    """Write a finished trial with this score on test; validation ranks trials in the opposite order."""
    folder, run = write_run(sweep, name, losses, {"training": {"seed": seed}, **settings})
    np.savez(folder / "rows.npz", validation=rows_of(f"v{name}", 60 - score), test=rows_of(name, score))
    layers = run.student.copied.decoder or [0, 6, 11]
    costs = {"device_hours": hours, "latency_ms": 50.0, "speedup": 2.0, "params_m": 3.5, "repetition": 0.02}
    result = {
        "status": "done",
        "method": run.method,
        "size": run.student.size,
        "copied": {"encoder": list(range(12)), "decoder": None if run.student.init == "random" else layers},
        "labels": run.resolved_labels,
        "metrics": {"score": 60 - score, **costs},
        "test": {"rouge2": score, "rougeL": score + 10, "interval": [score - 1, score + 1]},
        "seed": seed,
        "alignment": 2e-7 if seed else 0.0,
        "ended_at": f"2026-01-0{1 + seed}T10:00:00+00:00",
        "host": "here",
    }
    write_result(folder, **result)
    return folder


def write_collapsed(sweep: Path, name: str, seed: int, losses: tuple[float, float], **settings) -> None:
    """Write a trial that was trained to the end and failed because of repetitive outputs."""
    folder, run = write_run(sweep, name, losses, {"training": {"seed": seed}, **settings})
    result = {
        "status": "failed",
        "reason": "collapsed: 90% of its outputs repeat themselves (the teacher's: 0%); try a lower learning rate",
        "method": run.method,
        "size": run.student.size,
        "copied": {"encoder": list(range(12)), "decoder": None},
        "metrics": {"repetition": 0.9, "device_hours": 0.5},
        "seed": seed,
    }
    write_result(folder, **result)


@pytest.fixture
def sweep(tmp_path) -> Path:
    """BART 12-3 on XSUM with all methods (two seeds of sft), three initialisations and all mixes of labels."""
    folder = tmp_path / "outputs" / "sweeps" / "one"
    size = {"size": "12-3"}
    write_trial(folder, "a", 24.0, 0, student=size, losses=(2.76, 2.5))
    write_trial(folder, "b", 26.0, 1, student=size, losses=(2.74, 2.4))
    write_trial(folder, "c", 28.0, 0, method="kd", student=size)
    write_trial(folder, "d", 27.0, 0, method="pl", student=size)
    write_trial(folder, "e", 10.0, 0, student={**size, "init": "random"}, losses=(3.96, 3.6))
    write_collapsed(folder, "i", 1, (4.14, 3.8), student={**size, "init": "random"})
    write_trial(folder, "f", 20.0, 0, student={**size, "copied": {"decoder": [0, 1, 2]}}, losses=(3.0, 2.6))
    write_trial(folder, "g", 26.5, 0, student=size, labels="original+pseudo")
    write_trial(folder, "h", 29.0, 0, student=size, labels="original+pseudo+/other/set")
    passes = {
        "labels": {
            "original": {},
            "pseudo": {"own": 2.0},
            "original+pseudo": {"own": 2.0},
            "original+pseudo+/other/set": {"own": 2.0, "others": 4.0},
        },
        "stores": {"decoder-1/layer-11": 0.25, "encoder-1/states": 0.75},
    }
    teacher = sweep_teacher(
        name="bart",
        size="12-12",
        passes=passes,
        label_sets={"own": {"teacher": "bart", "rows": 28999, "quality": {"rouge1": 44.4, "rouge2": 21.25}}},
        machine={"kind": "cpu", "name": "EPYC", "cores": 2, "threads": 1},
        test={"rouge2": 30.0, "rougeL": 41.0, "interval": [29, 31]},
        costs={"latency_ms": 100.0, "params_m": 4.0},
        corpus={"rows": 29000, "source_words_mean": 11.9, "target_words_mean": 11.1, "bytes": 3_900_000},
        data={},
    )
    versions = {"raydistill": "0.1.0", "torch": "2.13.0"}
    sweep_record(teacher, name="one", versions=versions).write(folder / "sweep.json")
    np.savez(folder / "teacher_rows.npz", test=rows_of("teacher", 30.0))
    return folder


def table(folders, name: str) -> list[dict[str, str]]:
    """The rows of a table as mappings from column to cell."""
    [selected] = [t for t in make_tables(*load_seed_groups(folders)) if t.name == name]
    return [dict(zip(selected.header, row, strict=True)) for row in selected.rows]


def row(folders, name: str, **cells: str) -> dict[str, str]:
    [selected] = [r for r in table(folders, name) if all(r[k] == v for k, v in cells.items())]
    return selected


def parse_difference(cell: str) -> tuple[float, ...]:
    """The difference, the ends of its interval and the seeds of a cell such as "+3.00 [+2.10, +3.90], n = 1"."""
    match = re.fullmatch(r"(\S+) \[(\S+), (\S+)\], n = (\d+)", cell)
    assert match, cell
    return float(match[1]), float(match[2]), float(match[3]), int(match[4])


def assert_interval(cell: str, difference: float, seeds: int, row_differences: np.ndarray) -> None:
    """Assert that the cell's interval agrees with the normal approximation for these differences of rows."""
    mean, low, high, n = parse_difference(cell)
    half = 1.96 * row_differences.std() / np.sqrt(len(row_differences))
    assert (mean, n) == (difference, seeds)
    assert (low, high) == (pytest.approx(mean - half, abs=0.2 * half), pytest.approx(mean + half, abs=0.2 * half))


def test_table_5_has_mean_scores_end_to_end_costs_and_paired_differences(sweep):
    cells = row([sweep], "table5", teacher="BART", size="12-3", data="XSUM")
    assert (cells["SFT score"], cells["SFT score (paper)"], cells["SFT seeds"]) == ("25.00", "21.08", "2")
    assert (cells["KD score"], cells["Pseudo score"]) == ("28.00", "27.00")
    assert (cells["teacher score"], cells["teacher score (paper)"]) == ("30.00", "22.29")
    # 0.5 hours each, plus the cache (1) for kd, its encoder states (0.75) for the others, the label set (2) for pl
    assert (cells["SFT cost"], cells["KD cost"], cells["Pseudo cost"]) == ("1.250", "1.500", "3.250")
    # kd and pl have only seed 0, so that seed 1 of sft is not compared
    assert_interval(cells["KD - SFT"], 4.0, 1, rows_of("c", 28.0) - rows_of("a", 24.0))
    assert_interval(cells["Pseudo - SFT"], 3.0, 1, rows_of("d", 27.0) - rows_of("a", 24.0))


def test_run_without_the_teacher_cache_does_not_pay_for_it(sweep):
    write_trial(sweep, "l", 99.0, 0, student={"size": "12-6"}, training={"teacher_cache": "off"})
    assert row([sweep], "table5", teacher="BART", data="XSUM", size="12-6")["SFT cost"] == "0.500"


def test_setting_with_the_best_validation_score_is_shown(sweep):
    """Validation ranks trials in the opposite order, so that selection by test would show another one."""
    write_trial(sweep, "k", 29.5, 0, method="kd", student={"size": "12-3"}, loss={"alpha_hidden": 10})
    assert row([sweep], "table5", teacher="BART", data="XSUM", size="12-3")["KD score"] == "28.00"


def test_loss_variations_are_compared_with_plain_kd_and_excluded_from_table_5(sweep):
    student = {"size": "12-3"}
    write_trial(sweep, "n", 20.0, 0, method="kd", student=student, loss={"alpha_hidden": 0})
    write_trial(sweep, "o", 21.0, 0, method="kd", student=student, loss={"alpha_cosine": 1, "temperature": 1})
    write_trial(sweep, "p", 22.0, 0, method="kd", student=student, loss={"normalize_hidden": True})
    variations = {r["variation"]: r for r in table([sweep], "section63")}
    assert {k: (r["score"], r["less plain KD"].split(" ")[0]) for k, r in variations.items()} == {
        "plain KD": ("28.00", ""),
        "no hidden loss": ("20.00", "-8.00"),
        "cosine 1, temperature 1": ("21.00", "-7.00"),
        "normalised hidden": ("22.00", "-6.00"),
    }
    assert_interval(variations["no hidden loss"]["less plain KD"], -8.0, 1, rows_of("n", 20.0) - rows_of("c", 28.0))
    # All three have a better validation score than plain KD
    assert row([sweep], "table5", teacher="BART", size="12-3", data="XSUM")["KD score"] == "28.00"


def bleu_rows(short: float, long: float, length: int) -> np.ndarray:
    """Two outputs with n-gram precisions `short` (10 words) and `long` (`length` words) and no brevity penalty."""
    totals = np.array([[10, 8, 6, 4], [length, length * 4 // 5, length * 3 // 5, length * 2 // 5]])
    counts = totals * np.array([[short], [long]])
    return np.concatenate([counts, totals, [[10, 10], [length, 10]]], axis=1).astype(np.int64)


def test_bleu_is_computed_over_the_corpus_and_differences_agree_with_scores(tmp_path):
    """By hand: sft (5 + 30) / 40 = 87.5 and (10 + 25) / 60 = 58.33, kd (10 + 15) / 40 = 62.5, teacher 100."""
    folder = tmp_path / "sweeps" / "bleu"
    settings = {"teacher": "marian", "dataset": "wmt16_en_ro", "student": {"size": "6-3"}}
    for name, seed, method, score, rows in (
        ("a", 0, "sft", 87.5, bleu_rows(0.5, 1, 30)),
        ("b", 1, "sft", 100 * 35 / 60, bleu_rows(1, 0.5, 50)),
        ("c", 0, "kd", 62.5, bleu_rows(1, 0.5, 30)),
    ):
        trial = write_trial(folder, name, 0, seed, method=method, **settings)
        test = {"bleu": score, "interval": [score, score]}
        change_result(trial, test=test, copied={"encoder": [0, 1, 2, 3, 4, 5], "decoder": [0, 2, 5]})
        np.savez(trial / "rows.npz", test=rows)
    test = {"bleu": 100.0, "interval": [100, 100]}
    sweep_record(sweep_teacher(name="marian", size="6-6", metric="bleu", test=test)).write(folder / "sweep.json")
    np.savez(folder / "teacher_rows.npz", test=bleu_rows(1, 1, 30))
    cells = row([folder], "table5", teacher="Marian")
    assert (cells["SFT score"], cells["KD score"], cells["SFT score (paper)"]) == ("72.92", "62.50", "25.91")
    assert parse_difference(cells["KD - SFT"])[::3] == (-25.0, 1)  # seed 0 of both
    assert parse_difference(row([folder], "table10", teacher="Marian")["Orig"])[::3] == (-27.08, 2)


def test_explicit_layers_that_equal_the_spaced_ones_count_as_spaced(sweep):
    write_trial(sweep, "l", 25.0, 0, method="kd", student={"size": "12-6", "copied": {"decoder": [0, 2, 4, 7, 9, 11]}})
    write_trial(sweep, "m", 26.0, 0, method="pl", student={"size": "12-6", "copied": {"decoder": [0, 1, 2, 3, 4, 5]}})
    cells = row([sweep], "table5", teacher="BART", size="12-6", data="XSUM")
    assert (cells["KD score"], cells["Pseudo score"]) == ("25.00", "")
    assert {r["name"] for r in table([sweep], "table8") if r["layers copied"] == "0,1,2"} == {"SFT lo"}


def test_collapsed_student_is_counted_and_included_in_loss_comparisons(sweep):
    cells = row([sweep], "table8", **{"layers copied": "-"})
    assert (cells["seeds"], cells["repetition"]) == ("2", "0.46")
    assert describe_sweeps(load_seed_groups([sweep])[0]) == [
        "one: 9 trials: 8 done, 1 failed (1 collapsed); teacher bart; logits of a full-depth copy differ by at most "
        "2.0e-07 of the largest logit; engine ctranslate2 fp32; machine EPYC (cpu, 1 threads); hosts here; versions "
        "raydistill 0.1.0, torch 2.13.0; seeds 0, 1; ended 2026-01-01 to 2026-01-02"
    ]


def test_a_metric_that_the_paper_does_not_report_is_named(sweep):
    chrf = second_sweep(sweep, "two", {"metric": "chrf++", "metrics": {"chrf++": 50.0}})
    [description] = describe_sweeps(load_seed_groups([chrf])[0])
    assert "; scores are of chrf++, which the paper does not report; engine" in description


def second_sweep(first: Path, name: str, change: dict | None = None) -> Path:
    """Write another sweep of the same teacher, with sft and kd by a better recipe."""
    folder = first.parent / name
    write_trial(folder, "a", 28.5, student={"size": "12-3"})
    write_trial(folder, "b", 27.5, method="kd", student={"size": "12-3"})
    record = read_sweep(first)
    teacher = record.teacher.model_copy(update=change or {})
    record.model_copy(update={"teacher": teacher}).write(folder / "sweep.json")
    np.savez(folder / "teacher_rows.npz", test=rows_of("teacher", 30.0))
    return folder


def test_of_two_sweeps_each_has_a_row_and_no_row_has_figures_of_both(sweep):
    other = second_sweep(sweep, "two")
    both = [sweep, other]
    assert "sweep" not in table([sweep], "table5")[0]
    rows = {r["sweep"]: r for r in table(both, "table5") if (r["teacher"], r["data"]) == ("BART", "XSUM")}
    assert {k: (r["SFT score"], r["KD score"], r["Pseudo score"]) for k, r in rows.items()} == {
        "one": ("25.00", "28.00", "27.00"),
        "two": ("28.50", "27.50", ""),
    }
    rows = {r["sweep"]: r for r in table(both, "table10") if (r["teacher"], r["data"]) == ("BART", "XSUM")}
    assert {k: (r["Orig"].split(" ")[0], r["PL"].split(" ")[0]) for k, r in rows.items()} == {
        "one": ("-5.00", "-3.00"),
        "two": ("-1.50", ""),
    }
    rows = {(r["sweep"], r["size"]): r["our method"] for r in table(both, "table6") if r["sweep"]}
    assert rows == {
        ("one", "12-3"): "SFT on original, n = 1",
        ("two", "12-3"): "KD on original, n = 1",
        ("one", "12-12"): "teacher",
        ("two", "12-12"): "teacher",
    }
    # Only the first sweep compares initialisations, so that the second has no row in Table 8
    assert {r["sweep"] for r in table(both, "table8") if r["seeds"]} == {"one"}


@pytest.mark.parametrize(("change", "difference"), [({"key": "l"}, "teacher"), ({"data": {"test": "y"}}, "test split")])
def test_sweeps_with_different_teachers_or_data_of_one_name_are_rejected(sweep, change, difference):
    teacher = read_sweep(sweep).teacher.model_copy(update={"data": {"train": "w", "test": "x"}})
    change_sweep(sweep, teacher=teacher)
    assert make_tables(*load_seed_groups([sweep, second_sweep(sweep, "two")]))
    with pytest.raises(UserError, match=f"have a different {difference}; make a report for each"):
        make_tables(*load_seed_groups([sweep, second_sweep(sweep, "three", change)]))


def test_full_depth_student_and_teacher_have_separate_rows(sweep):
    write_trial(sweep, "z", 31.0, 0, student={"size": "12-12"})
    rows = {r["our method"]: r["ROUGE-2"] for r in table([sweep], "table6") if r["size"] == "12-12"}
    assert rows == {"teacher": "30.00", "SFT on original, n = 1": "31.00"}


def test_table_7_has_the_summary_level_rouge_l_next_to_the_papers(tmp_path):
    """The paper's 40.89 of bart-large-cnn is rougeLsum; by rougeL the same outputs score about 30."""
    folder = tmp_path / "outputs" / "sweeps" / "cnn"
    student = write_trial(folder, "a", 20.0, 0, dataset={"name": "cnn_dailymail"}, student={"size": "12-3"})
    scores = {"rouge2": 20.0, "rougeL": 29.0, "rougeLsum": 39.0, "interval": [19, 21]}
    change_result(student, test=scores)
    teacher = sweep_teacher(name="bart", size="12-12", test={**scores, "rougeLsum": 41.0}, data={})
    sweep_record(teacher, name="cnn").write(folder / "sweep.json")
    rows = {r["our method"]: r for r in table([folder], "table7") if r["our method"]}
    assert [r["ROUGE-Lsum"] for r in rows.values()] == ["39.00", "41.00"]
    assert rows["teacher"]["ROUGE-Lsum (paper)"] == "40.89"


def test_missing_values_are_empty_cells(sweep):
    cells = row([sweep], "table5", teacher="BART", data="CNN")
    assert (cells["SFT score"], cells["KD - SFT"], cells["SFT score (paper)"]) == ("", "", "21.21")
    assert row([sweep], "table5", teacher="Pegasus", data="CNN")["KD score (paper)"] == ""


def test_changed_score_changes_only_its_cell(sweep):
    before = {t.name: t.rows for t in make_tables(*load_seed_groups([sweep]))}
    change_result(sweep / "trials" / "a", test={"rouge2": 25.0, "rougeL": 34.0, "interval": [23, 25]})
    after = {t.name: t.rows for t in make_tables(*load_seed_groups([sweep]))}
    changed = [
        (name, old, new)
        for name in before
        for a, b in zip(before[name], after[name], strict=True)
        for old, new in zip(a, b, strict=True)
        if old != new
    ]
    assert changed == [("table5", "25.00", "25.50")]


def test_unfinished_trial_is_excluded_from_scores(sweep):
    (sweep / "trials" / "b" / "result.json").unlink()
    assert row([sweep], "table5", teacher="BART", data="XSUM")["SFT score"] == "24.00"


def test_tables_2_and_4_sum_hours_of_trials_and_teacher_passes(sweep):
    costs = {r["technique"]: r["device-hours"] for r in table([sweep], "table2") if r["data"] == "XSUM"}
    assert costs == {"SFT": "1.250", "Pseudo": "3.250", "KD": "1.500"}
    paper = {r["technique"]: r["paper: GPU hours"] for r in table([sweep], "table2") if r["data"] == "CNN"}
    assert paper == {"SFT": "2.5", "Pseudo": "19.0", "KD": "14.0"}
    cells = row([sweep], "table4", teacher="BART", data="XSUM")
    assert (cells["device-hours"], cells["device-hours (paper)"]) == ("11.500", "787")  # 9 x 0.5 + 7
    assert (cells["experiments"], cells["% of hours"], cells["% of hours (paper)"]) == ("9", "100", "30")


def test_shared_teacher_pass_is_counted_once(sweep):
    """The second sweep shares label sets and encoder states, and computes states of one more layer (0.5 hours)."""
    stores = {"encoder-1/states": 0.75, "decoder-1/layer-5": 0.5}
    passes = read_sweep(sweep).teacher.passes.model_copy(update={"stores": stores})
    other = second_sweep(sweep, "two", {"passes": passes})
    cells = row([sweep, other], "table4", teacher="BART", data="XSUM")
    assert cells["device-hours"] == "13.000"  # 11 x 0.5 + 7 + 0.5


def test_pseudo_label_quality_is_reported_after_table_10(sweep):
    [cells] = table([sweep], "table10_labels")
    assert (cells["teacher"], cells["data"], cells["label set"], cells["rows"]) == ("BART", "XSUM", "own", "28999")
    assert (cells["ROUGE-1"], cells["ROUGE-2"], cells["ROUGE-L"], cells["BLEU"]) == ("44.40", "21.25", "", "")


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("/home/me/teachers/mine-6-6", "mine-6-6"),
        ("../shared/teachers/mine-6-6/", "mine-6-6"),
        ("me/mine-6-6", "me/mine-6-6"),  # on the hub
        ("facebook/bart-large-xsum@abc", "BART"),
    ],
)
def test_teacher_in_a_folder_is_named_by_the_last_part_of_its_path(teacher, name):
    assert published.teacher_name(teacher) == name


def test_table_3_has_corpus_statistics(sweep):
    cells = row([sweep], "table3", data="XSUM")
    assert (cells["training rows"], cells["training rows (paper)"]) == ("29000", "204017")
    assert (cells["mean source words"], cells["size (MB)"], cells["size (MB) (paper)"]) == ("11.9", "3.9", "501")


def test_best_by_size_selects_by_validation_over_all_methods(sweep):
    student = row([sweep], "table6", size="12-3")
    assert (student["our method"], student["ROUGE-2"]) == ("SFT on original, n = 1", "10.00")
    assert (student["speed-up"], student["ROUGE-2 (paper)"]) == ("2.00", "22.40")
    teacher = row([sweep], "table6", size="12-12")
    assert (teacher["our method"], teacher["ROUGE-2"], teacher["ms for 32"]) == ("teacher", "30.00", "100")


def test_table_8_compares_initialisations_seed_by_seed(sweep):
    inits = {r["layers copied"]: r for r in table([sweep], "table8") if r["size"] or r["layers copied"] == "9,10,11"}
    columns = ("min loss", "min loss (paper)", "less spaced", "tenth of epoch", "tenth less spaced", "seeds")
    assert {k: tuple(r[c] for c in columns) for k, r in inits.items()} == {
        "0,6,11": ("2.450 (2.400 to 2.500)", "2.14", "", "2.750 (2.740 to 2.760)", "", "2"),
        "9,10,11": ("", "2.18", "", "", "", ""),
        "0,1,2": ("2.600", "2.20", "+0.100, n = 1", "3.000", "+0.240, n = 1", "1"),
        "-": (
            "3.700 (3.600 to 3.800)",
            "2.26",
            "+1.250 (+1.100 to +1.400), n = 2",
            "4.050 (3.960 to 4.140)",
            "+1.300 (+1.200 to +1.400), n = 2",
            "2",
        ),
    }


def test_table_10_has_differences_to_the_teacher(sweep):
    columns = row([sweep], "table10", teacher="BART", data="XSUM")
    cells = [columns[name] for name in ("Orig", "PL", "Orig+PL", "Orig+PL+PL*")]
    assert [cell.split(" ")[0] for cell in cells] == ["-5.00", "-3.00", "-3.50", "-1.00"]
    sft_rows = (rows_of("a", 24.0) + rows_of("b", 26.0)) / 2
    assert_interval(cells[0], -5.0, 2, sft_rows - rows_of("teacher", 30.0))
    assert (columns["PL (paper)"], columns["Orig+PL+PL* (paper)"]) == ("-0.9", "+0.1")
    (sweep / "teacher_rows.npz").write_bytes(b"PK damaged")
    with pytest.raises(UserError, match=r"teacher_rows\.npz: damaged: .*\. Delete this file") as error:
        row([sweep], "table10", teacher="BART", data="XSUM")
    assert "repeat the trial" not in str(error.value)
    (sweep / "teacher_rows.npz").unlink()
    assert row([sweep], "table10", teacher="BART", data="XSUM")["Orig"] == "-5.00, n = 2"


def test_published_numbers_are_consistent():
    """Detect typing errors in published numbers that can be computed from each other."""
    assert sum(hours for hours, _ in published.TABLE_4.values()) == 2631
    assert sum(runs for _, runs in published.TABLE_4.values()) == 287
    for (teacher, size, data), result in published.TABLES_6_7.items():
        depth = {"BART": "12-12", "Pegasus": "16-16"}.get(teacher)
        if depth and size != depth:
            base = published.TABLES_6_7[teacher, depth, data].latency_ms
            assert result.speedup == pytest.approx(base / result.latency_ms, abs=0.01), (
                teacher,
                size,
                data,
            )


def test_command_prints_and_writes_all_tables_and_figures(sweep, tmp_path):
    done = last_json(command(tmp_path / "outputs", "report", "one", "--json"))
    folder = Path(done["folder"])
    assert folder == tmp_path / "outputs" / "reports" / "one"
    with (folder / "table5.csv").open() as file:
        by_key = {(r["teacher"], r["data"]): r for r in csv.DictReader(file)}
    assert by_key["BART", "XSUM"]["KD score"] == "28.00"
    text = (folder / "report.md").read_text()
    for n in range(2, 11):
        assert f"## Table {n}: " in text
    for name in ("figure1.png", "figure2.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    rejected = command(tmp_path / "outputs", "report", "nothing")
    assert rejected.returncode == 2
    assert "no such sweep" in rejected.stderr
