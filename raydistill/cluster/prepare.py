"""What a sweep's trials share, made once before the first: teacher's score, latency table, labels, teacher cache."""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.cluster.shapes import time_shape
from raydistill.config.console import home, progress
from raydistill.config.errors import UserError
from raydistill.config.files import write_json_atomic
from raydistill.config.run import Run, parse_size
from raydistill.config.space import Space, corners, resolve
from raydistill.results.records import read_json
from raydistill.training.material import open_teacher
from raydistill.training.run import Inputs, fill_cache, score_teacher

TIMED = ("latency_ms", "latency_ms_b1", "params_m", "memory_mb")


@dataclass(frozen=True)
class Prepared:
    """Handed to every trial: plain paths and numbers."""

    teacher: dict[str, Any]
    shapes: dict[str, dict[str, float]]
    labels: dict[str, str] = field(default_factory=dict)
    cache: str | None = None

    def inputs(self, run: Run, note: dict[str, Any]) -> Inputs:
        """What one trial needs of it."""
        costs = self.shapes.get(run.student.size or self.teacher["size"], {})
        labels = self.labels.get(run.label_key)
        return Inputs(
            labels=Path(labels) if labels else None,
            cache=Path(self.cache) if self.cache else None,
            costs=costs,
            note=note,
            repetition=self.teacher.get("repetition"),
        )


def runs_of(space: Space) -> list[Run]:
    """The runs that stand for the space: every corner, once each."""
    runs = {
        json.dumps(r.model_dump(mode="json")): r for r in (resolve(space, c, space.name) for c in corners(space.run))
    }
    return list(runs.values())


def sizes_of(runs: list[Run], teacher_size: str) -> list[str]:
    """The shapes of the space, the teacher's own first, large to small."""
    sizes = {run.student.size or teacher_size for run in runs} | {teacher_size}
    return sorted(sizes, key=lambda size: (size != teacher_size, [-n for n in parse_size(size)]))


def prepare(space: Space, sweep: Path, device: str) -> Prepared:
    """Make what is missing, each part once and kept: a second call finds it done."""
    runs = runs_of(space)
    first = runs[0]
    teacher_file = sweep / "teacher.json"
    if teacher_file.is_file():
        teacher = read_json(teacher_file)
        check_unchanged(first, teacher, sweep)
    else:
        progress(f"teacher {first.teacher}: scoring it on validation and test")
        teacher = alone(score_teacher, first, device=device)
        write_json_atomic(teacher_file, teacher)
    metric = teacher["metric"]
    progress(f"teacher {first.teacher} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation")
    sizes = sizes_of(runs, teacher["size"])
    progress(f"latency: timing {len(sizes)} shapes, one at a time, alone on the machine ({', '.join(sizes)})")
    shapes = alone(time_shapes, first, sizes, teacher, device=device)
    base = shapes[teacher["size"]]["latency_ms"]
    shapes = {size: {**row, "speedup": base / row["latency_ms"]} for size, row in shapes.items()}
    for size in sizes:
        progress(
            f"  {size:>6}: {shapes[size]['latency_ms']:8.1f} ms for 32, {shapes[size]['params_m']:.2f} M parameters"
        )
    labels, label_hours = _labels(runs, device)
    cache, cache_hours = _cache(runs, labels, device, sweep)
    teacher = {**teacher, "costs": {k: shapes[teacher["size"]][k] for k in TIMED}}
    teacher["teacher_gpu_hours"] = label_hours + cache_hours
    return Prepared(teacher, shapes, labels, cache)


def check_unchanged(run: Run, teacher: dict[str, Any], sweep: Path) -> None:
    """UserError where teacher or data are no longer those that the sweep was begun with."""
    from raydistill.data.corpus import read_corpus
    from raydistill.model.teachers import fingerprint, locate

    assert run.teacher is not None
    changed = ["teacher"] if fingerprint(locate(run.teacher, run.dataset.name)) != teacher["key"] else []
    for split, mark in teacher["data"].items():
        if read_corpus(run.dataset, split).fingerprint != mark:
            changed.append(f"{split} split")
    if changed:
        raise UserError(
            f"{sweep}: the {' and the '.join(changed)} changed since this sweep was begun; results of both are not "
            f"mixed: give the sweep another name (--set name=...), or delete the folder"
        )


def time_shapes(
    run: Run, sizes: list[str], teacher: dict[str, Any], device: str, threads: int
) -> dict[str, dict[str, float]]:
    """Latency, parameters and memory of each shape, untrained: they do not depend on the weights' values.

    To be called `alone`, so that nothing else is timed with it. Kept in HOME/latency.json.
    """
    assert run.teacher is not None
    loaded = open_teacher(run.teacher, run.dataset.name)
    return {size: time_shape(loaded, size, teacher, run.evaluation.engine, device, threads) for size in sizes}


def _labels(runs: list[Run], device: str) -> tuple[dict[str, str], float]:
    """Label sets that any run trains on, by `label_key`, and the device-hours that they took."""
    from raydistill.cluster.pseudolabel import Job, pseudolabel
    from raydistill.data.labels import read_manifest

    made: dict[str, str] = {}
    hours: dict[str, float] = {}  # by the whole set: several curated ones of it cost no further pass
    for run in runs:
        source = run.label_source
        if source == "original" or run.label_key in made:
            continue
        if source in ("pseudo", "original+pseudo"):
            assert run.teacher is not None
            job = Job(run.teacher, run.dataset, decoding=run.decoding, engine=run.evaluation.engine, pseudo=run.pseudo)
            folder = pseudolabel(job, home() / "labels", device)
        else:
            folder = Path(source)
        made[run.label_key] = str(folder)
        manifest = read_manifest(folder)
        hours[manifest.get("of", folder.name)] = float(manifest.get("device_hours", 0.0))
    return made, sum(hours.values())


def _cache(runs: list[Run], labels: dict[str, str], device: str, sweep: Path) -> tuple[str | None, float]:
    """The teacher cache that the runs share, if any wants it, and the device-hours that it took."""
    root = home() / "cache"
    wanting = {_cache_need(run): run for run in runs if run.training.teacher_cache != "off"}
    if not wanting:
        return None, 0.0
    kept = sweep / "cache.json"
    seconds = float(read_json(kept)["device_seconds"]) if kept.is_file() else 0.0
    total = 0
    for run in wanting.values():
        source = labels.get(run.label_key)
        inputs = Inputs(labels=Path(source) if source else None, cache=root)
        size, took = alone(timed_fill, run, inputs, device=device)
        seconds += took
        total = max(total, size)
        write_json_atomic(kept, {"device_seconds": seconds, "bytes": total})
    progress(f"teacher cache: {total / 1e6:.0f} MB at most for a run, under {root}")
    return str(root), seconds / 3600


def _cache_need(run: Run) -> str:
    """What decides the parts of the teacher cache that a run reads."""
    student, training = run.student, run.training
    parts = (run.method == "kd", run.label_key, student.size, student.supervised, student.copied.encoder)
    return str((*parts, training.freeze_encoder, training.freeze_embeddings, run.loss.alpha_hidden > 0))


def timed_fill(run: Run, inputs: Inputs, device: str, threads: int) -> tuple[int, float]:
    """`fill_cache`, and the device-seconds that it took."""
    started = time.monotonic()
    size = fill_cache(run, inputs, device)
    return size, (time.monotonic() - started) * (1 if device == "cuda" else threads)


def alone(work: Callable[..., Any], *arguments: Any, device: str) -> Any:
    """`work(*arguments, device, threads)` as a Ray task that leaves no room for anything else on its machine."""
    import ray

    from raydistill.cluster.start import cpus_of_a_node

    cpus = 1 if device == "cuda" else cpus_of_a_node()
    resources: dict[str, Any] = {"num_cpus": cpus, "num_gpus": 1 if device == "cuda" else 0}
    task = ray.remote(**resources)(_with_threads)
    return ray.get(task.remote(work, arguments, device, cpus))


def _with_threads(work: Callable[..., Any], arguments: tuple[Any, ...], device: str, threads: int) -> Any:
    import torch

    torch.set_num_threads(threads)
    return work(*arguments, device, threads)


def inputs_for(run: Run, device: str) -> Inputs:
    """What a run outside a sweep needs: its label set and its teacher cache."""
    if run.teacher is None:
        return Inputs()
    labels, _ = _labels([run], device)
    folder = labels.get(run.label_key)
    cache = home() / "cache" if run.training.teacher_cache != "off" else None
    return Inputs(labels=Path(folder) if folder else None, cache=cache)
