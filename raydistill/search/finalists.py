"""Serves the finalists of a search and the teacher in several configurations: scores and latency on real rows.

Nothing is trained. How a checkpoint is served is part of the selection, since fewer beams, int8 or a shortlist often
cost no quality: `choose` compares pairs of a checkpoint and a serving configuration. There are three steps:

    first pass   short timings of every shape find the configurations that may matter (serving_timing.py)
    scores       each checkpoint decodes the validation rows with its configurations (serving_rules.py)
    session      every shape is timed with each of its configurations, in pairs with the teacher (serving_timing.py)

Each step keeps its results in the sweep's folder. If anything that is compared was not timed in the last session, the
session is repeated as a whole.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch

from raydistill.cluster import snapshots
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.run import Run
from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.config.space import Space, make_run
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.evaluation.latency import Hardware, engine_version, hardware
from raydistill.evaluation.scoring import evaluate
from raydistill.inference.decoding import BeamSearchParams
from raydistill.inference.shortlist import stored_map
from raydistill.models import families
from raydistill.models.loading import load_config, locate_checkpoint
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.formatting import format_count
from raydistill.results.records import Trial, read_row_statistics, read_trials, rows_filename
from raydistill.results.selection import load_selection, select_finalists
from raydistill.results.served_students import SERVED_FILE, ServedRecord, ServedStudent, read_served
from raydistill.results.serving_latency import (
    FIRST_PASS_FILE,
    LATENCY_FILE,
    TEACHER_SHAPE,
    FirstPass,
    LatencySession,
    read_session,
)
from raydistill.results.sweep_record import ShortlistCoverage, read_sweep
from raydistill.search.prepare import check_unchanged
from raydistill.search.served_engine import (
    ServedCheckpoint,
    ServingContext,
    engine_versions,
    open_served_engine,
)
from raydistill.search.serving_rules import configs_to_score, undominated_variants
from raydistill.search.serving_throughput import measure_throughputs
from raydistill.search.serving_timing import (
    FirstPassTask,
    SessionTask,
    latency_bounds,
    run_first_pass,
    run_session,
    warn_if_disturbed,
)
from raydistill.tracking.mlflow_runs import get_or_create_tracking_id
from raydistill.training.records import SplitScores
from raydistill.training.run_folder import write_row_statistics
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.tokenized_data import read_split


@dataclass(frozen=True)
class ServingState:
    """What a sweep's folder holds of the three steps, and what is missing.

    Attributes:
        space: The sweep's space.
        sweep: The sweep's folder.
        teacher: The teacher's record from sweep.json.
        machine: The known properties of the hardware; unknown properties are not compared.
        trials: The finalists with a checkpoint.
    """

    space: Space
    sweep: Path
    teacher: TeacherScores
    machine: Hardware
    trials: tuple[Trial, ...]

    @classmethod
    def load(cls, space: Space, sweep: Path, teacher: TeacherScores, machine: Hardware) -> "ServingState":
        """Find the finalists."""
        snapshots.pull(*(trial.folder for trial in select_finalists(sweep)))
        trials = tuple(trial for trial in select_finalists(sweep) if trial.checkpoint)
        return cls(space, sweep, teacher, machine, trials)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is missing."""
        if not self.trials:
            return True
        return bool(self.variants) and not (self.missing_first_pass or self.missing_scores or self.misses_timings)

    @cached_property
    def checkpoints(self) -> list[ServedCheckpoint]:
        """The teacher, then the finalists."""
        run = representative_run(self.space, self.sweep)
        location = locate_checkpoint(str(run.teacher), run.dataset.name)
        decoding = BeamSearchParams(**self.teacher.decoding)  # type: ignore[arg-type]
        teacher = ServedCheckpoint(TEACHER_SHAPE, TEACHER_SHAPE, location, self.sweep, decoding)
        return [teacher, *map(served_checkpoint, self.trials)]

    @cached_property
    def representatives(self) -> list[ServedCheckpoint]:
        """A checkpoint of each shape, whose outputs have the lengths of good outputs: the one with the best score."""
        best: dict[str, Trial] = {}
        metric = self.teacher.metric
        for trial in self.trials:
            score = trial.score(metric) or 0.0
            if trial.size not in best or score > (best[trial.size].score(metric) or 0.0):
                best[trial.size] = trial
        keys = {trial.key for trial in best.values()}
        return [checkpoint for checkpoint in self.checkpoints if checkpoint.is_teacher or checkpoint.key in keys]

    @property
    def baseline(self) -> ServingConfig:
        """The teacher as it is served today: own decoding, full precision, whole vocabulary."""
        return self.checkpoints[0].own_config(self.teacher.precision)

    def decodings(self, checkpoint: ServedCheckpoint) -> list[ServingConfig]:
        """The decodings that a checkpoint is served with, its own first."""
        return self.space.serving.decodings(checkpoint.own_config())

    def shape_decodings(self, shape: str) -> list[ServingConfig]:
        """The decodings of all checkpoints of a shape."""
        configs = [
            c for checkpoint in self.checkpoints if checkpoint.shape == shape for c in self.decodings(checkpoint)
        ]
        return list({config.key: config for config in configs}.values())

    @cached_property
    def first_pass(self) -> FirstPass | None:
        """The first pass on this machine with the installed engines."""
        record = FirstPass.read_if_present(self.sweep / FIRST_PASS_FILE)
        return record if record and self._is_current(record) else None

    @property
    def variants(self) -> list[EngineVariant]:
        """The engine variants of the space that this machine can compute; all of them before the first pass."""
        kind = "cuda" if self._kind.startswith("cuda") else "cpu"
        unsupported = self.first_pass.unsupported if self.first_pass else []
        return [v for v in self.space.serving.variants(kind) if v.precision not in unsupported]

    @property
    def missing_first_pass(self) -> list[ServedCheckpoint]:
        """The representatives of shapes whose first pass lacks a variant or a number of beams."""
        if self.first_pass is None:
            return self.representatives
        wanted = set(self.variants)
        return [
            checkpoint
            for checkpoint in self.representatives
            if any(
                wanted - self.first_pass.variant_times(checkpoint.shape, config.beams).keys()
                for config in self.shape_decodings(checkpoint.shape)
            )
        ]

    def kept_variants(self, shape: str) -> dict[int, list[EngineVariant]]:
        """By number of beams, the variants of a shape that no other one dominates, the fastest first."""
        assert self.first_pass is not None
        kept = {}
        for beams in {config.beams for config in self.shape_decodings(shape)}:
            times = self.first_pass.variant_times(shape, beams)
            kept[beams] = undominated_variants({v: ms for v, ms in times.items() if v in self.variants})
        return kept

    def wanted_configs(self, checkpoint: ServedCheckpoint) -> list[ServingConfig]:
        """The configurations that a checkpoint is scored with, as far as the scores so far tell.

        The teacher is scored as the baseline too, so that its score is known on the rows of the choice.
        """
        rows_of = partial(read_scored_rows, checkpoint.folder, read_served(checkpoint.folder))
        variants = self.kept_variants(checkpoint.shape)
        configs = configs_to_score(self.decodings(checkpoint), variants, rows_of, self.teacher.metric)
        return [self.baseline, *configs] if checkpoint.is_teacher and self.baseline not in configs else configs

    def unscored_configs(self, checkpoint: ServedCheckpoint) -> list[ServingConfig]:
        """The wanted configurations that have no score of the installed engine."""
        served = read_served(checkpoint.folder)
        wanted = self.wanted_configs(checkpoint)
        return [config for config in wanted if read_scored_rows(checkpoint.folder, served, config) is None]

    @property
    def missing_scores(self) -> list[ServedCheckpoint]:
        """The checkpoints that lack a score."""
        return [checkpoint for checkpoint in self.checkpoints if self.unscored_configs(checkpoint)]

    @property
    def wanted_timings(self) -> dict[str, list[ServingConfig]]:
        """By shape, the configurations of its checkpoints; the teacher is timed with those of all students too."""
        wanted: dict[str, dict[str, ServingConfig]] = {TEACHER_SHAPE: {self.baseline.key: self.baseline}}
        for checkpoint in self.checkpoints:
            for config in self.wanted_configs(checkpoint):
                for shape in {checkpoint.shape, TEACHER_SHAPE}:
                    wanted.setdefault(shape, {})[config.key] = config
        return {shape: list(configs.values()) for shape, configs in wanted.items()}

    @property
    def measures_throughput(self) -> bool:
        """Whether a budget bounds the rows per second, which take minutes to measure."""
        return any("rows_per_s" in bounds for bounds in self.space.budgets.values())

    @property
    def misses_timings(self) -> bool:
        """Whether something that is compared was not timed in the last session on this machine."""
        session = read_session(self.sweep)
        if session is None or not self._is_current(session) or session.baseline != self.baseline:
            return True
        wanted = [(shape, config) for shape, configs in self.wanted_timings.items() for config in configs]
        if not all(session.is_timed(shape, config) for shape, config in wanted):
            return True
        students = [(shape, config) for shape, config in wanted if shape != TEACHER_SHAPE]
        served = [(TEACHER_SHAPE, self.baseline), *students] if self.measures_throughput else []
        return not all(session.throughput(shape, config) for shape, config in served)

    @property
    def _kind(self) -> str:
        return str(self.machine.get("kind", self.teacher.machine.get("kind", "cpu")))

    def _is_current(self, record: FirstPass | LatencySession) -> bool:
        """Whether a record is of this machine and of the installed engines."""
        return self.machine.items() <= record.hardware.items() and record.versions == engine_versions()


def read_scored_rows(folder: Path, served: ServedRecord | None, config: ServingConfig) -> np.ndarray | None:
    """Per-row statistics of a configuration; None if the installed engine did not score it."""
    entry = served.find(config) if served else None
    if entry is None or entry.version != engine_version(entry.engine):
        return None
    return read_row_statistics(folder / rows_filename(entry.split, config), entry.split)


def all_served(space: Space, sweep: Path, teacher: TeacherScores) -> bool:
    """Whether `serve_finalists` has nothing to do on this machine. Reads files only."""
    state = ServingState.load(space, sweep, teacher, local_hardware())
    return state.is_complete and not find_untested(sweep, teacher)


def serve_finalists(space: Space, sweep: Path, teacher: TeacherScores, device: str) -> None:
    """Do what is missing of first pass, scores and session, then score the students of the front on the test split.

    Args:
        space: The sweep's space.
        sweep: The sweep's folder.
        teacher: The teacher's record from sweep.json.
        device: "cpu" or "cuda".

    Raises:
        UserError: The teacher or the data changed since the sweep was started, or the device can compute none of the
            space's precisions.
    """
    machine = run_exclusive(hardware, device=device)
    state = ServingState.load(space, sweep, teacher, machine)
    if not state.is_complete:
        run = representative_run(space, sweep)
        check_unchanged(run, teacher, sweep)
        server = _Server(sweep, make_context(run, sweep, teacher.metric), device)
        state = server.run_first_pass(state)
        server.score(state)
        server.time(state)
        run_exclusive(remove_serving_cache, server.context, device=device)
    score_on_test(space, sweep, teacher, device)


class _Server:
    """Runs the three steps as exclusive tasks on the machine that times everything."""

    def __init__(self, sweep: Path, context: ServingContext, device: str) -> None:
        self.sweep, self.context, self.device = sweep, context, device

    def run_first_pass(self, state: ServingState) -> ServingState:
        """Time the shapes whose first pass is missing; the state with the new record."""
        if missing := state.missing_first_pass:
            shapes = ", ".join(checkpoint.shape for checkpoint in missing)
            print_progress(
                f"finalists: a first pass over {format_count(len(state.variants), 'engine variant')}: {shapes}"
            )
            configs = {checkpoint.shape: state.shape_decodings(checkpoint.shape) for checkpoint in missing}
            task = FirstPassTask(self.context, missing, configs, state.variants, state.teacher.engine)
            record = run_exclusive(run_first_pass, task, device=self.device, input_paths=self._inputs(missing))
            if state.first_pass is not None:
                record = state.first_pass.merged_with(record)
            record.write(self.sweep / FIRST_PASS_FILE)
            state = ServingState(state.space, state.sweep, state.teacher, state.machine, state.trials)
        assert state.first_pass is not None
        if state.first_pass.unsupported:
            print_progress(f"finalists: this device does not compute in {', '.join(state.first_pass.unsupported)}")
        if not state.variants:
            raise UserError(
                f"serving.precision: this device computes in none of {', '.join(state.first_pass.unsupported)}; add "
                f"fp32 or bf16"
            )
        print_progress(describe_first_pass(state))
        return state

    def score(self, state: ServingState) -> None:
        """Score the checkpoints with their configurations: first with the own decoding, then with the others."""
        if missing := state.missing_scores:
            print_progress(f"finalists: serving {format_count(len(missing), 'checkpoint')} on real rows")
        for checkpoint in missing:
            while configs := state.unscored_configs(checkpoint):
                self.score_configs(checkpoint, configs, self.context.split)
            snapshots.save(checkpoint.folder)
        print_progress(describe_scores(state))

    def time(self, state: ServingState) -> None:
        """Time everything in one session, if something is not timed."""
        if not state.misses_timings:
            return
        configs = state.wanted_timings
        count = sum(map(len, configs.values())) - 1
        print_progress(
            f"latency: timing {format_count(len(configs), 'shape')} in {format_count(count, 'configuration')}, in "
            f"pairs with the teacher on an otherwise idle machine"
        )
        task = SessionTask(
            self.context,
            state.checkpoints[0],
            state.baseline,
            state.representatives,
            configs,
            latency_bounds(state.space.budgets),
        )
        inputs = self._inputs(state.representatives)
        session = run_exclusive(run_session, task, device=self.device, input_paths=inputs)
        if state.measures_throughput:
            print_progress("throughput: measuring the rows per second of the same configurations")
            throughputs = run_exclusive(measure_throughputs, task, device=self.device, input_paths=inputs)
            session = session.model_copy(update={"throughputs": tuple(throughputs)})
        session.write(self.sweep / LATENCY_FILE)
        warn_if_disturbed(session)

    def score_configs(
        self, checkpoint: ServedCheckpoint, configs: Sequence[ServingConfig], split: str
    ) -> list[ServedStudent]:
        """Score a checkpoint, write the per-row statistics and, except for the test split, served.json."""
        outputs = [checkpoint.folder / rows_filename(split, config) for config in configs]
        entries: list[ServedStudent] = run_exclusive(
            score_checkpoint,
            self.context,
            checkpoint,
            tuple(configs),
            split,
            device=self.device,
            input_paths=self._inputs([checkpoint]),
            output_paths=outputs,
        )
        if split != "test":
            record = read_served(checkpoint.folder) or ServedRecord(entries=[])
            record.with_entries(entries).write(checkpoint.folder / SERVED_FILE)
        return entries

    def _inputs(self, checkpoints: Sequence[ServedCheckpoint]) -> list[Path]:
        maps = [path.parent for path in self.context.maps.values()]
        return [*maps, *(path for checkpoint in checkpoints for path in checkpoint.input_paths)]


def score_checkpoint(
    context: ServingContext,
    checkpoint: ServedCheckpoint,
    configs: Sequence[ServingConfig],
    split: str,
    device: str,
    threads: int,
) -> list[ServedStudent]:
    """Score a checkpoint on a split with each configuration, as entries of served.json.

    Per-row statistics are written to the checkpoint's folder.
    """
    corpus = read_split(context.run.dataset, split)
    assert corpus is not None, split
    max_source_tokens = context.max_source_tokens(checkpoint.checkpoint)
    config_of_model = load_config(checkpoint.checkpoint)
    entries = []
    for variant in dict.fromkeys(config.variant for config in configs):
        engine = open_served_engine(context, checkpoint.checkpoint, variant, device, threads)
        for config in configs:
            if config.variant != variant:
                continue
            beam = checkpoint.beam(config)
            result = evaluate(engine, corpus, context.metric, beam, max_source_tokens=max_source_tokens)
            write_row_statistics(checkpoint.folder / rows_filename(split, config), {split: result.scores.row_stats})
            entry = ServedStudent(
                config=config,
                engine=engine.name,
                precision=engine.precision,
                version=engine_version(engine.name),
                split=split,
                rows=len(corpus),
                metrics={**result.scores.metrics, "repetition": result.repetition_rate},
                interval=result.score_interval,
                memory_mb=families.weights_mb(config_of_model, engine.precision),
            )
            entries.append(entry)
    return entries


def remove_serving_cache(context: ServingContext, device: str, threads: int) -> None:
    """Delete the converted models of a command on the machine of the exclusive tasks."""
    shutil.rmtree(context.cache_dir, ignore_errors=True)


def describe_first_pass(state: ServingState) -> str:
    """How many combinations of shape, decoding and engine variant are skipped since another one dominates them."""
    total = skipped = 0
    for checkpoint in state.representatives:
        kept = state.kept_variants(checkpoint.shape)
        for config in state.shape_decodings(checkpoint.shape):
            total += len(state.variants)
            skipped += len(state.variants) - len(kept[config.beams])
    return (
        f"finalists: {skipped} of {format_count(total, 'combination')} of shape, beams, precision and shortlist are "
        f"skipped: another one that is at least as exact is at least as fast"
    )


def describe_scores(state: ServingState) -> str:
    """How many configurations of the checkpoints were not scored since a faster engine variant is not inferior."""
    scored = skipped = 0
    for checkpoint in state.checkpoints:
        kept = state.kept_variants(checkpoint.shape)
        wanted = len(state.wanted_configs(checkpoint))
        scored += wanted
        skipped += sum(len(kept[config.beams]) for config in state.decodings(checkpoint)) - wanted
    return (
        f"finalists: {format_count(scored, 'pair')} of checkpoint and configuration are scored; {skipped} are not: "
        f"with the checkpoint's own decoding, a faster precision or shortlist is not inferior"
    )


def local_hardware() -> Hardware:
    """What is known of the serving hardware before Ray starts; empty if RAY_ADDRESS names a cluster."""
    if os.environ.get("RAY_ADDRESS"):
        return {}
    machine = hardware("cuda" if torch.cuda.is_available() else "cpu")
    return {name: value for name, value in machine.items() if name != "threads"}


def find_untested(sweep: Path, teacher: TeacherScores) -> list[Trial]:
    """The students on the front or chosen that lack a score on the test split, if the data have a test split."""
    if "test" not in teacher.data:
        return []
    selection = load_selection(sweep)
    keys = {*selection.front_keys, *(key for key in selection.chosen_keys.values() if key)}
    return [s for s in selection.students if s.key in keys and s.test is None and s.serving and s.checkpoint]


def score_on_test(space: Space, sweep: Path, teacher: TeacherScores, device: str) -> None:
    """Score the students of `find_untested` on the test split. These scores are reported; nothing is chosen by them."""
    untested = find_untested(sweep, teacher)
    if not untested:
        return
    server = _Server(sweep, make_context(representative_run(space, sweep), sweep, teacher.metric), device)
    for student in untested:
        served = read_served(student.folder)
        assert student.serving
        assert served
        [result] = server.score_configs(served_checkpoint(student), [student.serving], "test")
        test = SplitScores(**result.metrics, interval=result.interval)
        entries = [
            entry.model_copy(update={"test": test}) if entry.config.key == student.serving.key else entry
            for entry in served.entries
        ]
        served.model_copy(update={"entries": entries}).write(student.folder / SERVED_FILE)
        snapshots.save(student.folder)
    run_exclusive(remove_serving_cache, server.context, device=device)


def served_checkpoint(trial: Trial) -> ServedCheckpoint:
    """The checkpoint of a finalist, with the decoding that it was validated with."""
    checkpoint = trial.folder / "best"
    decoding = BeamSearchParams(**CheckpointMetadata.read_from(checkpoint).decoding or {})
    return ServedCheckpoint(trial.folder.name, trial.size, str(checkpoint), trial.folder, decoding)


def make_context(run: Run, sweep: Path, metric: str) -> ServingContext:
    """What every serving task of a sweep needs. The shortlists are those of sweep.json."""
    coverages: dict[str, ShortlistCoverage] = read_sweep(sweep).shortlists
    maps = {
        int(name) if name.isdecimal() else name: stored_map(coverage.folder) for name, coverage in coverages.items()
    }
    return ServingContext(run, metric, get_or_create_tracking_id(sweep, sweep.name), maps)


def representative_run(space: Space, sweep: Path) -> Run:
    """A run of the sweep, for teacher, data set and evaluation, which all runs share."""
    return next(make_run(space, trial.params, space.name) for trial in read_trials(sweep) if trial.scored)
