"""The report in the paper's form: its figures, ours worked out by hand, and nothing made up."""

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest

from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.paper import published
from raydistill.paper.settings import read_settings
from raydistill.paper.tables import heads, tables
from tests.world import command, last_json

ROWS = 40
CHECKS = ((1, 0.1), (9, 1.0))  # step and epoch of a run's validations
SPREAD = np.linspace(-4, 4, ROWS)  # of the rows of a trial around its score: their mean is the score


def rows_of(name: str, score: float) -> np.ndarray:
    """Rows with this mean, no two alike, in an order of the trial's own."""
    return score + np.random.default_rng(list(name.encode())).permutation(SPREAD)


def write_run(sweep: Path, name: str, losses: tuple[float, float], asked: dict) -> tuple[Path, Run]:
    """A run's folder before its result: validation losses after a tenth of an epoch and at the end."""
    folder = sweep / "trials" / name
    folder.mkdir(parents=True)
    run = Run.model_validate({"name": "s", "teacher": "bart", "dataset": "xsum", **asked})
    (folder / "run.json").write_text(run.model_dump_json())
    checks = [
        {"step": step, "epoch": epoch, "val_loss": loss} for (step, epoch), loss in zip(CHECKS, losses, strict=True)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in checks))
    return folder, run


def write_trial(
    sweep: Path, name: str, score: float, seed: int = 0, hours: float = 0.5, losses=(3.0, 2.5), **asked
) -> Path:
    """A finished trial as a run leaves it, with this score on test; validation has them in the opposite order."""
    folder, run = write_run(sweep, name, losses, {"training": {"seed": seed}, **asked})
    np.savez(folder / "rows.npz", validation=rows_of(f"v{name}", 60 - score), test=rows_of(name, score))
    layers = run.student.copied.decoder or [0, 6, 11]
    costs = {"gpu_hours": hours, "latency_ms": 50.0, "speedup": 2.0, "params_m": 3.5, "repetition": 0.02}
    result = {
        "status": "done",
        "method": run.method,
        "size": run.student.size,
        "copied": {"encoder": list(range(12)), "decoder": None if run.student.init == "random" else layers},
        "labels": run.label_source,
        "metrics": {"score": 60 - score, **costs},
        "test": {"rouge2": score, "rougeL": score + 10, "interval": [score - 1, score + 1]},
        "seed": seed,
        "alignment": 2e-7 if seed else 0.0,
        "ended_at": f"2026-01-0{1 + seed}T10:00:00+00:00",
        "host": "here",
    }
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_collapsed(sweep: Path, name: str, seed: int, losses: tuple[float, float], **asked) -> None:
    """A trial that was trained to its end and then found to write nothing but repetitions."""
    folder, run = write_run(sweep, name, losses, {"training": {"seed": seed}, **asked})
    result = {
        "status": "failed",
        "reason": "collapsed: 90% of its outputs repeat themselves (the teacher's: 0%); try a lower learning rate",
        "method": run.method,
        "size": run.student.size,
        "copied": {"encoder": list(range(12)), "decoder": None},
        "metrics": {"repetition": 0.9, "gpu_hours": 0.5},
        "seed": seed,
    }
    (folder / "result.json").write_text(json.dumps(result))


@pytest.fixture
def sweep(tmp_path) -> Path:
    """BART 12-3 on XSUM with all methods (two seeds of fine-tuning), three starts and all label mixes."""
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
        "cache": 1.0,
        "stores": {"decoder-1/layer-11": 0.25, "encoder-1/states": 0.75},
    }
    teacher = {
        "name": "bart",
        "key": "k",
        "size": "12-12",
        "passes": passes,
        "label_sets": {"own": {"teacher": "bart", "rows": 28999, "quality": {"rouge1": 44.4, "rouge2": 21.25}}},
        "engine": "ctranslate2 fp32",
        "machine": {"kind": "cpu", "name": "EPYC", "cores": 2, "threads": 1},
        "test": {"rouge2": 30.0, "rougeL": 41.0, "interval": [29, 31]},
        "costs": {"latency_ms": 100.0, "params_m": 4.0},
        "corpus": {"rows": 29000, "source_words_mean": 11.9, "target_words_mean": 11.1, "bytes": 3_900_000},
    }
    info = {"name": "one", "metric": "rouge2", "teacher": teacher, "teacher_gpu_hours": 7.0}
    info["versions"] = {"raydistill": "0.1.0", "torch": "2.13.0"}
    (folder / "sweep.json").write_text(json.dumps(info))
    np.savez(folder / "teacher_rows.npz", test=rows_of("teacher", 30.0))
    return folder


def table(folders, name: str) -> list[dict[str, str]]:
    """A table's rows by column."""
    [found] = [t for t in tables(*read_settings(folders)) if t.name == name]
    return [dict(zip(found.header, row, strict=True)) for row in found.rows]


def row(folders, name: str, **where: str) -> dict[str, str]:
    [found] = [r for r in table(folders, name) if all(r[k] == v for k, v in where.items())]
    return found


def parsed(cell: str) -> tuple[float, ...]:
    """The difference, the ends of its interval and the seeds of a cell such as "+3.00 [+2.10, +3.90], n = 1"."""
    found = re.fullmatch(r"(\S+) \[(\S+), (\S+)\], n = (\d+)", cell)
    assert found, cell
    return float(found[1]), float(found[2]), float(found[3]), int(found[4])


def assert_interval(cell: str, difference: float, seeds: int, apart: np.ndarray) -> None:
    """The cell's interval is what the normal approximation gives for rows that are so far `apart`."""
    found, low, high, n = parsed(cell)
    half = 1.96 * apart.std() / np.sqrt(len(apart))
    assert (found, n) == (difference, seeds)
    assert (low, high) == (pytest.approx(found - half, abs=0.2 * half), pytest.approx(found + half, abs=0.2 * half))


def test_table_5_has_means_over_seeds_costs_end_to_end_and_paired_differences(sweep):
    found = row([sweep], "table5", teacher="BART", size="12-3", data="XSUM")
    assert (found["SFT score"], found["SFT score (paper)"], found["SFT seeds"]) == ("25.00", "21.08", "2")
    assert (found["KD score"], found["Pseudo score"]) == ("28.00", "27.00")
    assert (found["teacher score"], found["teacher score (paper)"]) == ("30.00", "22.29")
    # 0.5 hours each; kd needs the cache (1), the others its encoder states (0.75), pl the label set (2).
    assert (found["SFT cost"], found["KD cost"], found["Pseudo cost"]) == ("1.250", "1.500", "3.250")
    # kd and pl have seed 0 alone: fine-tuning's seed 1 is not in these.
    assert_interval(found["KD - SFT"], 4.0, 1, rows_of("c", 28.0) - rows_of("a", 24.0))
    assert_interval(found["Pseudo - SFT"], 3.0, 1, rows_of("d", 27.0) - rows_of("a", 24.0))


def test_a_run_without_the_cache_is_not_charged_for_it(sweep):
    write_trial(sweep, "l", 99.0, 0, student={"size": "12-6"}, training={"teacher_cache": "off"})
    assert row([sweep], "table5", teacher="BART", data="XSUM", size="12-6")["SFT cost"] == "0.500"


def test_of_several_settings_that_with_the_best_validation_is_shown(sweep):
    """Validation has the scores in the opposite order: whoever looked at test would show another."""
    write_trial(sweep, "k", 29.5, 0, method="kd", student={"size": "12-3"}, loss={"alpha_hidden": 10})
    assert row([sweep], "table5", teacher="BART", data="XSUM", size="12-3")["KD score"] == "28.00"


def test_variations_of_kd_are_beside_plain_kd_and_not_in_table_5(sweep):
    student = {"size": "12-3"}
    write_trial(sweep, "n", 20.0, 0, method="kd", student=student, loss={"alpha_hidden": 0})
    write_trial(sweep, "o", 21.0, 0, method="kd", student=student, loss={"alpha_cosine": 1, "temperature": 1})
    write_trial(sweep, "p", 22.0, 0, method="kd", student=student, loss={"normalize_hidden": True})
    found = {r["variation"]: r for r in table([sweep], "section63")}
    assert {k: (r["score"], r["less plain KD"].split(" ")[0]) for k, r in found.items()} == {
        "plain KD": ("28.00", ""),
        "no hidden loss": ("20.00", "-8.00"),
        "cosine 1, temperature 1": ("21.00", "-7.00"),
        "normalised hidden": ("22.00", "-6.00"),
    }
    assert_interval(found["no hidden loss"]["less plain KD"], -8.0, 1, rows_of("n", 20.0) - rows_of("c", 28.0))
    # All three have a better validation score than plain KD.
    assert row([sweep], "table5", teacher="BART", size="12-3", data="XSUM")["KD score"] == "28.00"


def bleu_rows(short: float, long: float, length: int) -> np.ndarray:
    """Two outputs whose n-gram precisions are `short` (of 10 words) and `long`, for every n; none is too short."""
    totals = np.array([[10, 8, 6, 4], [length, length * 4 // 5, length * 3 // 5, length * 2 // 5]])
    counts = totals * np.array([[short], [long]])
    return np.concatenate([counts, totals, [[10, 10], [length, 10]]], axis=1).astype(np.int64)


def test_bleu_is_of_all_rows_together_and_differences_agree_with_the_cells(tmp_path):
    """By hand: fine-tuning (5 + 30) / 40 = 87.5 and (10 + 25) / 60 = 58.33, kd (10 + 15) / 40 = 62.5, teacher 100."""
    folder = tmp_path / "sweeps" / "bleu"
    asked = {"teacher": "marian", "dataset": "wmt16_en_ro", "student": {"size": "6-3"}}
    for name, seed, method, score, rows in (
        ("a", 0, "sft", 87.5, bleu_rows(0.5, 1, 30)),
        ("b", 1, "sft", 100 * 35 / 60, bleu_rows(1, 0.5, 50)),
        ("c", 0, "kd", 62.5, bleu_rows(1, 0.5, 30)),
    ):
        place = write_trial(folder, name, 0, seed, method=method, **asked)
        result = json.loads((place / "result.json").read_text())
        result["test"] = {"bleu": score, "interval": [score, score]}
        result["copied"] = {"encoder": [0, 1, 2, 3, 4, 5], "decoder": [0, 2, 5]}
        (place / "result.json").write_text(json.dumps(result))
        np.savez(place / "rows.npz", test=rows)
    teacher = {"name": "marian", "key": "k", "size": "6-6", "test": {"bleu": 100.0, "interval": [100, 100]}}
    (folder / "sweep.json").write_text(json.dumps({"name": "bleu", "metric": "bleu", "teacher": teacher}))
    np.savez(folder / "teacher_rows.npz", test=bleu_rows(1, 1, 30))
    found = row([folder], "table5", teacher="Marian")
    assert (found["SFT score"], found["KD score"], found["SFT score (paper)"]) == ("72.92", "62.50", "25.91")
    assert parsed(found["KD - SFT"])[::3] == (-25.0, 1)  # seed 0 of both
    assert parsed(row([folder], "table10", teacher="Marian")["Orig"])[::3] == (-27.08, 2)


def test_layers_listed_one_by_one_are_the_spaced_ones_where_they_are_the_same(sweep):
    write_trial(sweep, "l", 25.0, 0, method="kd", student={"size": "12-6", "copied": {"decoder": [0, 2, 4, 7, 9, 11]}})
    write_trial(sweep, "m", 26.0, 0, method="pl", student={"size": "12-6", "copied": {"decoder": [0, 1, 2, 3, 4, 5]}})
    found = row([sweep], "table5", teacher="BART", size="12-6", data="XSUM")
    assert (found["KD score"], found["Pseudo score"]) == ("25.00", "")
    assert {r["name"] for r in table([sweep], "table8") if r["layers copied"] == "0,1,2"} == {"SFT lo"}


def test_a_students_end_in_repetition_is_told_and_counts_where_losses_are_compared(sweep):
    found = row([sweep], "table8", **{"layers copied": "-"})
    assert (found["seeds"], found["repetition"]) == ("2", "0.46")
    assert heads(read_settings([sweep])[0]) == [
        "one: 9 trials: 8 done, 1 failed (1 collapsed); teacher bart; a full-depth copy of it differs by 2.0e-07 of "
        "the largest logit; engine ctranslate2 fp32; machine EPYC (cpu, 1 threads); hosts here; versions "
        "raydistill 0.1.0, torch 2.13.0; seeds 0, 1; ended 2026-01-01 to 2026-01-02"
    ]


def second_sweep(first: Path, name: str, change: dict | None = None) -> Path:
    """Another sweep of the same teacher, which tried plain fine-tuning and kd by a better recipe."""
    folder = first.parent / name
    write_trial(folder, "a", 28.5, student={"size": "12-3"})
    write_trial(folder, "b", 27.5, method="kd", student={"size": "12-3"})
    info = json.loads((first / "sweep.json").read_text())
    info["teacher"] |= change or {}
    (folder / "sweep.json").write_text(json.dumps(info))
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
    rows = {(r["sweep"], r["size"]): r["ours by"] for r in table(both, "table6") if r["sweep"]}
    assert rows == {
        ("one", "12-3"): "SFT on original, n = 1",
        ("two", "12-3"): "KD on original, n = 1",
        ("one", "12-12"): "teacher",
        ("two", "12-12"): "teacher",
    }
    # Only the first compares starts: the second's fine-tuning is no row of Table 8.
    assert {r["sweep"] for r in table(both, "table8") if r["seeds"]} == {"one"}


@pytest.mark.parametrize(("change", "what"), [({"key": "l"}, "teacher"), ({"data": {"test": "y"}}, "test split")])
def test_sweeps_of_two_teachers_or_data_sets_of_one_name_are_not_reported_together(sweep, change, what):
    info = json.loads((sweep / "sweep.json").read_text())
    info["teacher"]["data"] = {"train": "w", "test": "x"}
    (sweep / "sweep.json").write_text(json.dumps(info))
    assert tables(*read_settings([sweep, second_sweep(sweep, "two")]))
    with pytest.raises(UserError, match=f"the {what} of one is not the other's; report them apart"):
        tables(*read_settings([sweep, second_sweep(sweep, "three", change)]))


def test_a_full_depth_student_does_not_take_the_teachers_row(sweep):
    write_trial(sweep, "z", 31.0, 0, student={"size": "12-12"})
    rows = {r["ours by"]: r["ROUGE-2"] for r in table([sweep], "table6") if r["size"] == "12-12"}
    assert rows == {"teacher": "30.00", "SFT on original, n = 1": "31.00"}


def test_what_nobody_has_is_an_empty_cell(sweep):
    ours = row([sweep], "table5", teacher="BART", data="CNN")
    assert (ours["SFT score"], ours["KD - SFT"], ours["SFT score (paper)"]) == ("", "", "21.21")
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
    assert row([sweep], "table5", teacher="BART", data="XSUM")["SFT score"] == "24.00"


def test_table_2_and_4_add_up_runs_and_passes(sweep):
    costs = {r["technique"]: r["device-hours"] for r in table([sweep], "table2") if r["data"] == "XSUM"}
    assert costs == {"SFT": "1.250", "Pseudo": "3.250", "KD": "1.500"}
    theirs = {r["technique"]: r["paper: GPU hours"] for r in table([sweep], "table2") if r["data"] == "CNN"}
    assert theirs == {"SFT": "2.5", "Pseudo": "19.0", "KD": "14.0"}
    found = row([sweep], "table4", teacher="BART", data="XSUM")
    assert (found["device-hours"], found["device-hours (paper)"]) == ("11.500", "787")  # 9 x 0.5 + 7
    assert (found["experiments"], found["% of hours"], found["% of hours (paper)"]) == ("9", "100", "30")


def test_a_pass_that_two_sweeps_read_is_counted_once(sweep):
    """The second reads the first's label sets and encoder states, and made states of one layer (0.5 hours) more."""
    first = json.loads((sweep / "sweep.json").read_text())["teacher"]["passes"]
    stores = {"encoder-1/states": 0.75, "decoder-1/layer-5": 0.5}
    other = second_sweep(sweep, "two", {"passes": {**first, "cache": 1.25, "stores": stores}})
    found = row([sweep, other], "table4", teacher="BART", data="XSUM")
    assert found["device-hours"] == "13.000"  # 11 x 0.5 + 7 + 0.5


def test_the_quality_of_pseudo_labels_stands_under_table_10(sweep):
    [found] = table([sweep], "table10_labels")
    assert (found["teacher"], found["data"], found["label set"], found["rows"]) == ("BART", "XSUM", "own", "28999")
    assert (found["ROUGE-1"], found["ROUGE-2"], found["ROUGE-L"], found["BLEU"]) == ("44.40", "21.25", "", "")


@pytest.mark.parametrize(
    ("teacher", "name"),
    [
        ("/home/me/teachers/mine-6-6", "mine-6-6"),
        ("../shared/teachers/mine-6-6/", "mine-6-6"),
        ("me/mine-6-6", "me/mine-6-6"),  # on the hub
        ("facebook/bart-large-xsum@abc", "BART"),
    ],
)
def test_a_teacher_in_a_folder_is_called_by_its_last_part(teacher, name):
    assert published.teacher_name(teacher) == name


def test_table_3_describes_the_corpus(sweep):
    found = row([sweep], "table3", data="XSUM")
    assert (found["training rows"], found["training rows (paper)"]) == ("29000", "204017")
    assert (found["mean source words"], found["size (MB)"], found["size (MB) (paper)"]) == ("11.9", "3.9", "501")


def test_best_by_size_takes_the_best_on_validation_of_all_methods(sweep):
    student = row([sweep], "table6", size="12-3")
    assert (student["ours by"], student["ROUGE-2"]) == ("SFT on original, n = 1", "10.00")
    assert (student["speed-up"], student["ROUGE-2 (paper)"]) == ("2.00", "22.40")
    teacher = row([sweep], "table6", size="12-12")
    assert (teacher["ours by"], teacher["ROUGE-2"], teacher["ms for 32"]) == ("teacher", "30.00", "100")


def test_table_8_is_by_what_the_decoder_started_from_seed_by_seed(sweep):
    found = {r["layers copied"]: r for r in table([sweep], "table8") if r["size"] or r["layers copied"] == "9,10,11"}
    columns = ("min loss", "min loss (paper)", "less spaced", "tenth of epoch", "tenth less spaced", "seeds")
    assert {k: tuple(r[c] for c in columns) for k, r in found.items()} == {
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


def test_table_10_is_less_the_teacher(sweep):
    found = row([sweep], "table10", teacher="BART", data="XSUM")
    cells = [found[name] for name in ("Orig", "PL", "Orig+PL", "Orig+PL+PL*")]
    assert [cell.split(" ")[0] for cell in cells] == ["-5.00", "-3.00", "-3.50", "-1.00"]
    both = (rows_of("a", 24.0) + rows_of("b", 26.0)) / 2
    assert_interval(cells[0], -5.0, 2, both - rows_of("teacher", 30.0))
    assert (found["PL (paper)"], found["Orig+PL+PL* (paper)"]) == ("-0.9", "+0.1")
    (sweep / "teacher_rows.npz").unlink()
    assert row([sweep], "table10", teacher="BART", data="XSUM")["Orig"] == "-5.00, n = 2"


def test_the_papers_figures_agree_with_each_other():
    """Slips of copying show where the paper's own numbers can be worked out from each other."""
    assert sum(hours for hours, _ in published.TABLE_4.values()) == 2631
    assert sum(runs for _, runs in published.TABLE_4.values()) == 287
    for (teacher, size, data), found in published.TABLES_6_7.items():
        depth = {"BART": "12-12", "Pegasus": "16-16"}.get(teacher)
        if depth and size != depth:
            base = published.TABLES_6_7[teacher, depth, data].ms
            assert found.speedup == pytest.approx(base / found.ms, abs=0.01), (teacher, size, data)


def test_the_command_prints_and_writes_everything(sweep, tmp_path):
    done = last_json(command(tmp_path / "outputs", "report", "one", "--json"))
    place = Path(done["folder"])
    assert place == tmp_path / "outputs" / "reports" / "one"
    with (place / "table5.csv").open() as file:
        by_place = {(r["teacher"], r["data"]): r for r in csv.DictReader(file)}
    assert by_place["BART", "XSUM"]["KD score"] == "28.00"
    text = (place / "report.md").read_text()
    for n in range(2, 11):
        assert f"## Table {n}: " in text
    for name in ("figure1.png", "figure2.png"):
        assert (place / name).read_bytes().startswith(b"\x89PNG")
        assert f"({name})" in text
    refused = command(tmp_path / "outputs", "report", "nothing")
    assert refused.returncode == 2
    assert "no such sweep" in refused.stderr
