"""The HTML page and the report's files; tests/tracking/test_browser.py opens the page in a browser."""

import json
import re
from pathlib import Path
from typing import Any

from raydistill.results.page import make_tooltips, render_page, write_report
from raydistill.results.selection import load_selection
from tests.factories.sweeps import change_sweep, decide_by_chrf, make_sweep, make_trial, write_sample_texts


def page_data(page: str) -> Any:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert match is not None
    return json.loads(match[1])


def test_every_marker_has_a_tooltip_and_the_page_loads_nothing(sweep: Path) -> None:
    selection = load_selection(sweep)
    page = render_page(selection)
    tooltips = make_tooltips(selection)
    for marker in tooltips:
        assert f'id="{marker}"' in page
    assert sorted(tooltips) == ["student-a_b1", "student-a_b4-p0_6", "student-b", "student-c", "teacher"]
    assert tooltips["student-a_b1"][:4] == [
        "4-1 kd (trial 0, 1 beam)",
        "method kd, labels original",
        "encoder layers copied: 0 1 2 3",
        "decoder layers copied: 0",
    ]
    assert "ROUGE-2 8.00 [7.00, 9.00] on validation" in tooltips["student-a_b1"]
    assert tooltips["student-a_b1"][-1] == "measured with ctranslate2 fp32, some CPU, 2 threads"
    assert "10.00 times the speed of the teacher" in tooltips["student-a_b1"]
    assert "<p>Latencies were measured with ctranslate2 fp32, some CPU, 2 threads.</p>" in page
    assert tooltips["teacher"][0] == "teacher big (4-4)"
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    assert data is not None
    assert json.loads(data[1])["tooltips"] == tooltips
    assert not re.search(r'(?:src|href)="https?:', page)


def test_html_in_a_failure_reason_is_escaped(sweep: Path) -> None:
    page = render_page(load_selection(sweep))
    assert "</script><b>" not in page
    assert "failed: &lt;/script&gt;&lt;b&gt;loss" in page


def test_tooltip_of_an_unserved_trial_names_the_student_that_provides_the_timing(sweep: Path) -> None:
    setup = "measured with ctranslate2 fp32, some CPU, 2 threads, on 4-1 kd (trial 0, 4 beams, length penalty 0.6)"
    assert make_tooltips(load_selection(sweep))["student-b"][-1] == setup


def test_report_consists_of_four_files(sweep: Path) -> None:
    paths = write_report(load_selection(sweep))
    assert sorted(path.name for path in paths) == ["curves.png", "front.html", "front.png", "table.md"]
    assert all(path.stat().st_size > 0 for path in paths)
    assert (sweep / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_header_names_teacher_data_machine_date_and_versions(sweep: Path) -> None:
    change_sweep(sweep, versions={"raydistill": "1.2.3"})
    page = render_page(load_selection(sweep))
    for text in (
        *("<dd>big (4-4)</dd>", "teacher&#39;s ROUGE-2 on validation", "20.00 [19.00, 21.00]"),
        *("d (20 validation rows)", "some CPU, 2 threads", "2026-01-01 00:00 UTC", "raydistill 1.2.3"),
    ):
        assert text in page


def test_a_choice_has_scores_latency_both_speedups_size_and_the_path_of_its_export(sweep: Path) -> None:
    page = render_page(load_selection(sweep))
    [candidate] = [c for c in page_data(page)["front"]["candidates"] if c["key"] == "a b4-p0.6"]
    facts = dict(candidate["facts"])
    assert facts["ROUGE-2 on validation"] == "10.00 [9.00, 11.00]"
    assert facts["latency, batch of 32"] == "90.0 ms [89.10, 90.90]"
    assert facts["speed-up over the teacher"] == "3.33x (as the teacher is served today)"
    assert facts["size"] == "3.0 M parameters, 12.0 MB of weights"
    assert facts["export"].endswith("exports/a-b4-p0.6")
    assert "<dd>90.0 ms [89.10, 90.90]</dd>" in page


def test_page_keeps_the_order_of_the_bounds_by_which_candidates_are_compared(sweep: Path) -> None:
    change_sweep(sweep, budgets={"fast": {"params_m": 5.0, "latency_ms": 200.0}})
    budgets = page_data(render_page(load_selection(sweep)))["front"]["budgets"]
    assert list(budgets["fast"]) == ["params_m", "latency_ms"]


def test_page_has_the_outputs_of_teacher_and_students_once_they_are_kept(sweep: Path) -> None:
    selection = load_selection(sweep)
    assert page_data(render_page(selection))["samples"] is None
    write_sample_texts(selection, ["first <b>output</b>", "second output"])
    page = render_page(selection)
    samples = page_data(page)["samples"]
    assert [system["key"] for system in samples["systems"]] == ["teacher", "a b4-p0.6", "a b1"]
    assert samples["rows"][1] == {"id": "row-1", "source": "source 1", "reference": "reference 1"}
    assert samples["systems"][1]["outputs"] == ["first <b>output</b>", "second output"]
    assert samples["systems"][1]["scores"] == [10.0, 10.0]
    assert "<b>output" not in page
    assert "on 2 rows of the validation split" in page


def test_page_says_where_curves_need_more_validations(sweep: Path) -> None:
    sentence = "Every trial was validated once"
    assert sentence not in render_page(load_selection(sweep))
    for path in sweep.glob("trials/*/metrics.jsonl"):
        path.write_text(path.read_text().splitlines()[0] + "\n")
    assert sentence in render_page(load_selection(sweep))


def test_page_of_a_sweep_that_another_metric_decides(tmp_path: Path) -> None:
    folder = make_sweep(tmp_path / "mt")
    decide_by_chrf(folder, make_trial(folder, "a", 0, 10.0))
    selection = load_selection(folder)
    page, tooltips = render_page(selection), make_tooltips(selection)
    assert ">validation chrF++</button></th>" in page
    assert ">validation BLEU / recall</button></th>" in page
    assert "25.00 / 80.00" in page
    front = page_data(page)["front"]
    assert front["metric_name"] == "chrF++"
    facts = dict(front["candidates"][0]["facts"])
    assert facts["chrF++ on validation"] == "50.00 [9.00, 11.00]"
    assert facts["BLEU / recall on validation"] == "25.00 / 80.00"
    assert tooltips["teacher"][1:4] == ["chrF++ 60.00", "BLEU 35.00", "recall 90.00"]
    lines = tooltips["student-a"]
    first = lines.index("chrF++ 50.00 [9.00, 11.00] on validation")
    assert lines[first + 1 : first + 3] == ["BLEU 25.00", "recall 80.00"]
