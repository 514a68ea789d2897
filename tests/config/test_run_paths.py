"""Absolute paths in the data of runs."""

from raydistill.config.run_paths import make_paths_absolute


def test_paths_in_labels_choices_and_cases_become_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("set", "teacher"):
        (tmp_path / name).mkdir()
    run = {
        "teacher": {"choice": ["teacher", "bart"]},
        "labels": {"cases": [{"choice": ["original+set*0.5", "pseudo+pseudo@teacher"], "when": {"method": "sft"}}]},
        "student": {"copy_from": "teacher", "size": "6-3"},
    }
    result = make_paths_absolute(run)
    assert result["teacher"] == {"choice": [f"{tmp_path}/teacher", "bart"]}
    assert result["labels"]["cases"][0]["choice"] == [
        f"original+{tmp_path}/set*0.5",
        f"pseudo+pseudo@{tmp_path}/teacher",
    ]
    assert result["student"] == {"copy_from": f"{tmp_path}/teacher", "size": "6-3"}


def test_path_of_extra_texts_becomes_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more.jsonl").touch()
    absolute = f"{tmp_path}/more.jsonl"
    assert make_paths_absolute({"pseudo": {"extra": "more.jsonl", "n_best": 2}}) == {
        "pseudo": {"extra": absolute, "n_best": 2}
    }
    extra = {"name": "more.jsonl", "columns": {"source": "body"}}
    assert make_paths_absolute({"pseudo": {"extra": extra}})["pseudo"]["extra"] == {**extra, "name": absolute}
