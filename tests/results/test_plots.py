"""What the plot of the front shows, read from its SVG."""

import re
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import matplotlib
import pytest

from raydistill.results.plots import marker_id, plot_front, plot_learning_curves
from raydistill.results.records import Trial
from raydistill.results.selection import Selection
from raydistill.training.records import SplitScores
from tests.factories.selections import make_finished_trial, make_selection

SVG = "{http://www.w3.org/2000/svg}"
TEACHER = {"metrics": {"rouge2": 21.0}, "costs": {"latency_ms": 1000.0}}
TRIALS = [
    make_finished_trial("b", 1, "2-2", "kd", 20, 900),
    make_finished_trial("a", 0, "2-1", "sft", 18, 600),
    Trial("x", Path("x"), "failed", reason="loss is NaN", number=2, size="2-1", method="kd"),
    make_finished_trial("c", 3, "2-2", "pl", 19, 900),
    Trial("r", Path("r"), "running", size="2-1", method="kd"),
]


def groups_by_id(svg: bytes) -> dict[str, Any]:
    return {str(group.get("id")): group for group in ElementTree.fromstring(svg).iter(f"{SVG}g") if group.get("id")}


def marker_position(group: Any) -> tuple[float, float]:
    [use] = group.iter(f"{SVG}use")
    return float(use.get("x")), float(use.get("y"))


def marker_fill(group: Any) -> str:
    [use] = group.iter(f"{SVG}use")
    match = re.search(r"fill: (#\w+)", use.get("style"))
    assert match
    return match[1]


def texts(svg: bytes) -> list[str]:
    return ["".join(element.itertext()).strip() for element in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def full_selection() -> Selection:
    bounds = {"fast": {"latency_ms": 700.0}, "far": {"latency_ms": 99999.0}}
    return make_selection(TRIALS, ("a", "b"), {"fast": "a"}, teacher=TEACHER, bounds=bounds)


def test_png_has_the_documented_size_and_an_empty_selection_is_drawn() -> None:
    content = plot_front(full_selection())
    assert content[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", content[16:24]) == (1200, 750)
    assert plot_front(make_selection([], teacher={"metric": "bleu"}))[:8] == content[:8]


def test_backend_and_settings_of_a_notebook_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(matplotlib.rcParams, "backend", "svg")  # as a notebook chooses its own
    settings = dict(matplotlib.rcParams)
    plot_front(full_selection(), "svg")
    plot_learning_curves(full_selection())
    assert dict(matplotlib.rcParams) == settings


def test_every_scored_trial_and_the_teacher_has_a_marker_at_its_cost_and_score() -> None:
    groups = groups_by_id(plot_front(full_selection(), "svg"))
    assert {name for name in groups if name.startswith("student-")} == {marker_id(key) for key in "abc"}
    a, b, c, teacher = (marker_position(groups[name]) for name in (*map(marker_id, "abc"), "teacher"))
    assert a[0] < b[0] < c[0] < teacher[0]  # b and c have equal cost and are shifted by method
    assert teacher[1] < b[1] < c[1] < a[1]  # SVG coordinates grow downwards
    assert abs((c[1] - b[1]) - (b[1] - teacher[1])) < 0.01  # scores 19, 20, 21
    assert abs((a[1] - c[1]) - (c[1] - b[1])) < 0.01


def test_test_scores_are_fainter_markers_at_the_cost_of_the_front_and_the_teacher() -> None:
    trials = [replace(trial, test={"rouge2": 17.0}) if trial.scored else trial for trial in TRIALS]
    teacher = {**TEACHER, "test": SplitScores(rouge2=17.0)}
    selection = make_selection(trials, ("a", "b"), {"fast": "a"}, teacher=teacher)
    groups = groups_by_id(plot_front(selection, "svg"))
    tests = {name: group for name, group in groups.items() if name.startswith("test-")}
    assert set(tests) == {f"test-{marker_id(key)}" for key in "ab"} | {"test-teacher"}
    for name, group in tests.items():
        x, y = marker_position(group)
        assert x == marker_position(groups[name.removeprefix("test-")])[0]
        assert y > marker_position(groups[marker_id("a")])[1]  # 17 is below the lowest score, 18
        [use] = group.iter(f"{SVG}use")
        assert "opacity: 0.45" in use.get("style")
    assert "test score" in texts(plot_front(selection, "svg"))


def test_axis_names_the_rows_that_students_are_chosen_on() -> None:
    assert "ROUGE-2 on validation (95 % interval)" in texts(plot_front(full_selection(), "svg"))
    served = [replace(trial, split="selection") for trial in TRIALS]
    assert "ROUGE-2 on the selection rows (95 % interval)" in texts(plot_front(make_selection(served), "svg"))


def test_only_markers_on_the_front_are_filled() -> None:
    groups = groups_by_id(plot_front(full_selection(), "svg"))
    fills = {key: marker_fill(groups[marker_id(key)]) for key in "abc"}
    assert fills["c"] == "#ffffff"
    assert "#ffffff" not in (fills["a"], fills["b"])


def test_choices_bounds_and_title_are_labelled_and_a_distant_bound_is_not_drawn() -> None:
    shown = texts(plot_front(full_selection(), "svg"))
    assert shown.count("fast") == 2  # the bound and the chosen student
    assert "far" not in shown
    assert {"mini", "sft", "kd", "pl", "2-1", "2-2", "teacher", "chosen"} <= set(shown)


def test_svg_is_reproducible() -> None:
    assert plot_front(full_selection(), "svg") == plot_front(full_selection(), "svg")


def test_axis_label_mentions_shifted_markers() -> None:
    label = "Latency of a batch of 32 (ms)"
    assert f"{label}; methods of equal cost side by side" in texts(plot_front(make_selection(TRIALS), "svg"))
    assert label in texts(plot_front(make_selection(TRIALS[:2]), "svg"))
