"""The HTML page and the report's files; tests/tracking/test_browser.py opens the page in a browser."""

import json
import re
from pathlib import Path

from raydistill.results.page import make_tooltips, render_page, write_report
from raydistill.results.selection import load_selection


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
    assert json.loads(data[1]) == tooltips
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
