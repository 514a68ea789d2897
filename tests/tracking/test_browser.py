"""Headless Chromium: MLflow's own UI from the experiment to the chosen checkpoint, and the page with the front.

Screenshots are kept in the folder that RAYDISTILL_SCREENSHOTS names, where it is set.
"""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from raydistill.results.page import write_report
from raydistill.results.selection import Selection, load_selection
from raydistill.tracking import mlflow_registry, mlflow_runs, mlflow_store
from raydistill.tracking.export import export_student
from tests.factories.sweeps import make_student, make_trial

pytestmark = pytest.mark.browser
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--window-size=1500,1100"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = "/usr/bin/chromium"
    for flag in (*FLAGS, f"--user-data-dir={tmp_path / 'chromium'}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service("/usr/bin/chromedriver"))
    driver.implicitly_wait(30)
    yield driver
    driver.quit()


@pytest.fixture
def chosen(sweep: Path) -> tuple[Path, Selection]:
    """A finished sweep, published and with its choice registered."""
    make_student(sweep, "a", 0, 10.0)
    make_student(sweep, "b", 1, 60.0, "4-4")
    make_trial(sweep, "c", 2, 8.0)
    mlflow_runs.publish(sweep, finished=True)
    found = load_selection(sweep)
    key = str(found.chosen_keys["fast"])
    mlflow_registry.register_choice(sweep, key, "fast", export_student(found, key))
    return sweep, found


@pytest.fixture
def ui(chosen: tuple[Path, Selection]) -> Iterator[str]:
    """MLflow's UI on the sweep's store, on loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = mlflow_store.ui_command().replace("5000", str(port)).split()
    server = subprocess.Popen(
        [sys.executable, "-m", *command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    url = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                urllib.request.urlopen(f"{url}/health", timeout=2).close()
                break
            except OSError:
                assert server.poll() is None, "the server ended"
                time.sleep(0.5)
        yield url
    finally:
        server.terminate()
        server.wait(30)


def shot(driver: Any, name: str) -> None:
    folder = os.environ.get("RAYDISTILL_SCREENSHOTS")
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
        driver.save_screenshot(str(Path(folder) / f"{name}.png"))


def test_three_clicks_lead_from_the_experiment_to_the_best_checkpoint(
    browser: Any, ui: str, chosen: tuple[Path, Selection]
) -> None:
    _, found = chosen
    client = mlflow_store.make_client(mlflow_store.default_tracking_uri())
    experiment = client.get_experiment_by_name(found.name).experiment_id
    browser.get(f"{ui}/#/experiments/{experiment}/runs")
    # The experiment has the same name, and links to itself above the table and beside it.
    parent = browser.find_element("xpath", f"//a[contains(@href, '/runs/')][normalize-space()='{found.name}']")
    shot(browser, "1-experiment")
    parent.click()  # one: the sweep's run, with the choices in its description
    student = found.student(str(found.chosen_keys["fast"]))
    link = browser.find_element("link text", student.label)
    shot(browser, "2-sweep")
    link.click()  # two: the chosen student's run, in a tab of its own
    browser.switch_to.window(browser.window_handles[-1])
    artifacts = browser.find_element("xpath", "//*[@role='tab' and contains(., 'Artifacts')]")
    artifacts.click()  # three: its files
    browser.find_element("xpath", f"//*[contains(text(), '{student.key.replace(' ', '-')}')]")
    shot(browser, "3-artifacts")


def test_the_page_shows_what_a_mark_is_and_asks_for_nothing_from_elsewhere(
    browser: Any, chosen: tuple[Path, Selection]
) -> None:
    from selenium.webdriver import ActionChains

    folder, found = chosen
    write_report(found)
    browser.get((folder / "front.html").as_uri())
    box = browser.find_element("id", "tooltip")
    assert not box.is_displayed()
    mark = browser.find_element("css selector", '[id="student-a_b1"]')
    ActionChains(browser).move_to_element(mark).perform()
    assert box.is_displayed()
    for text in ("4-1 kd (trial 0, 1 beam)", "decoder layers copied: 0", "ROUGE-2 10.00", "40.0 ms", "chosen for fast"):
        assert text in box.text
    shot(browser, "4-front")
    ActionChains(browser).move_by_offset(0, 300).perform()
    assert not box.is_displayed()
    loaded = browser.execute_script("return performance.getEntriesByType('resource').map(entry => entry.name)")
    assert loaded == []
    assert browser.get_log("browser") == []
