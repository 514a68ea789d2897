"""What is known of a data set for a model card."""

from pathlib import Path

import pytest

from raydistill.config.presets import hub_teacher
from raydistill.config.run import Dataset
from raydistill.data.card import DataCard, describe_data, public_name


def test_named_data_sets_and_hub_data_sets() -> None:
    expected = DataCard("wmt16_en_ro", "wmt/wmt16", ["en", "ro"], None)
    assert describe_data(Dataset(name="wmt16_en_ro")) == expected
    assert describe_data(Dataset(name="demo")) == DataCard("demo", None, ["en"], None)
    dataset = Dataset(name="owner/data", languages=("de_DE", "en_XX"))
    assert describe_data(dataset) == DataCard("owner/data", "owner/data", ["de", "en"], None)


@pytest.mark.parametrize(
    ("readme", "languages", "licence"),
    [
        ("---\nlanguage: ro\nlicense: mit\n---\ntext", ["ro"], "mit"),
        ("---\nlicense: [mit, other]\n---\n", [], None),
        ("no metadata", [], None),
        ("---\n: [\n---\n", [], None),
    ],
)
def test_language_and_licence_of_a_folder_are_read_from_its_readme(
    tmp_path: Path, readme: str, languages: list[str], licence: str | None
) -> None:
    (tmp_path / "README.md").write_text(readme)
    assert describe_data(Dataset(name=str(tmp_path))) == DataCard(tmp_path.name, None, languages, licence)


def test_names_are_public_without_local_folders(tmp_path: Path) -> None:
    assert public_name("facebook/bart-large-xsum") == "facebook/bart-large-xsum"
    assert public_name("/home/me/data.jsonl") == "data.jsonl"
    assert public_name("/home/me/runs/teacher/best") == "teacher"


def test_hub_name_of_a_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_teacher("pegasus", "xsum") == "google/pegasus-xsum"
    assert hub_teacher("owner/name@main", "mine") == "owner/name"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert hub_teacher("owner/name", "mine") is None
    assert hub_teacher("demo", "demo") is None
