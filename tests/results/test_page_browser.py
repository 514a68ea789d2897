"""The page in headless Chromium: the choice within any bounds, sorting, samples, and the widths of a desk and a phone.

Screenshots are saved to the folder RAYDISTILL_SCREENSHOTS if the variable is set.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from raydistill.results.page import write_report
from raydistill.results.pareto import choose
from raydistill.results.records import rows_filename
from raydistill.results.selection import Selection, load_selection, make_candidates
from tests.factories.browser import save_screenshot, set_width
from tests.factories.sweeps import (
    change_result,
    change_sweep,
    make_sweep,
    make_trial,
    served_student,
    write_sample_texts,
    write_served,
)

pytestmark = pytest.mark.browser
NUM_ROWS = 60


@pytest.fixture
def page(tmp_path: Path) -> tuple[str, Selection]:
    """The page of a sweep of six served students, of which some are not inferior to better ones, and its selection."""
    sweep = make_sweep(tmp_path / "mini")
    rng = np.random.default_rng(0)
    base = rng.normal(30, 12, NUM_ROWS)
    for number, (key, shift, latency_ms) in enumerate((("a", 0.0, 40.0), ("b", 1.0, 100.0), ("c", 1.2, 160.0))):
        folder = make_trial(sweep, key, number, float(np.mean(base)) + shift)
        change_result(folder, size=f"4-{number + 1}")  # latency belongs to a size
        entries = []
        for beams, gain in ((1, 0.0), (4, 0.3)):
            rows = base + shift + gain + rng.normal(0, 1.5, NUM_ROWS)
            costs = {"latency_ms": latency_ms * (1 + beams / 8), "latency_ms_b1": 9 - number}
            entries.append(served_student(beams, 1.0, float(np.mean(rows)), costs))
            np.savez(folder / rows_filename("validation", entries[-1].entry.config), validation=rows)
        write_served(folder, *entries)
    change_sweep(sweep, budgets={"fast": {"latency_ms": 150.0}, "small": {"params_m": 100.0, "latency_ms": 500.0}})
    selection = load_selection(sweep)
    write_sample_texts(selection, [f"output number {i}" for i in range(40)])
    write_report(selection)
    return (sweep / "front.html").as_uri(), selection


def test_the_page_chooses_like_the_command_within_any_bounds(browser: Any, page: tuple[str, Selection]) -> None:
    url, selection = page
    browser.get(url)
    candidates = make_candidates(selection.students, selection.metric)
    rng = np.random.default_rng(1)
    chosen = set()
    for _ in range(200):
        names = rng.permutation(["latency_ms", "latency_ms_b1", "params_m", "memory_mb"])[: rng.integers(0, 4)]
        bounds = {str(name): float(rng.uniform(0.5, 1.2) * max(c.costs[name] for c in candidates)) for name in names}
        tolerance = float(rng.choice([0.0, 0.5, 1.0, 2.0]))
        best = choose(candidates, bounds, selection.metric, tolerance).best
        # Pairs, since the driver sorts the keys of a mapping, and the first bound is what candidates are compared by
        script = "return choose(Object.fromEntries(arguments[0]), arguments[1]).best?.key ?? null"
        key = browser.execute_script(script, list(bounds.items()), tolerance)
        assert key == (best.key if best else None), bounds
        chosen.add(key)
    assert len(chosen) > 3


@pytest.mark.parametrize("width", [1600, 390])
def test_sliders_samples_and_tables_react(browser: Any, page: tuple[str, Selection], width: int) -> None:
    url, selection = page
    set_width(browser, width)
    browser.get(url)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    card = browser.find_element("id", "choice")
    label = selection.student(str(selection.chosen_keys["fast"])).label
    assert card.find_element("tag name", "h3").text == label
    save_screenshot(browser, f"page-{width}")

    number = browser.find_element("id", "bound-latency_ms")
    number.clear()
    number.send_keys("1")
    assert card.find_element("tag name", "h3").text == "nothing fits"
    browser.find_element("css selector", "[data-budget='']").click()
    assert number.get_attribute("value") == ""
    highest = max(selection.students, key=lambda student: student.score(selection.metric) or 0.0)
    browser.execute_script(
        "const box = document.getElementById('tolerance'); box.value = 0; box.dispatchEvent(new Event('input'))"
    )
    assert card.find_element("tag name", "h3").text == highest.label

    assert len(browser.find_elements("css selector", ".sample")) == 20
    browser.find_element("id", "filter").send_keys("number 17")
    assert len(browser.find_elements("css selector", ".sample")) == 1
    assert browser.find_element("id", "matches").text == "1 of 40 rows"

    def trials() -> list[str]:
        return browser.execute_script(
            "const table = document.querySelectorAll('table.sortable')[0];"
            "return [...table.tBodies[0].rows].map(row => row.cells[table.column].textContent)"
        )

    browser.execute_script(
        "const table = document.querySelectorAll('table.sortable')[0];"
        "table.column = [...table.tHead.rows[0].cells].findIndex(cell => cell.textContent === 'trial')"
    )
    assert trials() == ["0", "1", "2"]
    header = browser.find_elements("xpath", "//table[1]//th[normalize-space()='trial']/button")[0]
    for _ in range(2):  # ascending, then descending
        browser.execute_script("arguments[0].click()", header)
    assert trials() == ["2", "1", "0"]
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded == []
    assert browser.get_log("browser") == []
