"""Corpora: bad rows, duplicates, missing targets, limits, fingerprints and statistics."""

import pytest

from raydistill.config.run import Columns, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Corpus, corpus_statistics, inspect_corpus, split_names
from tests.factories.data_files import GOOD, ROWS, read, write_jsonl


def test_fingerprint_depends_on_the_boundary_between_texts(tmp_path):
    first = read(write_jsonl(tmp_path / "1.jsonl", [{"source": "ab", "target": "c"}]))
    second = read(write_jsonl(tmp_path / "2.jsonl", [{"source": "a", "target": "bc"}]))
    assert first.fingerprint != second.fingerprint


def test_error_counts_bad_rows_and_lists_the_first(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, *({"id": str(i), "source": "", "target": "t"} for i in range(9))])
    with pytest.raises(UserError, match=r"(?s)^9 rows that cannot be used.*:2:.*:6:.*and 4 more$"):
        read(path)


@pytest.mark.parametrize("bad", ['{"id": ', '{"source": "s\udcff"}', "[1]"])
def test_file_that_begins_with_many_bad_rows(tmp_path, bad):
    path = write_jsonl(tmp_path / "x.jsonl", [*[bad] * 150, GOOD])
    corpus = read(path, skip_bad_rows=True)
    assert (corpus.ids, len(corpus.skipped), corpus.skipped[-1].row) == (["g"], 150, 150)
    with pytest.raises(UserError, match=r"(?s)^150 rows that cannot be used;.*--skip-bad-rows.*x\.jsonl:1: .*145 more"):
        read(path)


@pytest.mark.parametrize("skip", [False, True])
def test_file_with_bad_rows_only_is_rejected(tmp_path, skip):
    path = write_jsonl(tmp_path / "x.jsonl", ["{", ' "id": 1', "}"])
    with pytest.raises(UserError, match=r"(?s)^3 rows .*no other rows.*one JSON object per line.*x\.jsonl:1: invalid"):
        read(path, skip_bad_rows=skip)


def test_duplicate_id_error_names_both_rows(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {**GOOD, "id": "h"}, {**GOOD, "source": "other"}])
    with pytest.raises(UserError, match=rf"x\.jsonl:3: duplicate id 'g', first seen at {path}:1"):
        read(path, skip_bad_rows=True)
    numbered = read(path, columns=Columns(source="source", target="target", id=""))
    assert numbered.ids == ["0", "1", "2"]
    corpus, duplicates = inspect_corpus(Dataset(name=str(path)), "train")
    assert corpus.ids == ["g", "h"]
    assert [row.row for row in duplicates] == [3]


def test_unlabelled_rows_are_read_if_targets_are_not_needed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"document": "s1"}, {"document": "s2"}])
    with pytest.raises(UserError, match="document"):
        read(path)
    corpus = read(path, need_targets=False)
    assert (corpus.labelled, corpus.sources, corpus.targets) == (False, ["s1", "s2"], ["", ""])
    write_jsonl(path, [{"document": "s1", "summary": "t"}, {"document": "s2", "summary": None}])
    assert read(path, need_targets=False).targets == ["", ""]
    write_jsonl(path, ROWS)
    assert read(path, need_targets=False).fingerprint == read(path).fingerprint


def test_reading_stops_at_the_row_limit(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*({"source": f"s{i}", "target": "t"} for i in range(5)), "broken"])
    assert read(path, train_rows=3).sources == ["s0", "s1", "s2"]
    with pytest.raises(UserError, match="invalid JSON"):
        read(path, test_rows=3)
    assert read(path, "test", test_rows=1).head(5).ids == ["0"]


def test_corpus_statistics():
    sources = [" ".join(["w"] * n) for n in range(1, 21)]
    corpus = Corpus("x", "train", [str(i) for i in range(20)], sources, ["é"] * 20, Columns(source="s"))
    assert corpus_statistics(corpus) == {
        "rows": 20,
        "source_words_mean": 10.5,
        "source_words_p50": 10,
        "source_words_p95": 19,
        "source_words_max": 20,
        "target_words_mean": 1.0,
        "target_words_p50": 1,
        "target_words_p95": 1,
        "target_words_max": 1,
        "bytes": sum(2 * n - 1 for n in range(1, 21)) + 40,
    }


def test_demo_by_name():
    assert split_names(Dataset(name="demo")) == ["train", "validation", "test"]
    assert read("demo", "test", test_rows=7).ids == [f"test-{i}" for i in range(7)]
    with pytest.raises(UserError, match="no split 'dev'"):
        read("demo", "dev")
