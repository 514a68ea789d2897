"""Few originals with extra sources, labelled by the teacher, compared with all originals (docs/labels.md).

    python -m benchmarks.extra_sources --data ../shared/data/multi30k_en_de --output outputs/extra_benchmark
    raydistill sweep benchmarks/spaces/extra_multi30k.yaml
    raydistill sweep benchmarks/spaces/all_originals_multi30k.yaml
    python -m benchmarks.extra_sources --join extra_multi30k all_originals_multi30k

The first command writes a data set with a share of the training rows, and the sources of the other training rows as
extra sources; validation and test split are copied. The last command joins both sweeps in one table of test scores with
their seeds. All sides have equal students, seeds, steps and numbers of validations. The teacher has probably seen all
of these rows; sources that no model has seen are the harder test.
"""

import argparse
import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from benchmarks.common import BenchmarkResult, describe_machine
from raydistill.config.run import Dataset
from raydistill.core.files import write_atomic
from raydistill.core.hashing import hash_fraction
from raydistill.data.corpus import read_corpus
from raydistill.evaluation.metrics import Comparison, compare_with_reference
from raydistill.results.records import Trial, find_sweep, read_trials
from raydistill.results.tables import markdown_table

METRIC = "bleu"
EXTRA_ROWS = "pseudo.extra_rows"
LABELS, EXTRA, ORIGINALS = "few originals' sources, labelled", "the same and extra sources", "all originals, SFT"


@dataclass(frozen=True)
class SideScores:
    """Test scores of one side of the comparison.

    Attributes:
        name: What the students were trained on.
        scores: Test scores by seed.
        steps: Optimiser steps of each run.
        validations: Validations of each run.
        difference: Mean score minus the mean score of all originals, with an interval over seeds and test rows; None
            for all originals.
    """

    name: str
    scores: dict[int, float]
    steps: list[int]
    validations: list[int]
    difference: Comparison | None = None


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


def group_trials(extra: list[Trial], originals: list[Trial]) -> dict[str, list[Trial]]:
    """The trials of both sweeps by side, each side in the order of its seeds.

    Raises:
        SystemExit: A trial is not finished, or the sides have different seeds.
    """
    unfinished = [trial.key for trial in [*extra, *originals] if trial.status != "done"]
    if unfinished:
        raise SystemExit(f"not finished: {', '.join(unfinished)}")
    sides = {
        LABELS: [trial for trial in extra if trial.params[EXTRA_ROWS] == 0],
        EXTRA: [trial for trial in extra if trial.params[EXTRA_ROWS] is None],
        ORIGINALS: originals,
    }
    sides = {name: sorted(trials, key=lambda trial: trial.seed) for name, trials in sides.items()}
    seeds = {name: [trial.seed for trial in trials] for name, trials in sides.items()}
    if any(of_side != seeds[ORIGINALS] for of_side in seeds.values()):
        raise SystemExit(f"the sides have different seeds: {seeds}")
    return sides


def score_sides(sides: dict[str, list[Trial]]) -> list[SideScores]:
    """The test scores of each side, and the differences to all originals."""
    rows = {name: [_test_rows(trial) for trial in trials] for name, trials in sides.items()}
    names = [LABELS, EXTRA]
    differences = compare_with_reference(METRIC, [rows[name] for name in names], rows[ORIGINALS])
    by_name = dict(zip(names, differences, strict=True))
    return [
        SideScores(
            name,
            {trial.seed: float((trial.test or {})[METRIC]) for trial in trials},
            [trial.steps for trial in trials],
            [len(trial.history()) for trial in trials],
            by_name.get(name),
        )
        for name, trials in sides.items()
    ]


def _test_rows(trial: Trial) -> np.ndarray:
    rows = trial.row_statistics("test")
    if rows is None:
        raise SystemExit(f"{trial.key}: has no scores of the test rows")
    return rows


def as_markdown(sides: list[SideScores]) -> str:
    """A table with a row per side, and a warning where the sides differ in steps or validations."""
    header = ["trained on", "steps", "validations", *(f"seed {seed}" for seed in sides[0].scores), "mean"]
    table = markdown_table([*header, "minus all originals"], [_table_row(side) for side in sides])
    text = f"BLEU on the test rows. Differences with 95 % intervals over test rows and seeds.\n\n{table}"
    efforts = {(steps, checks) for side in sides for steps, checks in zip(side.steps, side.validations, strict=True)}
    if len(efforts) > 1:
        text += "\n\nThe comparison is unfair: runs have different numbers of steps or of validations."
    return text


def _table_row(side: SideScores) -> list[str]:
    scores = list(side.scores.values())
    difference = side.difference
    return [
        side.name,
        *("/".join(map(str, sorted(set(numbers)))) for numbers in (side.steps, side.validations)),
        *(f"{score:.2f}" for score in [*scores, statistics.mean(scores)]),
        f"{difference.difference:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]" if difference else "",
    ]


def join(extra: str, originals: str) -> None:
    """Write benchmarks/results/extra_sources.md from the two sweeps, given by name or folder."""
    sides = score_sides(group_trials(*(read_trials(find_sweep(sweep)) for sweep in (extra, originals))))
    markdown = as_markdown(sides)
    print(markdown)
    title = "Few originals and extra sources, compared with all originals"
    data = [asdict(side) for side in sides]
    print(BenchmarkResult("extra_sources", title, markdown, data, describe_machine()).write())


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", help="a folder or a named data set, to be divided")
    parser.add_argument("--output", type=Path, default=Path("outputs/extra_benchmark"))
    parser.add_argument("--share", type=float, default=0.3, help="share of the training rows that keep their targets")
    parser.add_argument("--join", nargs=2, metavar=("EXTRA", "ORIGINALS"), help="finished sweeps, by name or folder")
    arguments = parser.parse_args()
    if arguments.join:
        join(*arguments.join)
    elif arguments.data:
        print(divide(arguments.data, arguments.output, arguments.share))
    else:
        parser.error("--data or --join is required")


if __name__ == "__main__":
    main()
