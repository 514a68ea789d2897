"""Readers of every file format, and files that are corrupt, ambiguous or unsupported."""

import gzip
import hashlib
from pathlib import Path

import pytest

from raydistill.config.run import Columns, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import read_corpus, split_names
from tests.factories.data_files import (
    GOOD,
    ROWS,
    read,
    rows_of,
    write_csv,
    write_json_array,
    write_jsonl,
    write_parquet,
)

WRITERS = {
    "train.jsonl": write_jsonl,
    "train.json": write_json_array,
    "train.json.gz": write_jsonl,
    "train.csv": write_csv,
    "train.csv.gz": write_csv,
    "train.tsv": lambda path, rows: write_csv(path, rows, "\t"),
    "train.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_rows_and_fingerprint(tmp_path, name):
    corpus = read(WRITERS[name](tmp_path / name, ROWS))
    assert rows_of(corpus) == ROWS
    assert corpus.columns == Columns(source="document", target="summary", id="id")
    assert rows_of(read(tmp_path)) == ROWS
    # By definition: of each text, the length in 8 bytes, then the text.
    content = b""
    for row in ROWS:
        for text in (row["id"], row["document"], row["summary"]):
            content += len(text.encode()).to_bytes(8, "big") + text.encode()
    assert corpus.fingerprint == hashlib.sha256(content).hexdigest()[:16]


def test_line_pairs_need_equal_counts_but_no_final_newline(tmp_path):
    (tmp_path / "val.source").write_text("one\ntwo\r\nthree")
    (tmp_path / "val.target.gz").write_bytes(gzip.compress(b"eins\nzwei\ndrei\n"))
    corpus = read(tmp_path, "validation")
    assert corpus.sources == ["one", "two", "three"]
    assert corpus.targets == ["eins", "zwei", "drei"]
    assert corpus.ids == ["0", "1", "2"]
    (tmp_path / "val.source").write_text("one\ntwo\nthree\nfour\nfive\n")
    with pytest.raises(UserError, match=r"val\.source has 5 lines and .*val\.target\.gz has 3"):
        read(tmp_path, "validation")


@pytest.mark.parametrize("name", ["test.source", "test.source.gz"])
def test_byte_order_mark_is_removed_and_only_line_feeds_end_lines(tmp_path, name):
    data = b"\xef\xbb\xbfone\rmore\x0b\xc2\x85\ntwo\n"
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    (tmp_path / "test.target").write_text("eins\nzwei\n")
    assert read(tmp_path, "test").sources == ["one\rmore\x0b\x85", "two"]


def test_folder_of_splits_and_shards(tmp_path):
    write_parquet(tmp_path / "train-00001-of-00002.parquet", ROWS[2:])
    write_parquet(tmp_path / "train-00000-of-00002.parquet", ROWS[:2])
    for i in (10, 9):
        write_jsonl(tmp_path / f"dev.{i}.jsonl", [{"source": f"s{i}", "target": "t"}])
    (tmp_path / "README.md").write_text("no data")
    dataset = Dataset(name=str(tmp_path))
    assert split_names(dataset) == ["train", "validation"]
    assert rows_of(read_corpus(dataset, "train")) == ROWS
    assert read_corpus(dataset, "validation").sources == ["s9", "s10"]
    assert read_corpus(dataset, "validation").ids == ["0", "1"]
    with pytest.raises(UserError, match="no split 'test'; available: train, validation"):
        read_corpus(dataset, "test")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet is missing"):
        read_corpus(dataset, "train")


def test_two_files_for_one_split_are_rejected(tmp_path):
    write_jsonl(tmp_path / "val.jsonl", ROWS)
    write_csv(tmp_path / "validation.csv", ROWS)
    with pytest.raises(UserError, match=r"both val\.jsonl and validation\.csv could be the validation split"):
        read(tmp_path, "validation")


def test_single_file_is_one_split(tmp_path):
    assert split_names(Dataset(name=str(write_jsonl(tmp_path / "mine.jsonl", ROWS)))) == ["train"]
    assert split_names(Dataset(name=str(write_jsonl(tmp_path / "test.jsonl.gz", ROWS)))) == ["test"]
    assert rows_of(read(tmp_path / "mine.jsonl", "test")) == ROWS


def test_json_errors_give_the_column_within_the_line(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, '{"id": 1, ', '{"id": }\r', '{"id":\r'])
    reasons = [row.reason for row in read(path, skip_bad_rows=True).skipped]
    assert [reason.rpartition(" at ")[2] for reason in reasons] == ["column 11", "column 8", "column 7"]


def test_csv_field_counts_and_multiline_fields(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('source,target\n"a\nb",c\nd\ne,f,g\nh,i\n')
    corpus = read(path, skip_bad_rows=True)
    assert corpus.sources == ["a\nb", "h"]
    assert corpus.ids == ["0", "3"]  # ids of usable rows do not depend on bad rows being skipped
    assert [(row.row, row.reason) for row in corpus.skipped] == [
        (4, "1 fields, but the header has 2"),
        (5, "3 fields, but the header has 2"),
    ]
    path.write_text("source,target\na\nb,c\n")
    assert read(path, skip_bad_rows=True).skipped[0].row == 2
    path.write_text('source,target\na,b\n"c,d\ne,f\n')
    with pytest.raises(UserError, match=r"x\.csv:3: not valid CSV"):
        read(path, skip_bad_rows=True)


def test_long_csv_field(tmp_path):
    assert len(read(write_csv(tmp_path / "x.csv", [{"source": "w " * 100_000, "target": "t"}])).sources[0]) == 200_000


def truncate(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def test_corrupt_missing_and_unsupported_files(tmp_path):
    many = [{"source": str(i) * 50, "target": hashlib.sha256(str(i).encode()).hexdigest()} for i in range(500)]
    with pytest.raises(UserError, match="corrupt or truncated"):
        read(truncate(write_jsonl(tmp_path / "x.jsonl.gz", many)))
    (tmp_path / "y.jsonl.gz").write_text("plain text")
    with pytest.raises(UserError, match="corrupt or truncated"):
        read(tmp_path / "y.jsonl.gz")
    with pytest.raises(UserError, match="not a complete Parquet file"):
        read(truncate(write_parquet(tmp_path / "x.parquet", many)))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "x.docx").write_text("?")
    with pytest.raises(UserError, match=r"x\.docx: unsupported file type; supported: \.jsonl"):
        read(tmp_path / "x.docx")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*empty\.jsonl"):
        read(tmp_path / "emty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no train, validation or test file in this folder"):
        read(tmp_path / "folder")
    with pytest.raises(UserError, match="folder/news: no such file or folder"):
        read(tmp_path / "folder/news")
    with pytest.raises(UserError, match="name of the data set is empty"):
        read("")
    with pytest.raises(UserError, match="did you mean 'xsum'"):
        read("xsun")


def test_invalid_utf8_in_parquet_is_one_bad_row(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    raw = pa.array([b"good", b"\xff\xfe", b"fine"], pa.binary())
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"source": texts, "target": ["a", "b", "c"]}), tmp_path / "x.parquet")
    corpus = read(tmp_path / "x.parquet", skip_bad_rows=True)
    assert corpus.sources == ["good", "fine"]
    assert [(row.row, row.reason) for row in corpus.skipped] == [(2, "invalid UTF-8")]
