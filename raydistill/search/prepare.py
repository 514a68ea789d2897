"""What a sweep's trials share, made once before the first: teacher's score, latency table, labels, teacher cache."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.corners import iter_corners
from raydistill.config.label_sources import parse_labels
from raydistill.config.run import Decoding, Run, parse_size
from raydistill.config.space import Space, make_run
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import read_json, write_json_atomic
from raydistill.core.paths import raydistill_home
from raydistill.evaluation.latency import warn_background_load
from raydistill.jobs.pseudolabel import LabelJob, pseudolabel
from raydistill.jobs.teacher_cache import (
    CacheRequest,
    build_teacher_cache,
    cache_group_key,
    resolve_auto_precision,
    resolve_cache_mode,
)
from raydistill.models.teacher import open_teacher
from raydistill.results.costs import total_pass_hours
from raydistill.search.shape_latency import time_shape
from raydistill.teacher_cache.policy import CacheMode
from raydistill.training.inputs import LabelFolders, RunInputs, input_paths, run_label_folders
from raydistill.training.run_folder import changed_inputs, write_row_statistics
from raydistill.training.teacher_scores import score_teacher
from raydistill.training.tokenized_data import input_fingerprints


@dataclass(frozen=True)
class PreparedCache:
    """The teacher cache of some runs: its root, what `auto` came to by group of runs, the device-hours they took.

    `computed` is what `precision: auto` came to. `stores` are device-hours by array of a store: another sweep may read
    the same ones.
    """

    root: Path | None = None
    modes: dict[str, CacheMode] = field(default_factory=dict)
    compute_dtype: str | None = None
    stores: dict[str, float] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders of the stores."""
        return tuple(sorted({self.root / store.partition("/")[0] for store in self.stores})) if self.root else ()

    def mode_for(self, run: Run) -> CacheMode:
        """What `teacher_cache: auto` means for a run."""
        return self.modes.get(cache_group_key(run), "off")


@dataclass(frozen=True)
class PreparedSweep:
    """Handed to every trial: plain paths and numbers.

    `shapes` are the costs of each shape with the teacher's own beams, `shapes_fewest_beams` with the fewest that a
    student may be served with: what no budget admits even so is not trained.
    """

    teacher: dict[str, Any]
    shape_costs: dict[str, dict[str, float]]
    shape_costs_fewest_beams: dict[str, dict[str, float]]
    labels: LabelFolders = field(default_factory=dict)
    cache: PreparedCache = PreparedCache()

    def inputs(self, run: Run, result_fields: dict[str, Any]) -> RunInputs:
        """What one trial needs of it."""
        costs = self.shape_costs.get(run.student.size or self.teacher["size"], {})
        return RunInputs(
            label_folders=run_label_folders(self.labels, run),
            cache_root=self.cache.root,
            cache_mode=self.cache.mode_for(run),
            compute_dtype=self.cache.compute_dtype,
            costs=costs,
            result_fields=result_fields,
            teacher_repetition=self.teacher.get("repetition"),
            store_folders=self.cache.places,
        )


def corner_runs(space: Space) -> list[Run]:
    """The runs that stand for the space: every corner, once each."""
    runs = {
        json.dumps(r.model_dump(mode="json")): r
        for r in (make_run(space, c, space.name) for c in iter_corners(space.run))
    }
    return list(runs.values())


def student_sizes(runs: list[Run], teacher_size: str) -> list[str]:
    """The shapes of the space, the teacher's own first, large to small."""
    sizes = {run.student.size or teacher_size for run in runs} | {teacher_size}
    return sorted(sizes, key=lambda size: (size != teacher_size, [-n for n in parse_size(size)]))


def prepare(space: Space, sweep: Path, device: str) -> PreparedSweep:
    """Make what is missing, each part once and kept: a second call finds it done."""
    runs = corner_runs(space)
    first = runs[0]
    teacher_file = sweep / "teacher.json"
    if teacher_file.is_file():
        teacher = read_json(teacher_file)
        check_unchanged(first, teacher, sweep)
    else:
        print_progress(f"teacher {first.teacher}: scoring it on validation and test")
        teacher = run_exclusive(score_teacher, first, device=device, input_paths=input_paths(first))
        write_row_statistics(sweep / "teacher_rows.npz", teacher.pop("scored"))
        write_json_atomic(teacher_file, teacher)
    metric = teacher["metric"]
    print_progress(
        f"teacher {first.teacher} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation"
    )
    sizes = student_sizes(runs, teacher["size"])
    print_progress(f"latency: timing {len(sizes)} shapes, one at a time, alone on the machine ({', '.join(sizes)})")
    beams = list(dict.fromkeys((teacher["beams"], min([teacher["beams"], *space.search.decoding.beams]))))
    table = raydistill_home() / "latency.json"
    anew = not (sweep / "trials").is_dir()  # the trials of a sweep are compared, so one measure holds for all
    timed = run_exclusive(
        time_shapes,
        first,
        sizes,
        teacher,
        beams,
        anew,
        device=device,
        input_paths=[table, *input_paths(first)],
        output_paths=[table],
    )
    warn_background_load(
        max(row.pop("others") for rows in timed.values() for row in rows), "the next sweep times them again"
    )
    base = timed[teacher["size"]][0]["latency_ms"]
    shapes = {size: {**rows[0], "speedup": base / rows[0]["latency_ms"]} for size, rows in timed.items()}
    for size in sizes:
        how = [f"{row['latency_ms']:8.1f} ms for 32 (beams: {n})" for n, row in zip(beams, timed[size], strict=True)]
        print_progress(f"  {size:>6}: {', '.join(how)}, {shapes[size]['params_m']:.2f} M parameters")
    epochs = space.search.trials * max(run.training.epochs for run in runs)
    record = sweep / "cache.json"
    computed = _resolve_compute_dtype(runs, device, record)
    labels, sets = _make_label_sets(runs, device)
    cache = _make_teacher_cache(runs, labels, device, record, epochs, computed)
    teacher = {**teacher, "costs": {k: v for k, v in shapes[teacher["size"]].items() if k != "speedup"}}
    teacher["passes"] = {"labels": sets, "cache": sum(cache.stores.values()), "stores": cache.stores}
    teacher["label_sets"] = describe_label_sets(runs, labels)
    teacher["teacher_gpu_hours"] = total_pass_hours(teacher["passes"])
    return PreparedSweep(teacher, shapes, {size: rows[-1] for size, rows in timed.items()}, labels, cache)


def check_unchanged(run: Run, teacher: dict[str, Any], sweep: Path) -> None:
    """UserError where teacher or data are no longer those that the sweep was begun with."""
    if changed := changed_inputs({"teacher": teacher["key"], "data": teacher["data"]}, input_fingerprints(run)):
        raise UserError(
            f"{sweep}: the {' and the '.join(changed)} changed since this sweep was begun; results of both are not "
            f"mixed: give the sweep another name (--set name=...), or delete the folder"
        )


def time_shapes(
    run: Run,
    sizes: list[str],
    teacher_record: dict[str, Any],
    beams: list[int],
    remeasure_noisy: bool,
    device: str,
    threads: int,
) -> dict[str, list[dict[str, float]]]:
    """Latency, parameters and memory of each shape with each number of beams; the cores that `others` kept busy.

    The shapes are untrained: their costs do not depend on the weights' values. `remeasure_noisy`: those that others
    disturbed are timed again.

    To be called `alone`, so that nothing else is timed with it. Kept in HOME/latency.json.
    """
    assert run.teacher is not None
    loaded = open_teacher(run.teacher, run.dataset)
    engine = run.evaluation.engine
    return {
        size: time_shape(loaded, size, teacher_record, beams, engine, device, threads, remeasure_noisy)
        for size in sizes
    }


def _resolve_compute_dtype(runs: list[Run], device: str, record_path: Path) -> str | None:
    """What `precision: auto` comes to on the workers; None where no run that reads the cache leaves it open.

    A worker is asked, since this machine may have no GPU; once per sweep, since the states' key hangs on it.
    """
    if not any(run.training.precision == "auto" for group in _group_runs(runs).values() for run in group):
        return None
    found = _read_cache_record(record_path)
    if "precision" not in found:
        found["precision"] = run_exclusive(resolve_auto_precision, device=device)
        write_json_atomic(record_path, found)
    return str(found["precision"])


def _make_label_sets(runs: list[Run], device: str) -> tuple[LabelFolders, dict[str, dict[str, float]]]:
    """By `label_key`: the label sets that teachers wrote, and the device-hours of every set that is trained on.

    A curated set counts as the whole one that it is made of: it cost no further pass.
    """
    from raydistill.label_sets.label_set import read_manifest

    made: LabelFolders = {}
    hours: dict[str, dict[str, float]] = {}
    for run in runs:
        if run.label_key in hours:
            continue
        parts = parse_labels(run.resolved_labels)
        made[run.label_key] = {p.spec: _make_label_set(run, p.other_teacher, device) for p in parts if p.is_pseudo}
        folders = [*made[run.label_key].values(), *[p.folder for p in parts if p.folder]]
        manifests = {folder: read_manifest(Path(folder)) for folder in folders}
        hours[run.label_key] = {
            manifest.source_label_set or Path(folder).name: manifest.device_hours
            for folder, manifest in manifests.items()
        }
    return made, hours


def describe_label_sets(runs: list[Run], label_folders: LabelFolders) -> dict[str, dict[str, Any]]:
    """By name what the manifests of all label sets trained on tell: teacher, rows, scores against the originals."""
    from raydistill.label_sets.label_set import read_manifest

    told = {}
    for run in runs:
        folders = [
            *label_folders[run.label_key].values(),
            *[p.folder for p in parse_labels(run.resolved_labels) if p.folder],
        ]
        for folder in folders:
            manifest = read_manifest(Path(folder))
            told[Path(folder).name] = {
                "teacher": manifest.teacher_name,
                "rows": manifest.rows,
                "quality": manifest.quality,
            }
    return told


def _make_label_set(run: Run, labeller: str | None, device: str) -> str:
    """The folder of the labels that the run's teacher writes, or `labeller`, which decodes as it does by itself."""
    teacher, decoding = (labeller, Decoding()) if labeller else (run.teacher, run.decoding)
    assert teacher is not None
    asked = run.evaluation
    job = LabelJob(teacher, run.dataset, decoding=decoding, engine=asked.engine, pseudo=run.pseudo, metric=asked.metric)
    return str(pseudolabel(job, raydistill_home() / "labels", device))


def _make_teacher_cache(
    runs: list[Run],
    labels: LabelFolders,
    device: str,
    record_path: Path,
    total_epochs: float,
    compute_dtype: str | None,
) -> PreparedCache:
    """The teacher cache that the runs share, made where it is missing; `total_epochs` are those of all trials.

    What was decided and why is written to the file `record_path` before the pass, and what it took after it: a sweep
    that is taken up again does not change its mind.
    """
    root = raydistill_home() / "cache"
    found = _read_cache_record(record_path)
    for name, group in _group_runs(runs).items():
        want = CacheRequest(group, labels, root, device, compute_dtype)
        if name not in found["groups"]:
            keep, why = resolve_cache_mode(want, total_epochs)
            found["groups"][name] = {"keep": keep, "why": why, "bytes": 0, "device_seconds": {}}
            write_json_atomic(record_path, found)
        cached = build_teacher_cache(want, found["groups"][name]["keep"])
        found["groups"][name] |= {"bytes": cached.bytes, "device_seconds": cached.device_seconds}
        write_json_atomic(record_path, found)
    groups = {name: found["groups"][name] for name in _group_runs(runs)}
    hours = {store: took / 3600 for kept in groups.values() for store, took in kept["device_seconds"].items()}
    return PreparedCache(root, {name: kept["keep"] for name, kept in groups.items()}, compute_dtype, hours)


def _read_cache_record(record_path: Path) -> dict[str, Any]:
    """What was decided and made so far."""
    return read_json(record_path) if record_path.is_file() else {"groups": {}}


def _group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that may read the same pass, by the group's name; those that turn it off are in none."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.teacher is not None and run.training.teacher_cache != "off":
            groups.setdefault(cache_group_key(run), []).append(run)
    return groups


def prepare_inputs(run: Run, device: str, folder: Path) -> RunInputs:
    """What a run outside a sweep needs: its label set and its teacher cache."""
    if run.teacher is None:
        return RunInputs()
    record = folder / "cache.json"
    computed = _resolve_compute_dtype([run], device, record)
    labels, _ = _make_label_sets([run], device)
    cache = _make_teacher_cache([run], labels, device, record, run.training.epochs, computed)
    return RunInputs(
        label_folders=run_label_folders(labels, run),
        cache_root=cache.root,
        cache_mode=cache.mode_for(run),
        compute_dtype=computed,
        store_folders=cache.places,
    )
