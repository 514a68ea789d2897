"""Creates what the trials of a sweep share: the teacher's scores, costs of the shapes, label sets, teacher cache."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from raydistill.cluster.exclusive import run_exclusive
from raydistill.config.run import Run, parse_size
from raydistill.config.space import Space, corner_runs
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import read_json, write_json_atomic
from raydistill.evaluation.latency import warn_background_load
from raydistill.jobs.run_inputs import SharedInputs, describe_label_sets, prepare_shared_inputs
from raydistill.results.costs import total_pass_hours
from raydistill.results.pareto import fits_any_budget, resolve_budgets
from raydistill.search.shape_latency import ShapeCosts, ShapeTiming, time_shapes
from raydistill.training.inputs import RunInputs, input_paths
from raydistill.training.records import InputFingerprints, repetition_warning
from raydistill.training.run_folder import write_row_statistics
from raydistill.training.teacher_scores import score_teacher
from raydistill.training.tokenized_data import input_fingerprints


@dataclass(frozen=True)
class PreparedSweep:
    """What the trials of a sweep share: plain paths and numbers, which every trial receives.

    Attributes:
        teacher: The teacher's scores, costs and properties, which sweep.json keeps.
        shape_costs: Costs of each shape with the teacher's own number of beams.
        shape_costs_fewest_beams: Costs of each shape with the fewest beams that a student may be served with. A shape
            that no budget admits even so is not trained.
        shared: Label sets and teacher cache.
    """

    teacher: dict[str, Any]
    shape_costs: dict[str, ShapeCosts]
    shape_costs_fewest_beams: dict[str, ShapeCosts]
    shared: SharedInputs = field(default_factory=SharedInputs)

    def inputs(self, run: Run, number: int, params: dict[str, Any]) -> RunInputs:
        """The inputs of the trial with this number and these values of the search."""
        return replace(
            self.shared.for_run(run),
            costs=self.shape_costs.get(run.student.size or self.teacher["size"], {}),
            number=number,
            params=params,
            teacher_repetition=self.teacher.get("repetition"),
        )


def prepare(space: Space, sweep: Path, device: str) -> PreparedSweep:
    """Create what is missing of a sweep's shared parts. Finished parts are kept, so a second call only reads them."""
    runs = corner_runs(space)
    teacher = _score_teacher(runs[0], sweep, device)
    shape_costs, fewest_beams = _time_shapes(space, runs, teacher, sweep, device)
    total_epochs = space.search.trials * max(run.training.epochs for run in runs)
    shared = prepare_shared_inputs(runs, device, sweep / "cache.json", total_epochs)
    record = _teacher_record(teacher, shape_costs[teacher["size"]], runs, shared)
    return PreparedSweep(record, shape_costs, fewest_beams, shared)


def check_unchanged(run: Run, teacher: dict[str, Any], sweep: Path) -> None:
    """Check the teacher and the data against those that the sweep was started with.

    Raises:
        UserError: One of them has changed.
    """
    recorded = InputFingerprints(teacher=teacher["key"], data=teacher["data"])
    if changed := recorded.changes(input_fingerprints(run)):
        raise UserError(
            f"{sweep}: the {' and the '.join(changed)} changed since this sweep was started, and results before and "
            f"after the change cannot be compared. Give the sweep another name (--set name=...), or delete the folder"
        )


def find_infeasible_sizes(space: Space, prepared: PreparedSweep) -> frozenset[str | None]:
    """Values of `student.size` in the space that no budget admits."""
    sizes = {run.student.size for run in corner_runs(space)}
    return frozenset(size for size in sizes if is_infeasible(size, space.budgets, prepared))


def is_infeasible(size: str | None, budgets: dict[str, dict[str, Any]], prepared: PreparedSweep) -> bool:
    """Whether no budget admits a student of this size, even with the fewest beams; None is the teacher's size."""
    costs = prepared.shape_costs_fewest_beams[size or prepared.teacher["size"]]
    return not fits_any_budget(costs, resolve_budgets(budgets, prepared.teacher["costs"]))


def _score_teacher(run: Run, sweep: Path, device: str) -> dict[str, Any]:
    """The teacher's record SWEEP/teacher.json, created if it is missing; per-row scores are in teacher_rows.npz."""
    path = sweep / "teacher.json"
    if path.is_file():
        teacher = read_json(path)
        check_unchanged(run, teacher, sweep)
    else:
        print_progress(f"teacher {run.teacher}: scoring it on validation and test")
        teacher = run_exclusive(score_teacher, run, device=device, input_paths=input_paths(run))
        write_row_statistics(sweep / "teacher_rows.npz", teacher.pop("scored"))
        write_json_atomic(path, teacher)
    metric = teacher["metric"]
    print_progress(
        f"teacher {run.teacher} ({teacher['size']}): {metric} {teacher['metrics'][metric]:.2f} on validation"
    )
    if warning := repetition_warning(f"teacher {run.teacher}", teacher.get("repetition")):
        print_progress(warning)
    return teacher


def _time_shapes(
    space: Space, runs: list[Run], teacher: dict[str, Any], sweep: Path, device: str
) -> tuple[dict[str, ShapeCosts], dict[str, ShapeCosts]]:
    """Costs of each shape with the teacher's number of beams, and with the fewest beams of the space."""
    sizes = _student_sizes(runs, teacher["size"])
    beams = tuple(dict.fromkeys((teacher["beams"], min([teacher["beams"], *space.search.decoding.beams]))))
    # Trials of a sweep are compared, so noisy timings are repeated only before the first trial
    timing = ShapeTiming.from_record(teacher, beams, remeasure_noisy=not (sweep / "trials").is_dir())
    print_progress(
        f"latency: timing {len(sizes)} shapes, one at a time on an otherwise idle machine ({', '.join(sizes)})"
    )
    costs = run_exclusive(time_shapes, runs[0], sizes, timing, device=device, input_paths=input_paths(runs[0]))
    background_cores = max(row.pop("background_cores") for rows in costs.values() for row in rows)
    warn_background_load(background_cores, "the next sweep times the shapes again")
    base = costs[teacher["size"]][0]["latency_ms"]
    shape_costs = {size: {**rows[0], "speedup": base / rows[0]["latency_ms"]} for size, rows in costs.items()}
    for size in sizes:
        times = [f"{row['latency_ms']:8.1f} ms for 32 (beams: {n})" for n, row in zip(beams, costs[size], strict=True)]
        print_progress(f"  {size:>6}: {', '.join(times)}, {shape_costs[size]['params_m']:.2f} M parameters")
    return shape_costs, {size: rows[-1] for size, rows in costs.items()}


def _student_sizes(runs: list[Run], teacher_size: str) -> list[str]:
    """The sizes of the runs, the teacher's first, then from large to small."""
    sizes = {run.student.size or teacher_size for run in runs} | {teacher_size}
    return sorted(sizes, key=lambda size: (size != teacher_size, [-n for n in parse_size(size)]))


def _teacher_record(
    teacher: dict[str, Any], costs: ShapeCosts, runs: list[Run], shared: SharedInputs
) -> dict[str, Any]:
    """The teacher's record with its costs, and with what its passes over the training split took."""
    store_hours = shared.cache.store_hours
    passes = {"labels": shared.label_hours, "cache": sum(store_hours.values()), "stores": store_hours}
    return {
        **teacher,
        "costs": {name: value for name, value in costs.items() if name != "speedup"},
        "passes": passes,
        "label_sets": describe_label_sets(runs, shared.label_folders),
        "teacher_gpu_hours": total_pass_hours(passes),
    }
