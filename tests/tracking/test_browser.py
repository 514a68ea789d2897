"""MLflow's UI and the tooltips of the report's page in headless Chromium.

Screenshots are saved to the folder RAYDISTILL_SCREENSHOTS if the variable is set.
"""

import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydistill.results.page import write_report
from raydistill.results.selection import Selection, load_selection
from raydistill.tracking import mlflow_registry, mlflow_runs, mlflow_store
from raydistill.tracking.export import export_student
from tests.factories.browser import save_screenshot, set_width
from tests.factories.sweeps import make_student, make_trial
from tests.factories.workspace import background, free_port

pytestmark = pytest.mark.browser


@pytest.fixture
def chosen(sweep: Path) -> tuple[Path, Selection]:
    """A finished and published sweep whose choice is registered."""
    make_student(sweep, "a", 0, 10.0)
    make_student(sweep, "b", 1, 60.0, "4-4")
    make_trial(sweep, "c", 2, 8.0)
    mlflow_runs.publish(sweep, finished=True)
    selection = load_selection(sweep)
    key = str(selection.chosen_keys["fast"])
    mlflow_registry.register_choice(sweep, key, "fast", export_student(selection, key))
    return sweep, selection


@pytest.fixture
def ui(chosen: tuple[Path, Selection], tmp_path: Path) -> Iterator[str]:
    """The URL of MLflow's UI for the sweep's store."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", *mlflow_store.ui_command().replace("5000", str(port)).split(), "--workers", "1"]
    with background(command, tmp_path / "mlflow_ui.log", lambda: urllib.request.urlopen(f"{url}/health").close()):
        yield url


def test_three_clicks_lead_from_the_experiment_to_the_best_checkpoint(
    browser: Any, ui: str, chosen: tuple[Path, Selection]
) -> None:
    _, selection = chosen
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    experiment = client.get_experiment_by_name(selection.name).experiment_id
    browser.get(f"{ui}/#/experiments/{experiment}/runs")
    # Links to the experiment, which has the same name, are excluded by their URL
    parent = browser.find_element("xpath", f"//a[contains(@href, '/runs/')][normalize-space()='{selection.name}']")
    save_screenshot(browser, "1-experiment")
    parent.click()  # first click: the sweep's run, with the choices in its description
    student = selection.student(str(selection.chosen_keys["fast"]))
    link = browser.find_element("link text", student.label)
    save_screenshot(browser, "2-sweep")
    link.click()  # second click: the chosen student's run, in a new tab
    browser.switch_to.window(browser.window_handles[-1])
    artifacts = browser.find_element("xpath", "//*[@role='tab' and contains(., 'Artifacts')]")
    artifacts.click()  # third click: the run's files
    browser.find_element("xpath", f"//*[contains(text(), '{student.key.replace(' ', '-')}')]")
    save_screenshot(browser, "3-artifacts")


def test_two_clicks_lead_from_the_printed_address_to_the_best_checkpoint(
    browser: Any, ui: str, chosen: tuple[Path, Selection]
) -> None:
    sweep, selection = chosen
    set_width(browser, 1600)
    published = mlflow_runs.publish(sweep, finished=True)
    browser.get(published.url.replace("http://127.0.0.1:5000", ui))
    student = selection.student(str(selection.chosen_keys["fast"]))
    run = browser.find_element("link text", f"fast: {selection.trials[0].label}")
    latency = browser.find_element("xpath", "//*[contains(text(), 'served_latency')]")
    for shown in (run, latency):
        assert shown.location["x"] + shown.size["width"] < 1600
    save_screenshot(browser, "5-printed-address")
    run.click()  # first click: the chosen student's run
    browser.find_element("xpath", "//*[@role='tab' and contains(., 'Artifacts')]").click()  # second click: its files
    browser.find_element("xpath", f"//*[contains(text(), '{student.key.replace(' ', '-')}')]")


def test_page_shows_tooltips_and_loads_nothing(browser: Any, chosen: tuple[Path, Selection]) -> None:
    from selenium.webdriver import ActionChains

    folder, selection = chosen
    write_report(selection)
    browser.get((folder / "front.html").as_uri())
    box = browser.find_element("id", "tooltip")
    assert not box.is_displayed()
    marker = browser.find_element("css selector", '[id="student-a_b1"]')
    ActionChains(browser).move_to_element(marker).perform()
    assert box.is_displayed()
    for text in ("4-1 kd (trial 0, 1 beam)", "decoder layers copied: 0", "ROUGE-2 10.00", "40.0 ms", "chosen for fast"):
        assert text in box.text
    save_screenshot(browser, "4-front")
    browser.execute_script("scrollTo(0, 0)")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "h1")).perform()
    assert not box.is_displayed()
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded == []
    assert browser.get_log("browser") == []
