"""Small data files in every supported format."""

import gzip
import json
from pathlib import Path

GOOD = {"id": "g", "source": "good", "target": "fine"}

ROWS = [
    {"document": "Snow fell on the hills.", "summary": "Snow falls.", "id": "a"},
    {"document": "A dog, a cat;\nand “a horse”.", "summary": "Animals.", "id": "b"},
    {"document": "Ţara e mică.\u2028Da.", "summary": "O ţară.", "id": "c"},
]


def write_jsonl(path: Path, rows: list) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row, ensure_ascii=False)) + "\n" for row in rows)
    data = text.encode("utf-8", "surrogateescape")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_csv(path: Path, rows: list[dict], delimiter: str = ",") -> Path:
    def quoted(text: str) -> str:
        return '"' + text.replace('"', '""') + '"'

    lines = [delimiter.join(rows[0]), *(delimiter.join(map(quoted, row.values())) for row in rows)]
    data = ("\r\n".join(lines) + "\r\n").encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def write_json_array(path: Path, rows: list[dict]) -> Path:
    path.write_text("\n" + json.dumps(rows, indent=1))
    return path
