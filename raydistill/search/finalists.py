"""Serves the finalists of a search with several ways of decoding, and measures scores and latency on real rows.

Nothing is trained. Decoding is part of the selection, since fewer beams often cost no quality: `choose` compares pairs
of a checkpoint and a way of decoding.
"""

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from raydistill.cluster import snapshots
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.presets import teacher_preset
from raydistill.config.run import Run
from raydistill.config.space import DecodingSearch, Space, make_run
from raydistill.core.console import print_progress
from raydistill.data.selection import selection_split
from raydistill.evaluation.latency import BackgroundLoad, Hardware, engine_version, hardware, warn_background_load
from raydistill.evaluation.serving import benchmark_serving
from raydistill.inference.decoding import BeamSearchParams, Engine, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.models.loading import load_config, locate_checkpoint
from raydistill.models.metadata import CheckpointMetadata
from raydistill.models.tokenization import resolve_languages, resolve_max_tokens
from raydistill.results.records import ServingConfig, Trial, read_trials, rows_filename
from raydistill.results.selection import load_selection, select_finalists
from raydistill.results.served_students import SERVED_FILE, ServedRecord, ServedStudent, read_served
from raydistill.search.prepare import check_unchanged
from raydistill.training.records import SplitScores
from raydistill.training.run_folder import write_row_statistics
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.tokenized_data import read_split

REMEASURE_REMEDY = "then delete the served.json files in the sweep's folder, and run the same command again"


@dataclass(frozen=True)
class PendingServing:
    """A checkpoint, the decodings that it was not served with yet, and the folder whose served.json lacks them."""

    folder: Path
    checkpoint: str
    decodings: list[BeamSearchParams]


@dataclass(frozen=True)
class ServingTask:
    """A checkpoint to serve with some decodings on a split.

    Attributes:
        pending: Checkpoint, decodings, and the folder of the per-row statistics.
        run: A run of the sweep, which names data set and engine.
        metric: The main metric.
        split: The split to serve; for "validation", the rows that the data set keeps for the choice.
    """

    pending: PendingServing
    run: Run
    metric: str
    split: str

    def rows_path(self, decoding: BeamSearchParams) -> Path:
        """The file of the per-row statistics of a decoding."""
        return self.pending.folder / rows_filename(self.split, serving_config(decoding))

    def execute(self, device: str) -> list[ServedStudent]:
        """`serve_checkpoint` on the machine that times everything, without other load of this cluster."""
        outputs = [self.rows_path(decoding) for decoding in self.pending.decodings]
        folder, checkpoint = self.pending.folder, Path(self.pending.checkpoint)
        inputs = [folder if checkpoint.is_relative_to(folder) else checkpoint]  # a trial's folder is stored whole
        return run_exclusive(serve_checkpoint, self, device=device, input_paths=inputs, output_paths=outputs)


def all_served(space: Space, sweep: Path, teacher: TeacherScores) -> bool:
    """Whether `serve_finalists` has nothing to do on this machine. Reads files only."""
    machine = local_hardware()
    pending = find_unserved(space, sweep, teacher, machine) or find_untested(sweep, teacher)
    return not pending and _is_reference_hardware(sweep, machine)


def serve_finalists(space: Space, sweep: Path, teacher: TeacherScores, device: str) -> None:
    """Serve the teacher and every finalist with each decoding of the space that is missing.

    Selection then uses the timings of this machine only, since timings of two machines cannot be compared.

    Args:
        space: The sweep's space.
        sweep: The sweep's folder.
        teacher: The teacher's record from sweep.json.
        device: "cpu" or "cuda".

    Raises:
        UserError: The teacher or the data changed since the sweep was started.
    """
    machine = run_exclusive(hardware, device=device)
    unserved = find_unserved(space, sweep, teacher, machine)
    if unserved:
        run = _representative_run(space, sweep)
        check_unchanged(run, teacher, sweep)
        print_progress(
            f"finalists: serving {len(unserved)} checkpoints on real rows, one at a time on an otherwise idle machine"
        )
        background_cores = 0.0
        for pending in unserved:
            entries = ServingTask(pending, run, teacher.metric, "validation").execute(device)
            merge_served(pending.folder, entries)
            snapshots.save(pending.folder)
            background_cores = max(background_cores, *(entry.background_cores for entry in entries))
        warn_background_load(background_cores, REMEASURE_REMEDY)
    served = read_served(sweep)
    if served and not _is_reference_hardware(sweep, machine):
        served.model_copy(update={"hardware": machine}).write(sweep / SERVED_FILE)
    score_on_test(space, sweep, teacher, device)


def local_hardware() -> Hardware:
    """What is known of the serving hardware before Ray starts; empty if RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    machine = hardware("cuda" if torch.cuda.is_available() else "cpu")
    return {name: value for name, value in machine.items() if name != "threads"}


def find_unserved(space: Space, sweep: Path, teacher: TeacherScores, machine: Hardware) -> list[PendingServing]:
    """The teacher and the finalists that lack a decoding on this machine with the installed engine.

    Args:
        space: The sweep's space.
        sweep: The sweep's folder.
        teacher: The teacher's record from sweep.json.
        machine: The known properties of the hardware; unknown properties are not compared.
    """
    snapshots.pull(*(trial.folder for trial in select_finalists(sweep)))
    finalists = [trial for trial in select_finalists(sweep) if trial.checkpoint]
    if not finalists:
        return []
    run, search = _representative_run(space, sweep), space.search.decoding
    location = locate_checkpoint(str(run.teacher), run.dataset.name)
    own = BeamSearchParams(**teacher.decoding)  # type: ignore[arg-type]
    required = [PendingServing(sweep, location, decoding_grid(own, search))]
    for trial in finalists:
        required.append(
            PendingServing(trial.folder, str(trial.folder / "best"), decoding_grid(_own_decoding(trial), search))
        )
    unserved = []
    for pending in required:
        record = read_served(pending.folder)
        keys = {entry.decoding.key for entry in record.entries if _is_current(entry, machine)} if record else set()
        unserved.append(replace(pending, decodings=[d for d in pending.decodings if serving_config(d).key not in keys]))
    return [pending for pending in unserved if pending.decodings]


def find_untested(sweep: Path, teacher: TeacherScores) -> list[Trial]:
    """The students on the front or chosen that lack a score on the test split, if the data have a test split."""
    if "test" not in teacher.data:
        return []
    selection = load_selection(sweep)
    keys = {*selection.front_keys, *(key for key in selection.chosen_keys.values() if key)}
    return [s for s in selection.students if s.key in keys and s.test is None and s.decoding and s.checkpoint]


def decoding_grid(default: BeamSearchParams, search: DecodingSearch) -> list[BeamSearchParams]:
    """The default decoding, then every other combination of the search, without duplicates.

    One beam is combined with one length penalty only, which has no effect there.
    """
    grid = {serving_config(default).key: default}
    for beams in search.beams:
        for penalty in search.length_penalty if beams > 1 else [default.length_penalty]:
            decoding = replace(default, beams=beams, length_penalty=penalty)
            grid.setdefault(serving_config(decoding).key, decoding)
    return list(grid.values())


def merge_served(folder: Path, entries: Sequence[ServedStudent]) -> None:
    """Add entries to a folder's served.json; they replace those of the same decoding and hardware."""
    record = read_served(folder) or ServedRecord(hardware=entries[0].hardware, entries=[])
    replaced = [(entry.decoding.key, entry.hardware) for entry in entries]
    kept = [entry for entry in record.entries if (entry.decoding.key, entry.hardware) not in replaced]
    record.model_copy(update={"entries": [*kept, *entries]}).write(folder / SERVED_FILE)


def score_on_test(space: Space, sweep: Path, teacher: TeacherScores, device: str) -> None:
    """Score the students of `find_untested` on the test split. These scores are reported; nothing is chosen by them."""
    for student in find_untested(sweep, teacher):
        served = read_served(student.folder)
        assert student.decoding
        assert served
        decoding = replace(
            _own_decoding(student), beams=student.decoding.beams, length_penalty=student.decoding.length_penalty
        )
        pending = PendingServing(student.folder, str(student.folder / "best"), [decoding])
        [result] = ServingTask(pending, _representative_run(space, sweep), teacher.metric, "test").execute(device)
        test = SplitScores(**result.metrics, interval=result.interval)
        # Of all machines, since scores do not depend on the machine
        entries = [
            entry.model_copy(update={"test": test}) if entry.decoding.key == student.decoding.key else entry
            for entry in served.entries
        ]
        served.model_copy(update={"entries": entries}).write(student.folder / SERVED_FILE)
        snapshots.save(student.folder)


def serve_checkpoint(task: ServingTask, device: str, threads: int) -> list[ServedStudent]:
    """Serve a checkpoint with each decoding. Call with `run_exclusive`, since load disturbs timings.

    Returns:
        For each decoding an entry of served.json. Per-row statistics are written to `task.rows_path`.
    """
    dataset = task.run.dataset
    corpus = read_split(dataset, selection_split(dataset) if task.split == "validation" else task.split)
    assert corpus is not None, task.split
    entries = []
    with tempfile.TemporaryDirectory(prefix="raydistill-serve-") as scratch:
        engine, max_source_tokens = _open_serving_engine(task, device, threads, Path(scratch))
        for params in task.pending.decodings:
            load = BackgroundLoad()
            served = benchmark_serving(engine, corpus, task.metric, params, max_source_tokens)
            background_cores = load.mean_cores()
            write_row_statistics(task.rows_path(params), {task.split: served.scores.row_stats})
            entry = ServedStudent(
                decoding=serving_config(params),
                engine=engine.name,
                precision=engine.precision,
                version=engine_version(engine.name),
                hardware=hardware(device, threads),
                rows=len(corpus),
                background_cores=background_cores,
                metrics={**served.scores.metrics, "repetition": served.repetition_rate},
                interval=served.score_interval,
                costs=served.costs,
            )
            entries.append(entry)
    return entries


def serving_config(params: BeamSearchParams) -> ServingConfig:
    """The part of the decoding that the sweep varies."""
    return ServingConfig(beams=params.beams, length_penalty=params.length_penalty)


def _open_serving_engine(task: ServingTask, device: str, threads: int, scratch: Path) -> tuple[Engine, int]:
    """The engine that serves the checkpoint, and the number of source tokens that the model reads."""
    run, checkpoint = task.run, task.pending.checkpoint
    languages = resolve_languages(run.teacher, run.dataset)
    options = EngineOptions(device=device, threads=threads, languages=languages, cache_dir=scratch / "engine")
    engine = open_engine(checkpoint, run.evaluation.engine, options)
    preset = teacher_preset(str(run.teacher), run.dataset.name)
    return engine, resolve_max_tokens("max_source_tokens", run.dataset, preset, load_config(checkpoint))


def _is_current(entry: ServedStudent, machine: Hardware) -> bool:
    """Whether an entry of served.json is of this machine and of the installed version of its engine."""
    return entry.version == engine_version(entry.engine) and machine.items() <= entry.hardware.items()


def _is_reference_hardware(sweep: Path, machine: Hardware) -> bool:
    """Whether selection uses the timings of this machine, or nothing was served yet."""
    served = read_served(sweep)
    return served is None or machine.items() <= served.hardware.items()


def _representative_run(space: Space, sweep: Path) -> Run:
    """A run of the sweep, for teacher, data set and evaluation, which all runs share."""
    return next(make_run(space, trial.params, space.name) for trial in read_trials(sweep) if trial.scored)


def _own_decoding(trial: Trial) -> BeamSearchParams:
    """The decoding that a trial's checkpoint was validated with."""
    return BeamSearchParams(**CheckpointMetadata.read_from(trial.folder / "best").decoding or {})
