import gzip
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from raydistill.config.run import Columns, Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import Corpus, corpus_statistics, inspect_corpus, read_corpus, split_names
from tests.factories.data_files import GOOD, ROWS, write_csv, write_json_array, write_jsonl, write_parquet
from tests.factories.hub_cache import lay_out_dataset


def read(path: Path | str, split: str = "train", need_targets: bool = True, **settings) -> Corpus:
    return read_corpus(Dataset(name=str(path), **settings), split, need_targets=need_targets)


def rows_of(corpus: Corpus) -> list[dict]:
    return [
        {"document": s, "summary": t, "id": i}
        for i, s, t in zip(corpus.ids, corpus.sources, corpus.targets, strict=True)
    ]


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
    # Worked out by hand: each text's length in 8 bytes, then the text.
    content = b""
    for row in ROWS:
        for text in (row["id"], row["document"], row["summary"]):
            content += len(text.encode()).to_bytes(8, "big") + text.encode()
    assert corpus.fingerprint == hashlib.sha256(content).hexdigest()[:16]


def test_fingerprint_sees_every_text_and_the_border_between_two(tmp_path):
    one = read(write_jsonl(tmp_path / "1.jsonl", [{"source": "ab", "target": "c"}]))
    two = read(write_jsonl(tmp_path / "2.jsonl", [{"source": "a", "target": "bc"}]))
    assert one.fingerprint != two.fingerprint


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
def test_known_columns_are_found(tmp_path, row, expected):
    corpus = read(write_jsonl(tmp_path / "x.jsonl", [row]))
    assert (corpus.ids[0], corpus.sources[0], corpus.targets[0]) == expected


def test_named_columns_reach_into_objects(tmp_path):
    rows = [{"meta": {"key": "k1"}, "pair": {"en": "s", "de": "t", "fr": "u"}, "id": 1}]
    columns = Columns(source="pair.en", target="pair.fr", id="meta.key")
    corpus = read(write_jsonl(tmp_path / "x.jsonl", rows), columns=columns)
    assert (corpus.ids, corpus.sources, corpus.targets) == (["k1"], ["s"], ["u"])


def test_unknown_columns_are_listed_with_the_yaml_to_write(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"body": "s", "extra": {"title": "t"}}])
    with pytest.raises(UserError, match=r"body, extra\.title.*columns: \{source: body, target: extra\.title\}"):
        read(path)
    with pytest.raises(UserError, match=r"no column 'bodi'.*body, extra\.title"):
        read(path, columns=Columns(source="bodi", target="extra.title"))


def test_line_pairs_need_no_last_newline_but_equal_counts(tmp_path):
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
def test_byte_order_mark_is_no_text_and_only_a_line_feed_ends_a_line(tmp_path, name):
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
    with pytest.raises(UserError, match="no test split; it has train, validation"):
        read_corpus(dataset, "test")
    (tmp_path / "train-00000-of-00002.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000-of-00002\.parquet is missing"):
        read_corpus(dataset, "train")


def test_two_files_for_one_split_are_refused(tmp_path):
    write_jsonl(tmp_path / "val.jsonl", ROWS)
    write_csv(tmp_path / "validation.csv", ROWS)
    with pytest.raises(UserError, match=r"val\.jsonl and validation\.csv both look like the validation split"):
        read(tmp_path, "validation")


def test_one_file_is_one_split(tmp_path):
    assert split_names(Dataset(name=str(write_jsonl(tmp_path / "mine.jsonl", ROWS)))) == ["train"]
    assert split_names(Dataset(name=str(write_jsonl(tmp_path / "test.jsonl.gz", ROWS)))) == ["test"]
    assert rows_of(read(tmp_path / "mine.jsonl", "test")) == ROWS


BAD = [
    ({"id": "1", "source": 5, "target": "t"}, "source: expected a text, found a number"),
    ({"id": "2", "source": None, "target": "t"}, "source: expected a text, found null"),
    ({"id": "3", "source": "s", "target": ["t"]}, "target: expected a text, found a list"),
    ({"id": "4", "source": " \n\t", "target": "t"}, "source: empty"),
    ({"id": "5", "source": "s", "target": ""}, "target: empty"),
    ({"id": "6", "source": "s"}, "target: expected a text, found no such field"),
    ({"id": None, "source": "s", "target": "t"}, "id: expected an id (a text or a whole number), found null"),
    ('{"id": "8", "source": "s\udcff", "target": "t"}', "invalid UTF-8"),
    ('{"id": "9", "source": "s", ', "invalid JSON"),
    ('{"id": "10", "source": "\\ud800", "target": "t"}', "source: a lone surrogate"),
    ("[1, 2]", "not a JSON object but a list"),
    ("[" * 100_000, "invalid JSON"),
]


@pytest.mark.parametrize(("bad", "reason"), BAD)
def test_bad_row_stops_with_file_row_and_remedy_or_is_skipped(tmp_path, bad, reason):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, "", bad, {**GOOD, "id": "h"}])
    with pytest.raises(UserError) as caught:
        read(path)
    assert "1 rows that cannot be used; correct them, or skip them with --skip-bad-rows" in str(caught.value)
    assert f"{path}:3: {reason}" in str(caught.value)
    corpus = read(path, skip_bad_rows=True)
    assert corpus.ids == ["g", "h"]
    assert [(row.row, row.reason.startswith(reason)) for row in corpus.skipped] == [(3, True)]


def test_many_bad_rows_are_counted_and_the_first_listed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, *({"id": str(i), "source": "", "target": "t"} for i in range(9))])
    with pytest.raises(UserError, match=r"(?s)^9 rows that cannot be used.*:2:.*:6:.*and 4 more$"):
        read(path)


@pytest.mark.parametrize("bad", ['{"id": ', '{"source": "s\udcff"}', "[1]"])
def test_a_file_may_begin_with_many_bad_rows(tmp_path, bad):
    path = write_jsonl(tmp_path / "x.jsonl", [*[bad] * 150, GOOD])
    corpus = read(path, skip_bad_rows=True)
    assert (corpus.ids, len(corpus.skipped), corpus.skipped[-1].row) == (["g"], 150, 150)
    with pytest.raises(UserError, match=r"(?s)^150 rows that cannot be used;.*--skip-bad-rows.*x\.jsonl:1: .*145 more"):
        read(path)


@pytest.mark.parametrize("skip", [False, True])
def test_a_file_of_bad_rows_alone_is_refused_with_the_first(tmp_path, skip):
    path = write_jsonl(tmp_path / "x.jsonl", ["{", ' "id": 1', "}"])
    with pytest.raises(UserError, match=r"(?s)^3 rows .*no other rows.*one JSON object per line.*x\.jsonl:1: invalid"):
        read(path, skip_bad_rows=skip)


def test_the_column_of_broken_json_is_that_of_its_line(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, '{"id": 1, ', '{"id": }\r', '{"id":\r'])
    reasons = [row.reason for row in read(path, skip_bad_rows=True).skipped]
    assert [reason.rpartition(" at ")[2] for reason in reasons] == ["column 11", "column 8", "column 7"]


def test_csv_with_wrong_field_counts_and_a_text_over_two_lines(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('source,target\n"a\nb",c\nd\ne,f,g\nh,i\n')
    corpus = read(path, skip_bad_rows=True)
    assert corpus.sources == ["a\nb", "h"]
    assert corpus.ids == ["0", "3"]  # the numbers of good rows do not depend on skipping
    assert [(row.row, row.reason) for row in corpus.skipped] == [
        (4, "1 fields where the header has 2"),
        (5, "3 fields where the header has 2"),
    ]
    path.write_text("source,target\na\nb,c\n")
    assert read(path, skip_bad_rows=True).skipped[0].row == 2
    path.write_text('source,target\na,b\n"c,d\ne,f\n')
    with pytest.raises(UserError, match=r"x\.csv:3: not valid CSV"):
        read(path, skip_bad_rows=True)


def test_long_csv_field(tmp_path):
    assert len(read(write_csv(tmp_path / "x.csv", [{"source": "w " * 100_000, "target": "t"}])).sources[0]) == 200_000


def test_duplicate_ids_name_both_rows(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [GOOD, {**GOOD, "id": "h"}, {**GOOD, "source": "other"}])
    with pytest.raises(UserError, match=rf"x\.jsonl:3: id 'g' is also that of {path}:1"):
        read(path, skip_bad_rows=True)
    numbered = read(path, columns=Columns(source="source", target="target", id=""))
    assert numbered.ids == ["0", "1", "2"]
    corpus, duplicates = inspect_corpus(Dataset(name=str(path)), "train")
    assert corpus.ids == ["g", "h"]
    assert [row.row for row in duplicates] == [3]


def test_unlabelled_rows_are_read_where_targets_are_not_needed(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [{"document": "s1"}, {"document": "s2"}])
    with pytest.raises(UserError, match="document"):
        read(path)
    corpus = read(path, need_targets=False)
    assert (corpus.labelled, corpus.sources, corpus.targets) == (False, ["s1", "s2"], ["", ""])
    write_jsonl(path, [{"document": "s1", "summary": "t"}, {"document": "s2", "summary": None}])
    assert read(path, need_targets=False).targets == ["", ""]
    write_jsonl(path, ROWS)
    assert read(path, need_targets=False).fingerprint == read(path).fingerprint


def test_caps_stop_early(tmp_path):
    path = write_jsonl(tmp_path / "x.jsonl", [*({"source": f"s{i}", "target": "t"} for i in range(5)), "broken"])
    assert read(path, train_rows=3).sources == ["s0", "s1", "s2"]
    with pytest.raises(UserError, match="invalid JSON"):
        read(path, test_rows=3)
    assert read(path, "test", test_rows=1).head(5).ids == ["0"]


def _cut(path: Path) -> Path:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 2 // 3])
    return path


def test_damaged_files(tmp_path):
    many = [{"source": str(i) * 50, "target": hashlib.sha256(str(i).encode()).hexdigest()} for i in range(500)]
    with pytest.raises(UserError, match="damaged or cut short"):
        read(_cut(write_jsonl(tmp_path / "x.jsonl.gz", many)))
    (tmp_path / "y.jsonl.gz").write_text("plain text")
    with pytest.raises(UserError, match="damaged"):
        read(tmp_path / "y.jsonl.gz")
    with pytest.raises(UserError, match="not a whole Parquet file"):
        read(_cut(write_parquet(tmp_path / "x.parquet", many)))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="is empty"):
        read(tmp_path / "empty.jsonl")
    (tmp_path / "x.docx").write_text("?")
    with pytest.raises(UserError, match=r"x\.docx: unknown kind of file; known are \.jsonl"):
        read(tmp_path / "x.docx")
    with pytest.raises(UserError, match=r"no such file or folder; did you mean .*empty\.jsonl"):
        read(tmp_path / "emty.jsonl")
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="no train, validation or test file here"):
        read(tmp_path / "folder")
    with pytest.raises(UserError, match="folder/news: no such file or folder"):
        read(tmp_path / "folder/news")
    with pytest.raises(UserError, match="name is empty"):
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


def test_statistics_by_hand():
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


HUB_CODE = """
import json, sys
from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import read_corpus, split_names
for name, config, split in json.loads(sys.argv[1]):
    dataset = Dataset(name=name, config=config)
    try:
        c = read_corpus(dataset, split)
        print(json.dumps([split_names(dataset), c.ids, c.sources, c.targets]))
    except UserError as error:
        print(json.dumps(str(error)))
"""


def from_hub(cache: Path, asked: list) -> list:
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", HUB_CODE, json.dumps(asked)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_hub_data_sets_offline_from_the_cache(tmp_path):
    lay_out_dataset(tmp_path, "EdinburghNLP/xsum", None, {"train": ROWS, "test": ROWS[:1]}, "refs/convert/parquet")
    article = {"article": "s", "highlights": "t", "id": "x1"}
    lay_out_dataset(tmp_path, "abisee/cnn_dailymail", "3.0.0", {"validation": [article]})
    lay_out_dataset(tmp_path, "wmt/wmt16", "ro-en", {"test": [{"translation": {"ro": "doi", "en": "two"}}]})
    asked = [
        ("xsum", None, "train"),
        ("EdinburghNLP/xsum", None, "test"),
        ("cnn_dailymail", None, "validation"),
        ("wmt16_en_ro", None, "test"),
        ("xsum", None, "validation"),
        ("no/such", None, "train"),
        ("abisee/cnn_dailymail", "1.0.0", "train"),
    ]
    xsum, by_hub_name, cnn, wmt, no_split, unknown, no_config = from_hub(tmp_path, asked)
    assert xsum == [["train", "test"], ["a", "b", "c"], *([r[k] for r in ROWS] for k in ("document", "summary"))]
    assert by_hub_name[1:] == [["a"], [ROWS[0]["document"]], [ROWS[0]["summary"]]]
    assert cnn == [["validation"], ["x1"], ["s"], ["t"]]
    assert wmt == [["test"], ["0"], ["two"], ["doi"]]
    assert no_split.startswith("EdinburghNLP/xsum: cannot be loaded")
    assert "validation" in no_split
    assert "no/such: the Hugging Face hub cannot be reached and the data set is not in the cache" in unknown
    assert no_config.startswith("abisee/cnn_dailymail (1.0.0): cannot be loaded")
