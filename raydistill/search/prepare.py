"""Creates what the trials of a sweep share: the teacher's scores, costs of the shapes, label sets, teacher cache."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.run import Run
from raydistill.config.shapes import Shape, shape_sort_key
from raydistill.config.space import Space, corner_runs, shape_runs
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.jobs.run_inputs import (
    SharedInputs,
    describe_extra_sources,
    describe_label_sets,
    ensure_extra_sources,
    prepare_shared_inputs,
)
from raydistill.results.formatting import format_count
from raydistill.results.pareto import describe_nearest_miss, resolve_budgets
from raydistill.results.shape_costs import shape_costs
from raydistill.results.sweep_record import (
    SWEEP_FILE,
    ShapeTable,
    ShortlistCoverage,
    SweepRecord,
    SweepTeacher,
    TeacherPasses,
)
from raydistill.search.serving_timing import latency_bounds
from raydistill.search.shape_latency import WEIGHT_COSTS, ShapeTask, time_larger_shapes, time_shapes
from raydistill.search.shortlists import ensure_shortlists
from raydistill.training.inputs import RunInputs, input_paths, run_label_folders
from raydistill.training.records import InputFingerprints, check_teacher_repetition
from raydistill.training.run_folder import write_row_statistics
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.teacher_scores import score_teacher
from raydistill.training.tokenized_data import input_fingerprints


@dataclass(frozen=True)
class PreparedSweep:
    """What the trials of a sweep share: plain paths and numbers, which every trial receives.

    Attributes:
        teacher: The teacher's scores, costs and properties, which sweep.json keeps.
        shapes: Costs of the shapes.
        shortlists: What each shortlist excludes, by its name in the space.
        shared: Label sets and teacher cache.
    """

    teacher: SweepTeacher
    shapes: ShapeTable
    shortlists: dict[str, ShortlistCoverage] = field(default_factory=dict)
    shared: SharedInputs = field(default_factory=SharedInputs)

    def inputs(self, run: Run, number: int, params: dict[str, Any]) -> RunInputs:
        """The inputs of the trial with this number and these values of the search."""
        return replace(
            self.shared.for_run(run),
            costs=shape_costs(self.shapes.costs, run.student.shape.with_full_size(self.teacher.size)),
            number=number,
            params=params,
            teacher_repetition=self.teacher.repetition,
        )


def prepare(space: Space, sweep: Path, device: str) -> PreparedSweep:
    """Create what is missing of a sweep's shared parts. Finished parts are kept, so a second call only reads them."""
    runs = corner_runs(space)
    extra = ensure_extra_sources(runs)  # first, since overlap with the evaluation splits is an error
    scores = _score_teacher(runs[0], sweep, device)
    task = _make_shape_task(space, runs, scores, device)
    recorded = _recorded_shapes(task, sweep)
    shapes = recorded or _time_shapes(task, device)
    sizes = sorted({run.student.shape.name for run in shape_runs(space)}, key=shape_sort_key)
    check_budgets(space, sizes, shapes)
    total_epochs = space.search.trials * max(run.training.epochs for run in runs)
    shared = prepare_shared_inputs(runs, device, sweep / "cache.json", total_epochs, extra)
    labelled = replace(task, label_folders=run_label_folders(shared.label_folders, task.run))
    if recorded is None and (retimed := _time_used_tokens_again(labelled, shapes, device)):
        shapes = retimed
        check_budgets(space, sizes, shapes)
    teacher = SweepTeacher(
        **dict(scores),
        costs=shapes.teacher_costs,
        passes=TeacherPasses(labels=shared.label_hours, stores=shared.cache.store_hours),
        label_sets=describe_label_sets(runs, shared.label_folders),
        extra=describe_extra_sources(extra),
    )
    return PreparedSweep(teacher, shapes, ensure_shortlists(space, runs, teacher), shared)


def check_unchanged(run: Run, teacher: TeacherScores, sweep: Path) -> None:
    """Check that the sweep was started with this teacher and this data.

    Raises:
        UserError: The teacher or a split of the data has changed.
    """
    recorded = InputFingerprints(teacher=teacher.key, data=teacher.data)
    if changed := recorded.changes(input_fingerprints(run)):
        raise UserError(
            f"{sweep}: the {' and the '.join(changed)} changed since this sweep was started, and results before and "
            f"after the change cannot be compared. Give the sweep another name (--set name=...), or delete the folder"
        )


def find_infeasible_sizes(space: Space, shapes: ShapeTable) -> frozenset[str]:
    """Names of the shapes of the space that no budget admits."""
    names = {run.student.shape.name for run in shape_runs(space)}
    return frozenset(name for name in names if shapes.is_infeasible(name, space.budgets))


def _score_teacher(run: Run, sweep: Path, device: str) -> TeacherScores:
    """The record SWEEP/teacher.json, created if it is missing; per-row scores are in teacher_rows.npz."""
    path = sweep / "teacher.json"
    scores = TeacherScores.read_if_present(path)
    if scores is not None:
        check_unchanged(run, scores, sweep)
    else:
        print_progress(f"teacher {run.teacher}: scoring it on validation and test")
        scores, rows = run_exclusive(score_teacher, run, device=device, input_paths=input_paths(run))
        write_row_statistics(sweep / "teacher_rows.npz", rows)
        scores.write(path)
    metric = scores.metric
    print_progress(scores.metric_choice.describe())
    print_progress(f"teacher {run.teacher} ({scores.size}): {metric} {scores.metrics[metric]:.2f} on validation")
    if scores.machine["kind"] == "cpu":
        print_progress(
            f"teacher {run.teacher}: decodes a batch fastest with {format_count(scores.threads, 'thread')}; all models "
            f"are scored and timed with this number"
        )
    check_teacher_repetition(str(run.teacher), scores.repetition, run.evaluation.allow_repetitive_teacher)
    return scores


def _make_shape_task(space: Space, runs: list[Run], teacher: TeacherScores, device: str) -> ShapeTask:
    """What is timed of a space, before the label sets exist.

    The costs of "used" tokens are measured with the tokens of the first run that keeps the used tokens. Runs on other
    label sets have a few other tokens.
    """
    run = next((run for run in runs if run.student.vocabulary == "used"), runs[0])
    names = {run.student.shape.with_full_size(teacher.size).name for run in shape_runs(space)}
    return ShapeTask(
        run=run,
        sizes=[name for name in _shape_names(shape_runs(space), teacher.size) if name in names],
        label_folders={},
        source_tokens=teacher.source_tokens,
        output_tokens=teacher.output_tokens,
        precision=teacher.precision,
        beams=teacher.beams,
        threads=teacher.threads,
        fewest_beams=min([teacher.beams, *space.serving.beams]),
        variants=space.serving.variants(device),
        bounds=latency_bounds(space.budgets),
        weight_budgets={name: bounds for name, bounds in space.budgets.items() if bounds.keys() <= WEIGHT_COSTS},
    )


def _recorded_shapes(task: ShapeTask, sweep: Path) -> ShapeTable | None:
    """The recorded costs of a sweep with trials, which are compared by these costs; None if they are to be measured."""
    record = SweepRecord.read_if_present(sweep / SWEEP_FILE)
    if record is not None and (sweep / "trials").is_dir() and set(task.sizes) <= record.shapes.costs.keys():
        return record.shapes
    return None


def _time_shapes(task: ShapeTask, device: str) -> ShapeTable:
    """Time the shapes of a task.

    The teacher has not labelled the data yet, so "used" stands for the tokens of sources, original targets and existing
    label sets. The labels can only add tokens, so these costs are lower bounds and exclude no shape that fits a budget.
    """
    print_progress(
        f"latency: timing {format_count(len(task.sizes), 'shape')} in pairs with the teacher, on an otherwise idle "
        f"machine ({', '.join(task.sizes)})"
    )
    paths = input_paths(task.run)
    shapes: ShapeTable = run_exclusive(time_shapes, task, device=device, threads=task.threads, input_paths=paths)
    describe_shapes(shapes)
    return shapes


def _time_used_tokens_again(task: ShapeTask, shapes: ShapeTable, device: str) -> ShapeTable | None:
    """Time the shapes of "used" tokens with the tokens of the label sets; None if these have hardly any other tokens.

    Args:
        task: With the label sets of the run.
        shapes: All costs, measured before the label sets existed.
        device: "cpu" or "cuda".
    """
    sizes = [size for size in task.sizes if Shape.parse(size).vocabulary == "used"]
    if not sizes or not task.label_folders:
        return None
    paths = [*input_paths(task.run), *task.label_folders.values()]
    task = replace(task, sizes=sizes)
    added = run_exclusive(
        time_larger_shapes, task, shapes.used_tokens, device=device, threads=task.threads, input_paths=paths
    )
    if added is None:
        return None
    print_progress(
        f"latency: the label sets raise the number of used tokens from {shapes.used_tokens:,} to "
        f"{added.used_tokens:,}; the shapes with these tokens were timed again"
    )
    shapes = shapes.with_shapes_of(added)
    describe_shapes(shapes)
    return shapes


def describe_shapes(shapes: ShapeTable) -> None:
    """Print the costs of the shapes, which timings exclude no size, and whether timings were noisy."""
    engine = shapes.engines[shapes.teacher_size]
    for size, costs in shapes.costs.items():
        text = f"{costs['latency_ms']:8.1f} ms for 32, {costs['params_m']:.2f} M parameters"
        cheapest = shapes.cheapest.get(size)
        if cheapest and "latency_ms" in cheapest.ratios:
            text += f", {shapes.cheapest_costs(size)['latency_ms']:.1f} ms with {cheapest.config.label}"
        print_progress(f"  {size:>6}: {text}{', predicted' if size in shapes.predicted else ''}")
        if shapes.engines.get(size, engine) != engine:
            print_progress(
                f"  {size:>6}: timed with {shapes.engines[size]} instead of {engine}; these times exclude no size"
            )
    if shapes.prediction_error is not None:
        num_timed = len(shapes.costs) - len(shapes.predicted)
        print_progress(
            f"latency: {format_count(len(shapes.predicted), 'shape')} predicted from {num_timed}, which predict each "
            f"other with an error of {shapes.prediction_error:.1%} (root mean square)"
        )
    timings = [timing for serving in shapes.cheapest.values() for timing in serving.timings.values()]
    if noisy := sum(timing.ratio is None for timing in timings):
        print_progress(
            f"latency: other processes kept the machine busy during {format_count(noisy, 'comparison')}, which "
            f"exclude no size"
        )


def check_budgets(space: Space, sizes: Sequence[str], shapes: ShapeTable) -> None:
    """Print the sizes that no budget admits.

    Raises:
        UserError: No budget admits any of the sizes.
    """
    infeasible = [size for size in sizes if shapes.is_infeasible(size, space.budgets)]
    if len(infeasible) == len(sizes):
        budgets = dict(zip(space.budgets, resolve_budgets(space.budgets, shapes.teacher_costs), strict=True))
        nearest = describe_nearest_miss({size: shapes.cheapest_costs(size) for size in sizes}, budgets)
        raise UserError(
            f"no size of the space fits any of its budgets, not even with its cheapest serving; the nearest is "
            f"{nearest}. Raise a budget, or add smaller sizes"
        )
    if infeasible:
        print_progress(f"no budget admits {', '.join(infeasible)}: students of these sizes are not trained")


def _shape_names(runs: list[Run], teacher_size: str) -> list[str]:
    """The names of the runs' shapes: the teacher's first, then the others from large to small."""
    names = {run.student.shape.with_full_size(teacher_size).name for run in runs} - {teacher_size}
    return [teacher_size, *sorted(names, key=shape_sort_key, reverse=True)]
