"""What a sweep's trials share, made once before the first: teacher's score, latency table, labels, teacher cache."""

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from raydistill.cluster.exclusive import alone, tell_of_others
from raydistill.config.run import Decoding, Run, parse_labels, parse_size
from raydistill.config.space import Space, corners, resolve
from raydistill.core.console import home, progress
from raydistill.core.errors import UserError
from raydistill.core.files import read_json, write_json_atomic
from raydistill.jobs.pseudolabel import Also, Job, pseudolabel
from raydistill.jobs.teacher_cache import Want, auto_precision, decide, encoder_beside, group_of, teacher_pass
from raydistill.results.costs import pass_hours
from raydistill.search.shape_latency import time_shape
from raydistill.teacher_cache.policy import Keep
from raydistill.training.inputs import Inputs, MadeLabels, folders_of, read_by
from raydistill.training.run import score_teacher
from raydistill.training.run_folder import changes, write_rows
from raydistill.training.tokenized_data import open_teacher, origin_of


@dataclass(frozen=True)
class Cache:
    """The teacher cache of some runs: its root, what `auto` came to by group of runs, the device-hours they took.

    `computed` is what `precision: auto` came to. `stores` are device-hours by array of a store: another sweep may read
    the same ones.
    """

    root: Path | None = None
    keeps: dict[str, Keep] = field(default_factory=dict)
    computed: str | None = None
    stores: dict[str, float] = field(default_factory=dict)

    @property
    def places(self) -> tuple[Path, ...]:
        """The folders of the stores."""
        return tuple(sorted({self.root / store.partition("/")[0] for store in self.stores})) if self.root else ()

    def keep_of(self, run: Run) -> Keep:
        """What `teacher_cache: auto` means for a run."""
        return self.keeps.get(group_of(run), "off")


@dataclass(frozen=True)
class Prepared:
    """Handed to every trial: plain paths and numbers.

    `shapes` are the costs of each shape with the teacher's own beams, `shapes_fewest_beams` with the fewest that a
    student may be served with: what no budget admits even so is not trained.
    """

    teacher: dict[str, Any]
    shapes: dict[str, dict[str, float]]
    shapes_fewest_beams: dict[str, dict[str, float]]
    labels: MadeLabels = field(default_factory=dict)
    cache: Cache = Cache()

    def inputs(self, run: Run, note: dict[str, Any]) -> Inputs:
        """What one trial needs of it."""
        costs = self.shapes.get(run.student.size or self.teacher["size"], {})
        return Inputs(
            labels=folders_of(self.labels, run),
            cache=self.cache.root,
            keep=self.cache.keep_of(run),
            computed=self.cache.computed,
            costs=costs,
            note=note,
            repetition=self.teacher.get("repetition"),
            stores=self.cache.places,
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
        teacher = alone(score_teacher, first, device=device, reads=read_by(first))
        write_rows(sweep / "teacher_rows.npz", teacher.pop("scored"))
        write_json_atomic(teacher_file, teacher)
    metric = teacher["metric"]
    progress(f"teacher {first.teacher} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation")
    sizes = sizes_of(runs, teacher["size"])
    progress(f"latency: timing {len(sizes)} shapes, one at a time, alone on the machine ({', '.join(sizes)})")
    beams = list(dict.fromkeys((teacher["beams"], min([teacher["beams"], *space.search.decoding.beams]))))
    table = home() / "latency.json"
    anew = not (sweep / "trials").is_dir()  # the trials of a sweep are compared, so one measure holds for all
    timed = alone(
        time_shapes, first, sizes, teacher, beams, anew, device=device, reads=[table, *read_by(first)], writes=[table]
    )
    tell_of_others(max(row.pop("others") for rows in timed.values() for row in rows), "the next sweep times them again")
    base = timed[teacher["size"]][0]["latency_ms"]
    shapes = {size: {**rows[0], "speedup": base / rows[0]["latency_ms"]} for size, rows in timed.items()}
    for size in sizes:
        how = [f"{row['latency_ms']:8.1f} ms for 32 (beams: {n})" for n, row in zip(beams, timed[size], strict=True)]
        progress(f"  {size:>6}: {', '.join(how)}, {shapes[size]['params_m']:.2f} M parameters")
    epochs = space.search.trials * max(run.training.epochs for run in runs)
    record = sweep / "cache.json"
    computed = _computed(runs, device, record)
    labels, sets = _labels(runs, device, epochs, computed)
    cache = _cache(runs, labels, device, record, epochs, computed)
    teacher = {**teacher, "costs": {k: v for k, v in shapes[teacher["size"]].items() if k != "speedup"}}
    teacher["passes"] = {"labels": sets, "cache": sum(cache.stores.values()), "stores": cache.stores}
    teacher["label_sets"] = label_sets(runs, labels)
    teacher["teacher_gpu_hours"] = pass_hours(teacher["passes"])
    return Prepared(teacher, shapes, {size: rows[-1] for size, rows in timed.items()}, labels, cache)


def check_unchanged(run: Run, teacher: dict[str, Any], sweep: Path) -> None:
    """UserError where teacher or data are no longer those that the sweep was begun with."""
    if changed := changes({"teacher": teacher["key"], "data": teacher["data"]}, origin_of(run)):
        raise UserError(
            f"{sweep}: the {' and the '.join(changed)} changed since this sweep was begun; results of both are not "
            f"mixed: give the sweep another name (--set name=...), or delete the folder"
        )


def time_shapes(
    run: Run, sizes: list[str], teacher: dict[str, Any], beams: list[int], anew: bool, device: str, threads: int
) -> dict[str, list[dict[str, float]]]:
    """Latency, parameters and memory of each shape with each number of beams; the cores that `others` kept busy.

    The shapes are untrained: their costs do not depend on the weights' values. `anew`: those that others disturbed are
    timed again.

    To be called `alone`, so that nothing else is timed with it. Kept in HOME/latency.json.
    """
    assert run.teacher is not None
    loaded = open_teacher(run.teacher, run.dataset)
    engine = run.evaluation.engine
    return {size: time_shape(loaded, size, teacher, beams, engine, device, threads, anew) for size in sizes}


def _computed(runs: list[Run], device: str, record: Path) -> str | None:
    """What `precision: auto` comes to on the workers; None where no run that reads the cache leaves it open.

    A worker is asked, since this machine may have no GPU; once per sweep, since the states' key hangs on it.
    """
    if not any(run.training.precision == "auto" for group in _groups(runs).values() for run in group):
        return None
    found = _read_record(record)
    if "precision" not in found:
        found["precision"] = alone(auto_precision, device=device)
        write_json_atomic(record, found)
    return str(found["precision"])


def _labels(
    runs: list[Run], device: str, epochs: float, computed: str | None
) -> tuple[MadeLabels, dict[str, dict[str, float]]]:
    """By `label_key`: the label sets that teachers wrote, and the device-hours of every set that is trained on.

    A curated set counts as the whole one that it is made of: it cost no further pass. The pass of the runs' own teacher
    also makes the encoder states that the runs will read: one pass, two products.
    """
    from raydistill.label_sets.label_set import read_manifest

    made: MadeLabels = {}
    hours: dict[str, dict[str, float]] = {}
    for run in runs:
        if run.label_key in hours:
            continue
        parts = parse_labels(run.label_source)
        made[run.label_key] = {
            p.source: _written(
                run,
                p.labeller,
                device,
                nullcontext() if p.labeller else _encoder_states(runs, device, epochs, computed),
            )
            for p in parts
            if p.is_pseudo
        }
        folders = [*made[run.label_key].values(), *[p.folder for p in parts if p.folder]]
        manifests = {folder: read_manifest(Path(folder)) for folder in folders}
        hours[run.label_key] = {
            manifest.get("of", Path(folder).name): float(manifest.get("device_hours", 0.0))
            for folder, manifest in manifests.items()
        }
    return made, hours


def label_sets(runs: list[Run], made: MadeLabels) -> dict[str, dict[str, Any]]:
    """By name what the manifests of all label sets trained on tell: teacher, rows, scores against the originals."""
    from raydistill.label_sets.label_set import read_manifest

    told = {}
    for run in runs:
        folders = [*made[run.label_key].values(), *[p.folder for p in parse_labels(run.label_source) if p.folder]]
        for folder in folders:
            manifest = read_manifest(Path(folder))
            teacher = (manifest.get("teacher") or {}).get("name")
            told[Path(folder).name] = {
                "teacher": teacher,
                "rows": manifest["rows"],
                "quality": manifest.get("quality"),
            }
    return told


def _written(
    run: Run, other: str | None, device: str, beside: AbstractContextManager[Callable[[], Also] | None]
) -> str:
    """The folder of the labels that the run's teacher writes, or `other`, which decodes as it does by itself."""
    teacher, decoding = (other, Decoding()) if other else (run.teacher, run.decoding)
    assert teacher is not None
    asked = run.evaluation
    job = Job(teacher, run.dataset, decoding=decoding, engine=asked.engine, pseudo=run.pseudo, metric=asked.metric)
    with beside as also:
        return str(pseudolabel(job, home() / "labels", device, also=also))


def _cache(
    runs: list[Run], labels: MadeLabels, device: str, record: Path, epochs: float, computed: str | None
) -> Cache:
    """The teacher cache that the runs share, made where it is missing; `epochs` are those of all trials.

    What was decided and why is written to the file `record` before the pass, and what it took after it: a sweep that
    is taken up again does not change its mind.
    """
    root = home() / "cache"
    found = _read_record(record)
    for name, group in _groups(runs).items():
        want = Want(group, labels, root, device, computed)
        if name not in found["groups"]:
            keep, why = decide(want, epochs)
            found["groups"][name] = {"keep": keep, "why": why, "bytes": 0, "device_seconds": {}}
            write_json_atomic(record, found)
        cached = teacher_pass(want, found["groups"][name]["keep"])
        found["groups"][name] |= {"bytes": cached.bytes, "device_seconds": cached.seconds}
        write_json_atomic(record, found)
    groups = {name: found["groups"][name] for name in _groups(runs)}
    hours = {store: took / 3600 for kept in groups.values() for store, took in kept["device_seconds"].items()}
    return Cache(root, {name: kept["keep"] for name, kept in groups.items()}, computed, hours)


def _read_record(record: Path) -> dict[str, Any]:
    """What was decided and made so far."""
    return read_json(record) if record.is_file() else {"groups": {}}


def _groups(runs: list[Run]) -> dict[str, list[Run]]:
    """Runs that may read the same pass, by the group's name; those that turn it off are in none."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        if run.teacher is not None and run.training.teacher_cache != "off":
            groups.setdefault(group_of(run), []).append(run)
    return groups


def _encoder_states(
    runs: list[Run], device: str, epochs: float, computed: str | None
) -> AbstractContextManager[Callable[[], Also] | None]:
    """What a label job makes beside its labels: the encoder states of the first group of runs."""
    groups = list(_groups(runs).values())
    return encoder_beside(Want(groups[0], {}, home() / "cache", device, computed), epochs) if groups else nullcontext()


def inputs_for(run: Run, device: str, folder: Path) -> Inputs:
    """What a run outside a sweep needs: its label set and its teacher cache."""
    if run.teacher is None:
        return Inputs()
    record = folder / "cache.json"
    computed = _computed([run], device, record)
    labels, _ = _labels([run], device, run.training.epochs, computed)
    cache = _cache([run], labels, device, record, run.training.epochs, computed)
    return Inputs(
        labels=folders_of(labels, run),
        cache=cache.root,
        keep=cache.keep_of(run),
        computed=computed,
        stores=cache.places,
    )
