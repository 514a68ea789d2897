"""Extra sources: repeated rows are left out, near duplicates of the evaluation splits are refused or left out."""

import json
import re

import pyarrow.parquet as pq
import pytest

from raydistill.config.run import Dataset, ExtraSources
from raydistill.core.errors import UserError
from raydistill.data.extra import (
    DROPPED_FILE,
    describe_extra,
    ensure_extra,
    extra_dataset,
    format_extra,
    read_extra,
    read_extra_manifest,
)
from tests.factories.data_files import write_jsonl

TEST_SOURCE = "A man in a blue shirt is standing on a ladder cleaning a window."
EXTRA = [
    "Two young guys with shaggy hair look at their hands.",
    "A girl in a pink dress climbs a set of stairs.",
    "a  man SLEEPING in a green room on a couch.",  # equal to a training source but for case and spaces
    "A man in a blue shirt is standing on a ladder, cleaning a window.",  # near duplicate of a test source
    "Several men in hard hats operate a giant pulley system.",
    "A girl in a pink dress climbs a set of stairs.",  # repeated
    "A black dog and a spotted dog are fighting.",  # equal to a validation source
]


@pytest.fixture
def data(tmp_path):
    splits = {
        "train": ["A man sleeping in a green room on a couch.", "A boy wearing headphones sits on his shoulders."],
        "validation": ["A black dog and a spotted dog are fighting.", "People stand outside in the rain."],
        "test": [TEST_SOURCE, "A trendy girl talks on her cellphone."],
    }
    folder = tmp_path / "data"
    folder.mkdir()
    for split, sources in splits.items():
        write_jsonl(
            folder / f"{split}.jsonl",
            [{"id": f"{split}{i}", "source": s, "target": "t"} for i, s in enumerate(sources)],
        )
    write_jsonl(tmp_path / "more.jsonl", [{"source": text} for text in EXTRA])
    return Dataset(name=str(folder))


def make(data, tmp_path, name="more.jsonl", **settings):
    extra = ExtraSources(name=str(tmp_path / name), **{k: settings.pop(k) for k in ("columns",) if k in settings})
    return ensure_extra(data, extra, tmp_path / "extra", **settings)


def test_near_duplicates_of_evaluation_rows_are_refused_by_file_and_row(data, tmp_path):
    with pytest.raises(UserError) as caught:
        make(data, tmp_path)
    message = str(caught.value)
    assert "2 rows are near duplicates" in message
    assert re.search(r"more\.jsonl:4: similar \(0\.\d\d\) to row 'test0' of the test split", message)
    assert "more.jsonl:7: equal to row 'validation0' of the validation split" in message
    assert "pseudo.extra_overlap: drop" in message
    assert not [path for path in (tmp_path / "extra").iterdir() if path.is_dir()]


def test_rows_are_left_out_counted_and_listed(data, tmp_path, capsys):
    folder = make(data, tmp_path, overlap="drop")
    corpus = read_extra(folder)
    assert corpus.sources == [EXTRA[0], EXTRA[1], EXTRA[4]]
    assert corpus.ids == ["extra:0", "extra:1", "extra:4"]
    assert not corpus.labelled
    manifest = read_extra_manifest(folder)
    assert (manifest.rows, manifest.dropped) == (3, {"train": 2, "validation": 1, "test": 1})
    dropped = pq.read_table(folder / DROPPED_FILE).to_pylist()
    assert [row["row"] for row in dropped] == [3, 4, 6, 7]
    assert "3 rows; left out: 2 equal to rows of train" in capsys.readouterr().err
    assert make(data, tmp_path, overlap="drop") == folder


def test_a_limit_counts_the_rows_that_remain(data, tmp_path):
    assert read_extra(make(data, tmp_path, max_rows=2)).sources == [EXTRA[0], EXTRA[1]]
    # The limit is reached before the second overlap
    assert read_extra(make(data, tmp_path, max_rows=3, overlap="drop")).sources == [EXTRA[0], EXTRA[1], EXTRA[4]]


def test_key_depends_on_the_texts_and_not_on_their_path_or_format(data, tmp_path):
    folder = make(data, tmp_path, overlap="drop")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "more.json").write_text(json.dumps([{"source": text} for text in EXTRA]))
    assert make(data, tmp_path, "other/more.json", overlap="drop") == folder
    write_jsonl(tmp_path / "more.jsonl", [{"source": text} for text in EXTRA[:3]])
    assert make(data, tmp_path, overlap="drop") != folder


def test_validation_rows_of_both_parts_count(data, tmp_path):
    """The selection rows are a part of the validation split."""
    divided = data.model_copy(update={"selection_share": 0.5})
    assert make(divided, tmp_path, overlap="drop") == make(data, tmp_path, overlap="drop")


def test_bad_rows_and_texts_of_which_none_remains_are_errors(data, tmp_path):
    write_jsonl(tmp_path / "bad.jsonl", [{"source": "fine text"}, {"source": ""}])
    with pytest.raises(UserError, match=r"bad\.jsonl:2: source: empty"):
        make(data, tmp_path, "bad.jsonl")
    write_jsonl(tmp_path / "same.jsonl", [{"source": "A man sleeping in a green room on a couch."}])
    with pytest.raises(UserError, match=r"same\.jsonl: no row remains"):
        make(data, tmp_path, "same.jsonl")


def test_texts_of_other_columns_and_two_text_files(data, tmp_path):
    (tmp_path / "plain.source").write_text("One line of text here.\nAnother line of text there.\n")
    assert len(read_extra(make(data, tmp_path, "plain.source"))) == 2
    write_jsonl(tmp_path / "body.jsonl", [{"body": "A text in another column."}])
    folder = make(data, tmp_path, "body.jsonl", columns={"source": "body"})
    assert read_extra(folder).sources == ["A text in another column."]
    assert extra_dataset(folder).name.endswith("body.parquet")


def test_description_reports_all_rows_and_writes_nothing(data, tmp_path):
    report = describe_extra(data, ExtraSources(name=str(tmp_path / "more.jsonl")))
    assert report.num_kept == 3
    assert [row.location[1] for row in report.overlaps] == [4, 7]
    assert "1 near duplicates of validation" in format_extra(report)
    assert not (tmp_path / "extra").exists()
