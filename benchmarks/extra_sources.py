"""Data for the comparison of few originals with extra sources against all originals (docs/labels.md).

    python -m benchmarks.extra_sources --data ../shared/data/multi30k_en_de --output outputs/extra_benchmark
    raydistill sweep benchmarks/spaces/extra_multi30k.yaml
    raydistill sweep benchmarks/spaces/all_originals_multi30k.yaml

The script writes a data set with a share of the training rows, and the sources of the other training rows as extra
sources; validation and test split are copied. Compare the test scores of the two sweeps. The teacher has probably seen
all of these rows; sources that no model has seen are the harder test.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from raydistill.config.run import Dataset
from raydistill.core.files import write_atomic
from raydistill.core.hashing import hash_fraction
from raydistill.data.corpus import read_corpus


def divide(data: str, output: Path, share: float) -> dict[str, int]:
    """Write OUTPUT/data with a share of the training rows, chosen by a hash of the source, and OUTPUT/more.jsonl.

    Returns:
        The numbers of rows by file.
    """
    counts = {}
    for split in ("train", "validation", "test"):
        corpus = read_corpus(Dataset(name=data), split)
        rows = list(zip(corpus.ids, corpus.sources, corpus.targets, strict=True))
        kept = [split != "train" or hash_fraction(source) < share for _, source, _ in rows]
        pairs = ({"id": i, "source": s, "target": t} for (i, s, t), keep in zip(rows, kept, strict=True) if keep)
        counts[split] = _write_lines(output / "data" / f"{split}.jsonl", pairs)
        if split == "train":
            rest = ({"id": i, "source": s} for (i, s, _), keep in zip(rows, kept, strict=True) if not keep)
            counts["more"] = _write_lines(output / "more.jsonl", rest)
    return counts


def _write_lines(path: Path, rows: Iterable[dict[str, str]]) -> int:
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, "".join(f"{line}\n" for line in lines).encode())
    return len(lines)


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="a folder or a named data set")
    parser.add_argument("--output", type=Path, default=Path("outputs/extra_benchmark"))
    parser.add_argument("--share", type=float, default=0.3, help="share of the training rows that keep their targets")
    arguments = parser.parse_args()
    print(divide(arguments.data, arguments.output, arguments.share))


if __name__ == "__main__":
    main()
