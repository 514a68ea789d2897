"""Serves the finalists of a search and the teacher in several configurations: scores and latency on real rows.

Nothing is trained. How a checkpoint is served is part of the selection, since fewer beams, int8 or a shortlist often
cost no quality: `choose` compares pairs of a checkpoint and a serving configuration. There are three steps:

    first pass   short timings of every shape find the configurations that may matter (serving_timing.py)
    scores       each checkpoint decodes the selection rows with its configurations (serving_rules.py)
    session      every shape is timed with each of its configurations, in pairs with the teacher (serving_timing.py)

Each step keeps its results in the sweep's folder. If anything that is compared was not timed in the last session, the
session is repeated as a whole.
"""

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from raydistill.cluster import snapshots
from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.metric_names import is_own_metric
from raydistill.config.run import Run
from raydistill.config.serving import ServingConfig
from raydistill.config.space import Space
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.evaluation.latency import Hardware, engine_version, hardware
from raydistill.evaluation.scoring import evaluate
from raydistill.inference.shortlist import stored_map
from raydistill.models import families
from raydistill.models.loading import load_config
from raydistill.results.formatting import format_count
from raydistill.results.outputs import outputs_filename, texts_filename, write_outputs, write_texts
from raydistill.results.records import Trial, rows_filename
from raydistill.results.selection import load_selection
from raydistill.results.served_students import SERVED_FILE, ServedRecord, ServedStudent, read_served
from raydistill.results.serving_latency import FIRST_PASS_FILE, LATENCY_FILE
from raydistill.results.sweep_record import ShortlistCoverage, read_sweep
from raydistill.search.prepare import check_unchanged
from raydistill.search.served_engine import ServedCheckpoint, ServingContext, open_served_engine
from raydistill.search.serving_state import (
    ServingState,
    describe_first_pass,
    describe_scores,
    representative_run,
    served_checkpoint,
)
from raydistill.search.serving_throughput import measure_throughputs, warn_if_busy
from raydistill.search.serving_timing import (
    FirstPassTask,
    SessionTask,
    latency_bounds,
    run_first_pass,
    run_session,
    warn_if_noisy,
)
from raydistill.tracking.mlflow_runs import get_or_create_tracking_id
from raydistill.training.run_folder import write_row_statistics
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.tokenized_data import read_split


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
    machine = run_exclusive(hardware, device=device, threads=teacher.threads)
    state = ServingState.load(space, sweep, teacher, machine)
    if not state.is_complete:
        run = representative_run(space, sweep)
        check_unchanged(run, teacher, sweep)
        tasks = _ServingTasks(sweep, run, teacher, device)
        state = tasks.run_first_pass(state)
        tasks.score(state)
        tasks.time(state)
        run_exclusive(remove_serving_cache, tasks.context, device=device)
    score_on_test(space, sweep, teacher, device)


class _ServingTasks:
    """Runs the three steps as exclusive tasks on the machine that times everything."""

    def __init__(self, sweep: Path, run: Run, teacher: TeacherScores, device: str) -> None:
        self.sweep, self.device, self.threads = sweep, device, teacher.threads
        self.context = make_context(run, sweep, teacher)

    def run_first_pass(self, state: ServingState) -> ServingState:
        """Time the shapes that the first pass lacks; returns the state with the new record."""
        if missing := state.missing_first_pass:
            shapes = ", ".join(checkpoint.shape for checkpoint in missing)
            print_progress(
                f"finalists: first pass over {format_count(len(state.variants), 'engine variant')} of {shapes}"
            )
            configs = {checkpoint.shape: state.shape_decodings(checkpoint.shape) for checkpoint in missing}
            task = FirstPassTask(self.context, missing, configs, state.variants, state.teacher.engine)
            record = self._run(run_first_pass, task, inputs=self._inputs(missing))
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
        """Score the checkpoints: first each with its own decoding, then with the other decodings."""
        if missing := state.missing_scores:
            print_progress(f"finalists: serving {format_count(len(missing), 'checkpoint')} on real rows")
        for checkpoint in missing:
            while configs := state.unscored_configs(checkpoint):
                self.score_configs(checkpoint, configs, self.context.split)
            snapshots.save(checkpoint.folder)
        print_progress(describe_scores(state))

    def time(self, state: ServingState) -> None:
        """Time all pairs of shape and configuration in one session, unless all of them are timed."""
        if not state.misses_timings:
            return
        configs = state.wanted_timings
        count = sum(map(len, configs.values())) - 1
        print_progress(
            f"latency: timing {format_count(count, 'pair')} of shape and configuration, each in alternation with the "
            f"teacher, on an otherwise idle machine"
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
        session = self._run(run_session, task, inputs=inputs)
        if state.measures_throughput:
            print_progress("throughput: measuring the rows per second of the same configurations")
            throughputs = run_exclusive(measure_throughputs, task, device=self.device, input_paths=inputs)
            session = session.model_copy(update={"throughputs": tuple(throughputs)})
            warn_if_busy(throughputs)
        session.write(self.sweep / LATENCY_FILE)
        warn_if_noisy(session)

    def score_configs(
        self, checkpoint: ServedCheckpoint, configs: Sequence[ServingConfig], split: str
    ) -> list[ServedStudent]:
        """Score a checkpoint, write the per-row statistics and, except for the test split, outputs and served.json."""
        outputs = [checkpoint.folder / rows_filename(split, config) for config in configs]
        if split != "test":
            outputs += [checkpoint.folder / outputs_filename(split, config) for config in configs]
            outputs += [checkpoint.folder / texts_filename(split)] if checkpoint.is_teacher else []
        entries: list[ServedStudent] = self._run(
            score_checkpoint,
            self.context,
            checkpoint,
            tuple(configs),
            split,
            inputs=self._inputs([checkpoint]),
            outputs=outputs,
        )
        if split != "test":
            record = read_served(checkpoint.folder) or ServedRecord(entries=[])
            record.with_entries(entries).write(checkpoint.folder / SERVED_FILE)
        return entries

    def _run(
        self, function: Callable[..., Any], *args: Any, inputs: Iterable[Path], outputs: Iterable[Path] = ()
    ) -> Any:
        """`run_exclusive` with the sweep's number of threads."""
        return run_exclusive(
            function, *args, device=self.device, threads=self.threads, input_paths=inputs, output_paths=outputs
        )

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

    Per-row statistics are written to the checkpoint's folder; except for the test split also the outputs and, for the
    teacher, the sources and references.
    """
    corpus = read_split(context.run.dataset, split)
    assert corpus is not None, split
    if split != "test" and checkpoint.is_teacher:
        rows = zip(corpus.ids, corpus.sources, corpus.targets, strict=True)
        write_texts(checkpoint.folder / texts_filename(split), rows)
    max_source_tokens = context.max_source_tokens(checkpoint.checkpoint)
    model_config = load_config(checkpoint.checkpoint)
    entries = []
    for variant in dict.fromkeys(config.variant for config in configs):
        engine = open_served_engine(context, checkpoint.checkpoint, variant, device, threads)
        for config in configs:
            if config.variant != variant:
                continue
            beam = checkpoint.beam(config)
            result = evaluate(engine, corpus, context.metrics, beam, max_source_tokens=max_source_tokens)
            write_row_statistics(checkpoint.folder / rows_filename(split, config), {split: result.scores.row_stats})
            if split != "test":
                write_outputs(checkpoint.folder / outputs_filename(split, config), result.predictions)
            entry = ServedStudent(
                config=config,
                engine=engine.name,
                precision=engine.precision,
                version=engine_version(engine.name),
                split=split,
                rows=len(corpus),
                metrics={**result.scores.metrics, "repetition": result.repetition_rate},
                interval=result.score_interval,
                memory_mb=families.weights_mb(model_config, engine.precision),
            )
            entries.append(entry)
    return entries


def serve_repeats(space: Space, sweep: Path, teacher: TeacherScores, trials: Sequence[Trial], device: str) -> int:
    """Score the repeats of trials with the configurations that the trials are scored with; return their number.

    Args:
        space: The sweep's space.
        sweep: The sweep's folder.
        teacher: The teacher's record from sweep.json.
        trials: Served trials, whose repeats may lack scores.
        device: "cpu" or "cuda".
    """
    missing = [(repeat, configs) for trial in trials for repeat, configs in unserved_repeats(trial)]
    if not missing:
        return 0
    snapshots.pull(*(repeat.folder for repeat, _ in missing))
    print_progress(f"seeds: scoring {format_count(len(missing), 'student')} on real rows")
    tasks = _ServingTasks(sweep, representative_run(space, sweep), teacher, device)
    for repeat, configs in missing:
        tasks.score_configs(served_checkpoint(repeat), configs, tasks.context.split)
        snapshots.save(repeat.folder)
    run_exclusive(remove_serving_cache, tasks.context, device=device)
    return len(missing)


def unserved_repeats(trial: Trial) -> list[tuple[Trial, list[ServingConfig]]]:
    """The scored repeats of a trial that lack scores, with the configurations that only the trial is scored with."""
    served = read_served(trial.folder)
    configs = [entry.config for entry in served.entries] if served else []
    result = []
    for repeat in trial.repeats:
        own = read_served(repeat.folder)
        missing = [config for config in configs if own is None or own.find(config) is None]
        if repeat.scored and missing:
            result.append((repeat, missing))
    return result


def remove_serving_cache(context: ServingContext, device: str, threads: int) -> None:
    """Delete the converted models of a command on the machine of the exclusive tasks."""
    shutil.rmtree(context.cache_dir, ignore_errors=True)


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
    students = [s for s in selection.students if s.key in keys and s.serving and s.checkpoint]
    return [student for student in students if student.test is None]


def score_on_test(space: Space, sweep: Path, teacher: TeacherScores, device: str) -> None:
    """Score the students of `find_untested` on the test split. These scores are reported; nothing is chosen by them."""
    untested = find_untested(sweep, teacher)
    if not untested:
        return
    tasks = _ServingTasks(sweep, representative_run(space, sweep), teacher, device)
    runs = [run for student in untested for run in (student, *student.repeats)]
    for student in runs:
        served = read_served(student.folder)
        assert student.serving
        assert served
        if (entry := served.find(student.serving)) and entry.test:
            continue
        [result] = tasks.score_configs(served_checkpoint(student), [student.serving], "test")
        test = result.as_split_scores()
        entries = [
            entry.model_copy(update={"test": test}) if entry.config.key == student.serving.key else entry
            for entry in served.entries
        ]
        served.model_copy(update={"entries": entries}).write(student.folder / SERVED_FILE)
        snapshots.save(student.folder)
    run_exclusive(remove_serving_cache, tasks.context, device=device)


def check_metrics_named(run: Run, teacher: TeacherScores) -> None:
    """UserError if a record names a user's metric that the run does not name: records start no code."""
    requested = {run.evaluation.metric, *run.evaluation.report}
    for name in teacher.metric_choice.names:
        if is_own_metric(name) and name not in requested:
            raise UserError(f"the sweep's record has scores by {name}, which evaluation.metric and report do not name")


def make_context(run: Run, sweep: Path, teacher: TeacherScores) -> ServingContext:
    """What every serving task of a sweep needs. The shortlists are read from sweep.json."""
    coverages: dict[str, ShortlistCoverage] = read_sweep(sweep).shortlists
    maps = {
        int(name) if name.isdecimal() else name: stored_map(coverage.folder) for name, coverage in coverages.items()
    }
    check_metrics_named(run, teacher)
    return ServingContext(run, teacher.metric_choice, get_or_create_tracking_id(sweep, sweep.name), maps)
