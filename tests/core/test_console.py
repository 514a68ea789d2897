"""Tables, results and progress on the console."""

import json
from types import SimpleNamespace

import pytest

from raydistill.core import console
from raydistill.core.console import ProgressBar, format_table, print_json, print_progress, print_text, progress_to


def test_table_aligns_the_first_column_left_and_numbers_right():
    table = format_table(("model", "ms"), [("teacher", "100"), ("6-3", "9")])
    assert table.splitlines() == ["model     ms", "-------  ---", "teacher  100", "6-3        9"]


def test_results_go_to_stdout_and_progress_to_stderr(capsys):
    print_text("a table")
    print_json({"a": 1}, as_json=False)
    print_progress("working")
    assert capsys.readouterr() == ("a table\n", "working\n")


def test_stdout_holds_only_json_if_requested(capsys):
    print_text("a table", as_json=True)
    print_json({"uri": "http://u:p@h"}, as_json=True)
    output = capsys.readouterr()
    assert json.loads(output.out) == {"uri": "http://***@h"}
    assert output.err == "a table\n"


def test_nan_is_not_printed_as_json():
    with pytest.raises(ValueError, match="not JSON compliant"):
        print_json({"a": float("nan")}, as_json=True)


def test_progress_without_a_terminal_is_a_line_at_the_end(capsys):
    bar = ProgressBar("scoring", total=2)
    bar.advance(1, "1 of 2 rows")
    assert capsys.readouterr().err == ""
    bar.advance(1, "2 of 2 rows")
    bar.close()
    assert capsys.readouterr().err == "  scoring: 2 of 2 rows, 0 s left\n"


def test_delayed_progress_prints_nothing_about_short_work_and_lines_about_long_work(capsys, monkeypatch):
    times = iter([0.0, 4.9, 4.9, 100.0, 105.5, 105.5, 106.0, 106.0])
    monkeypatch.setattr(console, "time", SimpleNamespace(monotonic=lambda: next(times)))
    short = ProgressBar("decoding", total=1, delayed=True)
    short.advance(1, "1/1 rows")
    assert capsys.readouterr().err == ""
    long = ProgressBar("decoding", total=2, delayed=True)
    long.advance(1, "1/2 rows")
    assert capsys.readouterr().err == "  decoding: 1/2 rows, 6 s left\n"
    long.advance(1, "2/2 rows")
    assert capsys.readouterr().err == "  decoding: 2/2 rows, 0 s left\n"


def test_progress_can_be_passed_to_a_function(capsys):
    lines: list[str] = []
    with progress_to(lines.append):
        print_progress("http://u:p@h")
    print_progress("afterwards")
    assert lines == ["http://***@h"]
    assert capsys.readouterr().err == "afterwards\n"
