"""Typed records: what a file holds, and what is said about a damaged file."""

import json
import math
from pathlib import Path
from typing import ClassVar

import pytest

from raydistill.core.errors import UserError
from raydistill.core.files import SCHEMA_VERSION
from raydistill.core.records import Record
from tests.factories.kills import kill_at_every_step


class Score(Record):
    """A record with a remedy of its own."""

    remedy: ClassVar[str] = "Score it again"
    value: float
    rows: tuple[int, ...] = ()


def test_a_record_is_read_as_written_with_its_schema_version(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    assert Score.read_if_present(path) is None
    Score(value=0.5, rows=(3, 4)).write(path)
    assert json.loads(path.read_text()) == {"schema": SCHEMA_VERSION, "value": 0.5, "rows": [3, 4]}
    assert Score.read(path) == Score.read_if_present(path) == Score(value=0.5, rows=(3, 4))


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ({"value": 1, "schema": SCHEMA_VERSION, "more": 1}, "more: Extra inputs are not permitted"),
        ({"value": 1, "schema": SCHEMA_VERSION, "rows": [1, "x"]}, r"rows\.1: Input should be a valid integer"),
        ({"schema": SCHEMA_VERSION}, "value: Field required"),
        ({"value": 1, "schema": SCHEMA_VERSION + 1}, f"schema version {SCHEMA_VERSION + 1}"),
        ({"value": 1}, "schema version"),
    ],
    ids=["unknown", "wrong", "missing", "schema", "no schema"],
)
def test_a_wrong_file_is_named_with_its_first_wrong_key_and_the_remedy(
    content: dict[str, object], problem: str, tmp_path: Path
) -> None:
    path = tmp_path / "score.json"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=problem) as error:
        Score.read(path)
    assert str(error.value).startswith(str(path))
    assert "Score it again" in str(error.value)


@pytest.mark.parametrize(("old", "steps_before"), [(1.0, 3), (None, 5)])
def test_a_kill_at_any_step_of_a_write_leaves_the_old_or_the_new_record(
    old: float | None, steps_before: int, tmp_path: Path
) -> None:
    folder = tmp_path / "home" / "x"
    path = folder / "score.json"
    folder.parent.mkdir()

    def prepare() -> None:
        if old is not None:
            Score(value=old).write(path)

    def value(_: Path) -> float | None:
        score = Score.read_if_present(path)
        return score.value if score else None

    values = kill_at_every_step(lambda: Score(value=2.0).write(path), prepare, folder, value)
    # Steps: the folder, if it is new, and the fsync of its parent; open, fsync, rename and fsync for the file; the
    # unlink of its old name. The last value is that without a kill.
    assert values == [old] * steps_before + [2.0] * 3


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "score.json"
    with pytest.raises(ValueError, match="not JSON compliant"):
        Score(value=math.nan).write(path)
    assert list(tmp_path.iterdir()) == []
