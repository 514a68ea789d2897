"""`raydistill labels` as a user runs it."""

from tests.factories.workspace import command


def test_a_negative_number_of_rows_is_refused_by_its_option(tmp_path):
    done = command(tmp_path / "outputs", "labels", "describe", "demo-train", "--rows", "-1")
    assert done.returncode == 2
    assert "'--rows'" in done.stderr
    assert "Traceback" not in done.stderr
