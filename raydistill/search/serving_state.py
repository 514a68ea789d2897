"""What a sweep's folder holds of the serving of finalists, and what is missing; finalists.py runs the missing steps."""

from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from raydistill.cluster import snapshots
from raydistill.config.run import Run
from raydistill.config.serving import EngineVariant, ServingConfig
from raydistill.config.space import Space, make_run
from raydistill.evaluation.latency import Hardware, engine_version
from raydistill.inference.decoding import BeamSearchParams
from raydistill.models.loading import locate_checkpoint
from raydistill.models.metadata import CheckpointMetadata
from raydistill.results.formatting import format_count
from raydistill.results.records import Trial, read_row_statistics, read_trials, rows_filename
from raydistill.results.selection import select_finalists
from raydistill.results.served_students import ServedRecord, read_served
from raydistill.results.serving_latency import (
    FIRST_PASS_FILE,
    TEACHER_SHAPE,
    FirstPass,
    LatencySession,
    read_session,
)
from raydistill.search.served_engine import ServedCheckpoint, engine_versions
from raydistill.search.serving_rules import configs_to_score, undominated_variants
from raydistill.training.teacher_record import TeacherScores


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
        """The state of a sweep: its finalists with a checkpoint, after their folders are downloaded."""
        # Selected again after the download, because the choice reads the per-row statistics that it adds.
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
        """The teacher and, for each shape, the checkpoint with the best score.

        The outputs of the best checkpoint have the lengths of good outputs.
        """
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
        """By number of beams, the variants of a shape that no other variant dominates, fastest first."""
        assert self.first_pass is not None
        kept = {}
        for beams in {config.beams for config in self.shape_decodings(shape)}:
            times = self.first_pass.variant_times(shape, beams)
            kept[beams] = undominated_variants({v: ms for v, ms in times.items() if v in self.variants})
        return kept

    def wanted_configs(self, checkpoint: ServedCheckpoint) -> list[ServingConfig]:
        """The configurations to score a checkpoint with, given the scores that exist.

        The teacher is also scored with the baseline configuration, so that its score on the rows of the choice is
        known.
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
        """By shape, the configurations of its checkpoints.

        The teacher is also timed with the configurations of all students.
        """
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


def describe_first_pass(state: ServingState) -> str:
    """How many combinations of shape, decoding and variant are skipped because another variant dominates them."""
    total = skipped = 0
    for checkpoint in state.representatives:
        kept = state.kept_variants(checkpoint.shape)
        for config in state.shape_decodings(checkpoint.shape):
            total += len(state.variants)
            skipped += len(state.variants) - len(kept[config.beams])
    return (
        f"finalists: {skipped} of {format_count(total, 'combination')} of shape, beams, precision and shortlist are "
        f"skipped: another precision and shortlist that is at least as exact is at least as fast"
    )


def describe_scores(state: ServingState) -> str:
    """How many configurations of the checkpoints were not scored because a faster variant is not inferior."""
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


def served_checkpoint(trial: Trial) -> ServedCheckpoint:
    """The checkpoint of a finalist, with the decoding that it was validated with."""
    checkpoint = trial.folder / "best"
    decoding = BeamSearchParams(**CheckpointMetadata.read_from(checkpoint).decoding or {})
    return ServedCheckpoint(trial.folder.name, trial.size, str(checkpoint), trial.folder, decoding)


def representative_run(space: Space, sweep: Path) -> Run:
    """A run of the sweep, for teacher, data set and evaluation, which all runs share."""
    return next(make_run(space, trial.params, space.name) for trial in read_trials(sweep) if trial.scored)
