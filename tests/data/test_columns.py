"""Detection of columns, and validation of values."""

import pytest

from raydistill.config.run import Columns
from raydistill.core.errors import UserError
from tests.factories.data_files import GOOD, read, write_jsonl


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"id": 7, "article": "s", "highlights": "t"}, ("7", "s", "t")),
        ({"fname": "train_0", "dialogue": "s", "summary": "t", "topic": "x"}, ("train_0", "s", "t")),
        ({"translation": {"en": "s", "ro": "t"}}, ("0", "s", "t")),
        ({"translation": {"ro": "s", "en": "t"}}, ("0", "s", "t")),
        ({"src": "s", "tgt": "t"}, ("0", "s", "t")),
        ({"text": "s", "summary": "t"}, ("0", "s", "t")),
        ({"output": "t", "input": "s"}, ("0", "s", "t")),
        ({"text": "no", "document": "s", "summary": "t"}, ("0", "s", "t")),
    ],
)
def test_known_columns_are_detected(tmp_path, row, expected):
    corpus = read(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert (corpus.ids[0], corpus.sources[0], corpus.targets[0]) == expected


def test_dotted_column_names_address_nested_values(tmp_path):
    rows = [{"meta": {"key": "k1"}, "pair": {"en": "s", "de": "t", "fr": "u"}, "id": 1}]
    columns = Columns(source="pair.en", target="pair.fr", id="meta.key")
    corpus = read(write_jsonl(tmp_path / "x.jsonl", rows), columns=columns)
    assert (corpus.ids, corpus.sources, corpus.targets) == (["k1"], ["s"], ["u"])


def test_unknown_columns_error_lists_columns_and_yaml(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": "s", "extra": {"title": "t"}}])
    with pytest.raises(UserError, match=r"body, extra\.title.*columns: \{source: body, target: extra\.title\}"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'bodi'.*body, extra\.title"):
        read(path, columns=Columns(source="bodi", target="extra.title"))


BAD_ROWS = [
    ({"id": "1", "source": 5, "target": "t"}, "source: expected a string, got a number"),
    ({"id": "2", "source": None, "target": "t"}, "source: expected a string, got null"),
    ({"id": "3", "source": "s", "target": ["t"]}, "target: expected a string, got an array"),
    ({"id": "4", "source": " \n\t", "target": "t"}, "source: empty"),
    ({"id": "5", "source": "s", "target": ""}, "target: empty"),
    ({"id": "6", "source": "s"}, "target: missing field"),
    ({"id": None, "source": "s", "target": "t"}, "id: expected an id (a string or an integer), got null"),
    ('{"id": "8", "source": "s\udcff", "target": "t"}', "invalid UTF-8"),
    ('{"id": "9", "source": "s", ', "invalid JSON"),
    ('{"id": "10", "source": "\\ud800", "target": "t"}', "source: invalid Unicode (lone surrogate)"),
    ("[1, 2]", "expected a JSON object, got an array"),
    ("[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD_ROWS)
def test_bad_row_raises_an_error_or_is_skipped(tmp_path, bad, reason):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, "", bad, {**GOOD, "id": "h"}])
    with pytest.raises(UserError) as caught:
        read(path)
    assert "1 rows that cannot be used; correct them, or skip them with --skip-bad-rows" in str(caught.value)
    assert f"{path}:3: {reason}" in str(caught.value)
    corpus = read(path, skip_bad_rows=True)
    assert corpus.ids == ["g", "h"]
    assert [(row.row, row.reason.startswith(reason)) for row in corpus.skipped] == [(3, True)]
