"""Label sets: what teachers wrote for the sources of a corpus, kept apart from the corpus and never mixed up."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from raydistill.config.errors import UserError

MANIFEST = "manifest.json"
PART_ROWS = 50_000
COLUMNS = ("id", "target", "rank")  # what training reads


@dataclass(frozen=True)
class LabelSet:
    """A finished label set: `targets` by row id (the best candidate, rank 0) and its manifest."""

    folder: Path
    manifest: dict[str, Any]
    targets: dict[str, str]

    @property
    def fingerprint(self) -> str:
        """Short sha256 of what students would be trained on."""
        digest = hashlib.sha256()
        for key in sorted(self.targets):
            digest.update(f"{key}\0{self.targets[key]}\0".encode())
        return digest.hexdigest()[:16]


def label_set_name(teacher: str, data: str, decoding: dict[str, Any]) -> str:
    """The folder name of a label set: another teacher, input or decoding is another label set."""
    text = json.dumps({"teacher": teacher, "data": data, "decoding": decoding}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_label_set(folder: Path, rows: Iterable[dict[str, Any]], manifest: dict[str, Any]) -> None:
    """Write rows (id, target, rank, score) as Parquet parts and then the manifest: whole or not at all."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("id", pa.string()), ("target", pa.string()), ("rank", pa.int32()), ("score", pa.float64())])
    making = folder.with_name(f".{folder.name}.{os.getpid()}.making")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    try:
        listed = list(rows)
        for part, start in enumerate(range(0, len(listed), PART_ROWS)):
            table = pa.Table.from_pylist(listed[start : start + PART_ROWS], schema=schema)
            pq.write_table(table, making / f"part-{part:05d}.parquet")
        (making / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        making.rename(folder)
    finally:
        shutil.rmtree(making, ignore_errors=True)


def is_finished(folder: Path) -> bool:
    """A label set is there as soon as its manifest is."""
    return (folder / MANIFEST).is_file()


def read_label_set(folder: Path) -> LabelSet:
    """Read a finished label set; UserError where it is missing, unfinished or damaged."""
    import pyarrow.parquet as pq

    if not is_finished(folder):
        raise UserError(
            f"{folder}: no finished label set here (no {MANIFEST}); make one with `raydistill pseudolabel`, "
            f"or run its command again to finish it"
        )
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        count = manifest["rows"]
        parts = [pq.read_table(part, columns=list(COLUMNS)) for part in sorted(folder.glob("part-*.parquet"))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: the label set is damaged ({error}); delete the folder and make it again") from None
    rows = (row for part in parts for row in zip(*(part.column(c).to_pylist() for c in COLUMNS), strict=True))
    targets = {row_id: target for row_id, target, rank in rows if rank == 0}
    if len(targets) != count:
        raise UserError(
            f"{folder}: the manifest counts {count} rows but the parts hold {len(targets)}; "
            f"delete the folder and make it again"
        )
    return LabelSet(folder, manifest, targets)


def choose_targets(
    ids: list[str], originals: list[str], labels: str, pseudo: LabelSet | None
) -> tuple[list[int], list[str]]:
    """Row numbers and targets of the training examples for original, pseudo or original+pseudo labels.

    A row whose pseudo-label is empty is left out of the pseudo part.
    """
    kinds = {"original": ["original"], "original+pseudo": ["original", "pseudo"]}.get(labels, ["pseudo"])
    rows: list[int] = []
    targets: list[str] = []
    for kind in kinds:
        if kind == "original":
            rows += range(len(ids))
            targets += originals
            continue
        if pseudo is None:
            raise UserError(f"labels {labels!r} need a label set; make one with `raydistill pseudolabel`")
        missing = [row_id for row_id in ids if row_id not in pseudo.targets]
        if missing:
            raise UserError(
                f"{pseudo.folder}: {len(missing)} of {len(ids)} training rows have no pseudo-label "
                f"(first: {missing[0]!r}); it was made for other data: make one for this data set with "
                f"`raydistill pseudolabel`"
            )
        kept = [i for i, row_id in enumerate(ids) if pseudo.targets[row_id].strip()]
        if not kept:
            raise UserError(f"{pseudo.folder}: every pseudo-label is empty; look at the teacher's decoding")
        rows += kept
        targets += [pseudo.targets[ids[i]] for i in kept]
    return rows, targets
