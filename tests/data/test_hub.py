"""Data sets of the hub, read offline from the cache."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.factories.data_files import ROWS
from tests.factories.hub_cache import lay_out_dataset

READ_DATASETS = """
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


def read_in_subprocess(cache: Path, requests: list) -> list:
    env = {**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ_DATASETS, json.dumps(requests)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_data_sets_are_read_from_the_cache_without_network(tmp_path):
    lay_out_dataset(tmp_path, "EdinburghNLP/xsum", None, {"train": ROWS, "test": ROWS[:1]}, "refs/convert/parquet")
    article = {"article": "s", "highlights": "t", "id": "x1"}
    lay_out_dataset(tmp_path, "abisee/cnn_dailymail", "3.0.0", {"validation": [article]})
    lay_out_dataset(tmp_path, "wmt/wmt16", "ro-en", {"test": [{"translation": {"ro": "doi", "en": "two"}}]})
    requests = [
        ("xsum", None, "train"),
        ("EdinburghNLP/xsum", None, "test"),
        ("cnn_dailymail", None, "validation"),
        ("wmt16_en_ro", None, "test"),
        ("xsum", None, "validation"),
        ("no/such", None, "train"),
        ("abisee/cnn_dailymail", "1.0.0", "train"),
    ]
    xsum, by_hub_name, cnn, wmt, no_split, unknown, no_config = read_in_subprocess(tmp_path, requests)
    assert xsum == [["train", "test"], ["a", "b", "c"], *([r[k] for r in ROWS] for k in ("document", "summary"))]
    assert by_hub_name[1:] == [["a"], [ROWS[0]["document"]], [ROWS[0]["summary"]]]
    assert cnn == [["validation"], ["x1"], ["s"], ["t"]]
    assert wmt == [["test"], ["0"], ["two"], ["doi"]]
    assert no_split.startswith("EdinburghNLP/xsum: cannot be loaded")
    assert "validation" in no_split
    assert "no/such: the Hugging Face hub cannot be reached and the data set is not in the cache" in unknown
    assert no_config.startswith("abisee/cnn_dailymail (1.0.0): cannot be loaded")


READ_WITH_BLANK_ROWS = """
from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.data.corpus import read_corpus
from raydistill.data.streaming import scan_split, usable_rows
for name, rows in (("xsum", 2), ("wmt16_en_ro", None), ("EdinburghNLP/xsum", None)):
    dataset = Dataset(name=name, train_rows=rows)
    try:
        corpus, scan = read_corpus(dataset, "train"), scan_split(dataset, "train")
        streamed = [row.id for row in usable_rows(dataset, "train", scan)]
        print(corpus.ids, streamed, corpus.fingerprint == scan.fingerprint, scan.labelled)
    except UserError as error:
        print("error:", str(error).splitlines()[0])
"""


def test_blank_rows_of_named_data_sets_are_left_out_and_reported(tmp_path):
    """The hub's XSUM and WMT16 have rows without a text, which the paper's numbers of rows exclude."""
    blank = {"document": " \n", "summary": "a summary", "id": "blank"}
    lay_out_dataset(tmp_path, "EdinburghNLP/xsum", None, {"train": [ROWS[0], blank, *ROWS[1:]]}, "refs/convert/parquet")
    pairs = [("one", "unu"), ("two", ""), ("three", "trei")]
    translations = [{"translation": {"en": en, "ro": ro}} for en, ro in pairs]
    lay_out_dataset(tmp_path, "wmt/wmt16", "ro-en", {"train": translations})
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", READ_WITH_BLANK_ROWS]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    xsum, wmt, by_hub_name = done.stdout.splitlines()
    assert xsum == "['a', 'b'] ['a', 'b'] True True"  # the first two usable rows
    assert wmt == "['0', '2'] ['0', '2'] True True"
    assert by_hub_name.startswith("error: 1 rows that cannot be used")
    assert done.stderr.count("xsum: 1 row of the train split without a source or a target left out") == 1
    assert done.stderr.count("wmt16_en_ro: 1 row of the train split") == 1


READ_LINES = """
import json
from raydistill.config.run import Dataset
from raydistill.data.corpus import read_corpus
from raydistill.data.streaming import scan_split, usable_rows
for name, config in (("cnn_dailymail", None), ("abisee/cnn_dailymail", "3.0.0"), ("xsum", None)):
    dataset = Dataset(name=name, config=config)
    corpus, scan = read_corpus(dataset, "train"), scan_split(dataset, "train")
    streamed = [[row.source, row.target] for row in usable_rows(dataset, "train", scan)]
    assert corpus.fingerprint == scan.fingerprint
    assert streamed == [list(pair) for pair in zip(corpus.sources, corpus.targets)]
    print(json.dumps([*streamed[0], corpus.fingerprint]))
"""


def test_line_breaks_of_the_targets_of_cnn_dailymail_have_one_form(tmp_path):
    """Highlights of CNN/DailyMail are a line each. Other texts and data sets are read as they are."""
    highlights = "Daniel Radcliffe turns 18 Monday .\nYoung actor has no plans . \r\n\n NEW: Films to come ."
    article = {"article": "(CNN) -- He turns 18 .\nHe says so .", "highlights": highlights, "id": "x1"}
    lay_out_dataset(tmp_path, "abisee/cnn_dailymail", "3.0.0", {"train": [article]})
    document = {"document": "The full cost .\nRepair work\nis ongoing .", "summary": "Clean-up .", "id": "1"}
    lay_out_dataset(tmp_path, "EdinburghNLP/xsum", None, {"train": [document]}, "refs/convert/parquet")
    env = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", READ_LINES], env=env, capture_output=True, text=True, check=True)
    cnn, by_hub_name, xsum = map(json.loads, done.stdout.splitlines())
    lines = "Daniel Radcliffe turns 18 Monday .\nYoung actor has no plans .\nNEW: Films to come ."
    assert cnn[:2] == [article["article"], lines]
    assert by_hub_name[:2] == [article["article"], highlights]  # only named data sets are changed
    assert cnn[2] != by_hub_name[2]
    assert xsum[:2] == [document["document"], document["summary"]]
