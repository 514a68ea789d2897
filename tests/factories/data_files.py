"""Small data files in every supported format."""

import gzip
import json
from pathlib import Path
from typing import Any

from raydistill.config.run import Dataset
from raydistill.data.corpus import Corpus, read_corpus

GOOD = {"id": "g", "source": "good", "target": "fine"}

ROWS = [
    {"document": "Snow fell on the hills.", "summary": "Snow falls.", "id": "a"},
    {"document": "A dog, a cat;\nand “a horse”.", "summary": "Animals.", "id": "b"},
    {"document": "Ţara e mică.\u2028Da.", "summary": "O ţară.", "id": "c"},
]


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    """Write one JSON value per line; strings are written without encoding. `.gz` files are compressed."""
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_csv(path: Path, rows: list[dict[str, str]], delimiter: str = ",") -> Path:
    """Write quoted fields with CRLF line ends. `.gz` files are compressed."""

    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(rows[0]), *(delimiter.join(map(quoted, row.values())) for row in rows)]
    data = ("\r\n".join(lines) + "\r\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write a Parquet file."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_json_array(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write an indented array after an empty line."""
    path.write_text("\n" + json.dumps(rows, indent=1))
    return path


def read(path: Path | str, split: str = "train", need_targets: bool = True, **settings: Any) -> Corpus:
    """Read a split of a file, folder or named data set; `settings` are further keys of `Dataset`."""
    return read_corpus(Dataset(name=str(path), **settings), split, need_targets=need_targets)


def rows_of(corpus: Corpus) -> list[dict[str, str]]:
    """The rows of a corpus in the form of `ROWS`."""
    return [
        {"document": source, "summary": target, "id": row_id}
        for row_id, source, target in zip(corpus.ids, corpus.sources, corpus.targets, strict=True)
    ]
