"""The page and the costs, from a sweep's folder; that a browser shows it is in test_browser.py."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from raydistill.core.files import write_json_atomic
from raydistill.results import records
from raydistill.results.costs import mean_gain_over_sft, method_table
from raydistill.results.page import make_tooltips, render_page, write_report
from raydistill.results.records import Trial
from raydistill.results.selection import load_selection
from raydistill.results.served_students import impute_served_timing
from tests.factories.sweeps import make_trial


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Two trials, one served with two decodings, a stopped one, and one that failed with a reason to be escaped."""
    teacher = {"name": "big", "size": "4-4", "metrics": {"rouge2": 20.0}, "costs": {"latency_ms": 300.0}}
    info = {"name": "mini", "metric": "rouge2", "teacher": teacher, "budgets": {"fast": {"latency_ms": "50%"}}}
    write_json_atomic(tmp_path / "sweep.json", info)
    make_trial(tmp_path, "a", 0, 10.0)
    make_trial(tmp_path, "b", 1, 12.0)
    make_trial(tmp_path, "c", 2, 9.0)
    failed = make_trial(tmp_path, "d", 3, 1.0, status="failed")
    result = records.read_json(failed / "result.json")
    write_json_atomic(failed / "result.json", {**result, "reason": "</script><b>loss"})
    decodings = []
    for beams, score, milliseconds in ((4, 10.0, 90.0), (1, 8.0, 30.0)):
        one = {"beams": beams, "length_penalty": 0.6, "metrics": {"rouge2": score}, "interval": [score - 1, score + 1]}
        decodings.append({**one, "costs": {"latency_ms": milliseconds}})
    write_json_atomic(tmp_path / "trials" / "a" / "served.json", {"engine": "ctranslate2 fp32", "decodings": decodings})
    return tmp_path


def test_the_front_holds_pairs_of_checkpoint_and_decoding(sweep: Path) -> None:
    found = load_selection(sweep)
    assert found.front_keys == ["a b1", "a b4-p0.6"]
    assert [found.trial_key(key) for key in found.front_keys] == ["a", "a"]
    fastest = found.student("a b1")
    assert fastest.label == "4-1 kd (trial 0, 1 beam)"
    assert (fastest.metrics["latency_ms"], fastest.metrics["speedup"], fastest.test) == (30.0, 10.0, None)
    assert found.student("a b4-p0.6").test == {"rouge2": 9.5, "interval": [8.0, 10.0]}  # its own decoding's, as trained


def test_every_mark_of_the_page_has_its_facts_and_nothing_is_loaded_from_elsewhere(sweep: Path) -> None:
    found = load_selection(sweep)
    text = render_page(found)
    shown = make_tooltips(found)
    for mark in shown:
        assert f'id="{mark}"' in text
    assert sorted(shown) == ["student-a_b1", "student-a_b4-p0_6", "student-b", "student-c", "teacher"]
    assert shown["student-a_b1"][:4] == [
        "4-1 kd (trial 0, 1 beam)",
        "method kd, labels original",
        "encoder layers copied: 0 1 2 3",
        "decoder layers copied: 0",
    ]
    assert "ROUGE-2 8.00 [7.00, 9.00] on validation" in shown["student-a_b1"]
    assert shown["student-a_b1"][-1] == "measured with ctranslate2 fp32"
    assert "10.00 times the teacher's speed" in shown["student-a_b1"]
    assert "<p>Milliseconds with ctranslate2 fp32.</p>" in text
    assert shown["teacher"][0] == "teacher big (4-4)"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.S)
    assert data is not None
    assert json.loads(data[1]) == shown
    assert "</script><b>" not in text
    assert not re.search(r'(?:src|href)="https?:', text)


def test_a_trial_that_was_not_served_is_shown_on_the_clock_of_the_student_of_its_shape(sweep: Path) -> None:
    found = load_selection(sweep)
    b = next(mark for mark in found.plotted_trials if mark.key == "b")
    assert b.metrics["latency_ms"] == 90.0  # trial a's with its own decoding, which comes first
    measured = "measured with ctranslate2 fp32, on 4-1 kd (trial 0, 4 beams, length penalty 0.6)"
    assert make_tooltips(found)["student-b"][-1] == measured
    assert found.trials[1].metrics.get("latency_ms") != 90.0  # the table of trials tells the search's own
    other = replace(found.trials[1], size="4-3")
    assert [mark.key for mark in impute_served_timing([other, found.trials[2]], found.students)] == ["c"]


def test_the_report_is_four_files(sweep: Path) -> None:
    written = write_report(load_selection(sweep))
    assert sorted(path.name for path in written) == ["curves.png", "front.html", "front.png", "table.md"]
    assert all(path.stat().st_size > 0 for path in written)
    assert (sweep / "curves.png").read_bytes().startswith(b"\x89PNG")


def trial(folder: Path, method: str, size: str, score: float, hours: float, labels: str = "auto") -> Trial:
    key = f"{method}{size}{score}"
    run = {"name": "m", "teacher": "t", "dataset": {"name": "d"}, "method": method, "labels": labels}
    write_json_atomic(folder / key / "run.json", run)
    metrics = {"rouge2": score, "gpu_hours": hours}
    return Trial(key, folder / key, "done", method=method, size=size, metrics=metrics)


def test_a_methods_gain_is_over_the_best_plain_student_of_the_same_size_and_its_hours_hold_the_passes_it_needs(
    sweep: Path, tmp_path: Path
) -> None:
    """A label set is charged once, to every method whose trials train on it; the cache to kd."""

    def made(method: str, size: str, score: float, hours: float, labels: str = "auto") -> Trial:
        return trial(tmp_path / "runs", method, size, score, hours, labels)

    trials = [
        *(made("sft", "2-2", 10, 1), made("sft", "2-2", 12, 1), made("sft", "2-1", 5, 1)),
        *(made("pl", "2-2", 13, 2), made("pl", "2-1", 8, 1), made("pl", "2-3", 99, 1)),
    ]
    assert mean_gain_over_sft(trials, "pl", "rouge2") == 2.0  # (1 + 3) / 2; nothing to compare 2-3 with
    assert mean_gain_over_sft(trials, "sft", "rouge2") is None
    assert mean_gain_over_sft(trials, "kd", "rouge2") is None
    found = load_selection(sweep)
    mixed = "original+pseudo+/other"
    labels = {"original": {}, "pseudo": {"own": 4.0}, mixed: {"own": 4.0, "others": 2.0}}
    teacher = {**found.teacher, "passes": {"labels": labels, "cache": 9.0}}
    _, rows = method_table(replace(found, trials=trials, teacher=teacher))
    assert rows == [
        ["pl", "3", "4.000", "4.000", "+2.00", "+0.25"],
        ["sft", "3", "3.000", "0.000", "-", "-"],
    ]
    trials += [made("kd", "2-2", 22, 1, labels="pseudo"), made("kd", "2-2", 11, 1, labels=mixed)]
    trials += [made("sft", "2-2", 6, 1, labels=mixed)]
    _, rows = method_table(replace(found, trials=trials, teacher=teacher))
    assert rows == [
        ["kd", "2", "2.000", "15.000", "+10.00", "+0.59"],  # own 4, others 2, the cache 9; 10 points in 17 hours
        ["pl", "3", "4.000", "4.000", "+2.00", "+0.25"],
        ["sft", "4", "4.000", "6.000", "-", "-"],
    ]
    # Of the cache's 9 hours 3 are the encoder's: all read those, and each row has them once.
    teacher["passes"] |= {"stores": {"encoder-1/states": 3.0, "decoder-1/layer-02": 6.0}}
    _, rows = method_table(replace(found, trials=trials, teacher=teacher))
    assert [r[3] for r in rows] == ["15.000", "7.000", "9.000"]
