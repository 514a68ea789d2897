"""Pseudo-labels as a Ray Data job: the teacher's beam search over a split, in planned batches, each done once.

The plan is made first and kept: batches of neighbours in length, in Parquet. A batch is the unit of work and of
resume: its output file appears whole or not at all, and a job that is run again reads which are there.
"""

import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from filelock import FileLock

from raydistill.config.console import progress
from raydistill.config.errors import UserError
from raydistill.config.files import write_json_atomic
from raydistill.config.presets import metric_for, teacher_preset
from raydistill.config.run import Dataset, Decoding
from raydistill.data.corpus import Corpus, read_corpus, statistics
from raydistill.data.labels import is_finished, label_set_name, write_label_set

WINDOW_ROWS = 20_000
BATCH_ROWS = 64


@dataclass(frozen=True)
class Job:
    """What to label, by whom, how."""

    teacher: str
    dataset: Dataset
    split: str = "train"
    decoding: Decoding = field(default_factory=Decoding)
    engine: Literal["auto", "ctranslate2", "transformers"] = "auto"
    n_best: int = 1


def pseudolabel(job: Job, root: Path, device: str = "cpu", say: bool = True) -> Path:
    """Label every row of the split; returns the label set's folder under `root`. Finished work is not done again."""
    corpus = read_corpus(job.dataset, job.split, need_targets=False)
    about = describe_job(job, corpus)
    # Two engines, or one with other settings, do not always write the same text: they are part of the key.
    how = {**about["decoding"], "n_best": job.n_best, "engine": job.engine, "device": device}
    name = label_set_name(about["teacher"]["fingerprint"], corpus.fingerprint, how)
    folder = root / f"{_plain(job.dataset.name)}-{job.split}-{name}"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{folder.name}.lock"):
        return _finished_or_made(job, about, corpus, folder, device, say)


def _finished_or_made(job: Job, about: dict[str, Any], corpus: Corpus, folder: Path, device: str, say: bool) -> Path:
    """Go on with the label set in `folder`; the caller holds its lock."""
    if is_finished(folder):
        if say:
            progress(f"pseudo-labels: {len(corpus)} rows are there already: {folder}")
        return folder
    work = folder.with_name(f".{folder.name}.work")
    batches = plan_batches(corpus, work)
    missing = [n for n in range(batches) if not _output(work, n).is_file()]
    if say and len(missing) < batches:
        progress(f"pseudo-labels: going on; {batches - len(missing)} of {batches} batches are done")
    if missing:
        _label(job, about, work, missing, len(corpus), device, say)
    finish(corpus, work, folder, batches, about)
    return folder


def describe_job(job: Job, corpus: Corpus) -> dict[str, Any]:
    """Teacher, data and decoding as the manifest holds them, without loading the model."""
    from raydistill.model.generate import resolve_decoding
    from raydistill.model.teachers import fingerprint, load_config, load_generation_config, locate, max_tokens

    preset = teacher_preset(job.teacher, job.dataset.name)
    where = locate(job.teacher, job.dataset.name)
    config = load_config(where)
    target = max_tokens("max_target_tokens", job.dataset, preset, config)
    beam = resolve_decoding(job.decoding, load_generation_config(where), preset.decoding if preset else None, target)
    if job.n_best > beam.beams:
        raise UserError(
            f"{job.n_best} candidates per row need as many beams, and the teacher's are {beam.beams}: give --beams"
        )
    return {
        "teacher": {"name": job.teacher, "where": where, "fingerprint": fingerprint(where)},
        "data": {"name": job.dataset.name, "split": job.split, "fingerprint": corpus.fingerprint},
        "decoding": {
            **asdict(beam),
            "max_source_tokens": max_tokens("max_source_tokens", job.dataset, preset, config),
        },
        "languages": preset.languages if preset else None,
    }


def plan_batches(corpus: Corpus, work: Path) -> int:
    """Write the plan as Parquet rows (batch, ids, sources) unless it is there; returns how many batches there are.

    Rows are sorted by length within windows of fixed size, so memory stays bounded and padding low.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    done = work / "plan.json"
    if done.is_file():
        return int(json.loads(done.read_text())["batches"])
    shutil.rmtree(work, ignore_errors=True)
    (work / "out").mkdir(parents=True)
    (work / "plan").mkdir()
    count = 0
    for window in range(0, len(corpus), WINDOW_ROWS):
        rows = []
        order = sorted(
            range(window, min(window + WINDOW_ROWS, len(corpus))), key=lambda i: len(corpus.sources[i]), reverse=True
        )
        for start in range(0, len(order), BATCH_ROWS):
            part = order[start : start + BATCH_ROWS]
            rows.append(
                {"batch": count, "ids": [corpus.ids[i] for i in part], "sources": [corpus.sources[i] for i in part]}
            )
            count += 1
        # A row group per batch, so that an actor reads its batch and no more.
        pq.write_table(pa.Table.from_pylist(rows), _window(work, window // WINDOW_ROWS), row_group_size=1)
    write_json_atomic(done, {"batches": count, "rows": len(corpus)})
    return count


def read_batch(work: Path, number: int) -> tuple[list[str], list[str]]:
    """The ids and sources of a planned batch."""
    import pyarrow.parquet as pq

    per_window = -(-WINDOW_ROWS // BATCH_ROWS)
    file = pq.ParquetFile(_window(work, number // per_window))
    row = file.read_row_group(number % per_window).to_pylist()[0]
    assert row["batch"] == number
    return row["ids"], row["sources"]


def finish(corpus: Corpus, work: Path, folder: Path, batches: int, about: dict[str, Any]) -> None:
    """Put the batches' outputs in the corpus's order, check that every row is there once, write the label set."""
    import pyarrow.parquet as pq

    found: dict[str, list[tuple[str, float]]] = {}
    seconds = 0.0
    engine = ""
    for n in range(batches):
        for row in pq.read_table(_output(work, n)).to_pylist():
            if row["id"] in found:
                raise UserError(f"{work}: row {row['id']!r} was labelled twice; delete the folder and run again")
            found[row["id"]] = list(zip(row["targets"], row["scores"], strict=True))
            seconds += row["seconds"]
            engine = row["engine"]
    missing = [row_id for row_id in corpus.ids if row_id not in found]
    if missing or len(found) != len(corpus):
        raise UserError(f"{work}: {len(missing)} rows have no label; delete the folder and run again")

    def rows() -> Iterator[dict[str, Any]]:
        for row_id in corpus.ids:
            for rank, (target, score) in enumerate(found[row_id]):
                yield {"id": row_id, "target": target, "rank": rank, "score": score}

    best = [found[row_id][0][0] for row_id in corpus.ids]
    manifest = {
        **about,
        "rows": len(corpus),
        "empty": sum(not text.strip() for text in best),
        "engine": engine,
        "device_hours": seconds / 3600,
        "quality": _quality(corpus, best),
        "target_words_mean": float(np.mean([len(text.split()) for text in best])),
        "original_words_mean": statistics(corpus).get("target_words_mean"),
    }
    write_label_set(folder, rows(), manifest)
    shutil.rmtree(work, ignore_errors=True)


class Labeller:
    """One teacher on one device or CPU share: an actor that labels whole planned batches."""

    def __init__(self, job: Job, about: dict[str, Any], work: str, device: str, threads: int) -> None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
        from raydistill.model.generate import Beam, open_engine

        self.engine = open_engine(
            about["teacher"]["where"],
            job.engine,
            device=device,
            threads=threads,
            languages=about["languages"],
            cache=Path(work).parent / ".engines",
        )
        limits = dict(about["decoding"])
        self.max_source_tokens = limits.pop("max_source_tokens")
        self.beam = Beam(**limits)
        self.work = Path(work)
        self.n_best = job.n_best

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Label one planned batch, write its file, and tell how long it took."""
        numbers, rows, seconds = [], [], []
        for number in map(int, batch["batch"]):
            ids, sources = read_batch(self.work, number)
            started = time.monotonic()
            found = self.engine.generate(
                sources, self.beam, max_source_tokens=self.max_source_tokens, n_best=self.n_best
            )
            took = time.monotonic() - started
            self._write(number, ids, found, took)
            numbers.append(number)
            rows.append(len(found))
            seconds.append(took)
        return {"batch": np.array(numbers), "rows": np.array(rows), "seconds": np.array(seconds)}

    def _write(self, number: int, ids: list[str], found: list[Any], took: float) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "id": row_id,
                "targets": [h.text.strip() for h in hypotheses],
                "scores": [float(h.score) for h in hypotheses],
                "seconds": took / len(ids),
                "engine": f"{self.engine.name} {self.engine.precision}",
            }
            for row_id, hypotheses in zip(ids, found, strict=True)
        ]
        path = _output(self.work, number)
        making = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(pa.Table.from_pylist(rows), making)
        os.replace(making, path)


def _label(job: Job, about: dict[str, Any], work: Path, missing: list[int], total: int, device: str, say: bool) -> None:
    """Run the missing batches through one actor per GPU, or per CPU, and tell how far it is."""
    import ray

    actors = max(1, int(ray.cluster_resources().get("GPU" if device == "cuda" else "CPU", 1)))
    actors = min(actors, len(missing))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.verbose_stats_logs = False
    resources: dict[str, Any] = {"num_gpus": 1, "num_cpus": 1} if device == "cuda" else {"num_cpus": 1}

    # Only batch numbers travel through Ray: each actor reads its batches from the plan and writes their files itself.
    class Bound(Labeller):
        # Arguments would go through the object store, from which a restarted actor may no longer get them.
        def __init__(self) -> None:
            super().__init__(job, about, str(work), device, 1)

    dataset = ray.data.from_items([{"batch": n} for n in missing], override_num_blocks=len(missing)).map_batches(
        Bound,
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(size=actors),
        **resources,
    )
    wanted = set(missing)
    done = total - _rows_of(work, wanted)
    begin_rows, started, last = done, time.monotonic(), 0.0
    if say:
        progress(f"pseudo-labels: {total - done} rows to label, {actors} teachers at work")
    for row in dataset.iter_rows():
        done += int(row["rows"])
        now = time.monotonic()
        if say and (now - last > 5 or done == total):
            rate = (done - begin_rows) / (now - started)
            left = (total - done) / rate if rate else 0
            progress(f"  {done}/{total} rows, {rate:.0f} rows/s, {left:.0f} s left")
            last = now


def _rows_of(work: Path, batches: set[int]) -> int:
    import pyarrow.parquet as pq

    plan = pq.read_table(work / "plan", columns=["batch", "ids"])
    pairs = zip(plan["batch"].to_pylist(), plan["ids"].to_pylist(), strict=True)
    return sum(len(ids) for n, ids in pairs if n in batches)


def _quality(corpus: Corpus, best: list[str]) -> dict[str, float] | None:
    """Scores of the labels against the originals, where there are originals: the paper's measure of their quality."""
    if not corpus.labelled:
        return None
    from raydistill.evaluation.scores import score

    return score(metric_for(corpus.name), best, corpus.targets).metrics


def _output(work: Path, number: int) -> Path:
    return work / "out" / f"batch-{number:06d}.parquet"


def _window(work: Path, number: int) -> Path:
    return work / "plan" / f"window-{number:05d}.parquet"


def _plain(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in Path(name).name)
