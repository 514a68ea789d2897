"""Costs of each shape of a space, measured on untrained students before any training.

Latency and memory of a model do not depend on the values of its weights.
"""

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

from raydistill.cluster import snapshots
from raydistill.config.run import Run, Student
from raydistill.config.shapes import Shape, VocabularySize
from raydistill.core.paths import raydistill_home
from raydistill.evaluation import latency
from raydistill.evaluation.serving import LATENCY_BATCH_SIZES
from raydistill.inference.decoding import Engine, EngineOptions, Workload
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.loading import load_config
from raydistill.models.pruning import random_units
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import plan_student, shrink, student_config
from raydistill.models.teacher import Teacher, open_teacher
from raydistill.models.vocabulary import select_tokens, with_vocab_size
from raydistill.training.tokenized_data import select_student_tokens

# Cost by name: latency_ms (batch of 32) and latency_ms_b1 with their _low and _high, peak_mb, params_m, memory_mb
ShapeCosts = dict[str, float]
EngineOption = Literal["auto", "ctranslate2", "transformers"]
# An engine on an untrained student, and memory in MB in use before the engine was opened
OpenedStudent = tuple[Engine, float | None]
REPETITION = latency.Repetition(repeats=7, min_seconds=1.0)


@dataclass(frozen=True)
class ShapeTiming:
    """How shapes are timed.

    Attributes:
        source_tokens: Tokens read per row.
        output_tokens: Tokens written per row.
        engine: Name of the engine that serves the teacher.
        precision: That engine's precision.
        beams: Numbers of beams to time with.
        remeasure_noisy: Whether to repeat known timings that other processes disturbed.
    """

    source_tokens: int
    output_tokens: int
    engine: str
    precision: str
    beams: tuple[int, ...]
    remeasure_noisy: bool = True


@dataclass(frozen=True)
class TimedShape:
    """Costs of a shape with a number of beams.

    Attributes:
        costs: Costs by name.
        engine: Engine and precision of the timings, such as "ctranslate2 fp32".
        background_cores: CPU cores that other processes kept busy during the measurement.
    """

    costs: ShapeCosts
    engine: str
    background_cores: float


def time_shapes(
    run: Run,
    shapes: list[str],
    timing: ShapeTiming,
    label_folders: Mapping[str, Path],
    device: str,
    threads: int,
) -> dict[str, list[TimedShape]]:
    """Costs of each shape, as `time_shape` returns them. Call with `run_exclusive`, since load disturbs timings.

    Args:
        run: Names the teacher and the data; its training data decides which tokens are used.
        shapes: Names of the shapes.
        timing: Lengths, beams and the expected engine.
        label_folders: Folders of the label sets of the run by label source.
        device: "cpu" or "cuda".
        threads: CPU threads of the engine.
    """
    assert run.teacher is not None
    table = raydistill_home() / "latency.json"
    snapshots.pull(table, *label_folders.values())
    costs = {}
    for name in shapes:
        token_ids = _kept_tokens(run, Shape.parse(name).vocabulary, label_folders)
        teacher = open_teacher(run.teacher, run.dataset, token_ids)
        costs[name] = time_shape(teacher, name, timing, engine=run.evaluation.engine, device=device, threads=threads)
    snapshots.save(table)
    return costs


def _kept_tokens(
    run: Run, vocabulary: VocabularySize | None, label_folders: Mapping[str, Path]
) -> tuple[int, ...] | None:
    """Ids of as many tokens as a student of the run keeps; None for all.

    The cost depends on how many tokens there are, so a number of tokens needs no look at the data.
    """
    assert run.teacher is not None
    if vocabulary is None:
        return None
    teacher = open_teacher(run.teacher, run.dataset)
    config = load_config(teacher.location)
    if vocabulary != "used":
        return select_tokens(teacher.tokenizer, config, {}, vocabulary)
    used = run.model_copy(update={"student": run.student.model_copy(update={"vocabulary": vocabulary})})
    return select_student_tokens(used, teacher.tokenizer, config, label_folders)


def time_shape(
    teacher: Teacher,
    shape: str,
    timing: ShapeTiming,
    *,
    engine: EngineOption,
    device: str,
    threads: int,
) -> list[TimedShape]:
    """Costs of one shape for each of `timing.beams`.

    Known timings are read from RAYDISTILL_HOME/latency.json, and new ones are added.

    Args:
        teacher: The model whose layers the student has, with the tokens of the student.
        shape: Name of the shape, such as "12-3" or "12-3-ffn0.5-0.25".
        timing: Lengths, beams and the expected engine.
        engine: The engine to open, if a timing is missing.
        device: "cpu" or "cuda".
        threads: CPU threads of the engine.
    """
    plan = plan_student(teacher.model.config, Student.of_shape(Shape.parse(shape)))
    config = student_config(teacher.model.config, plan)
    weights = {
        "params_m": families.count_parameters(config) / 1e6,
        "memory_mb": families.weights_mb(config, timing.precision),
    }
    architecture, machine = families.architecture_key(config), latency.hardware(device, threads)
    make_key = partial(latency.measurement_key, machine, architecture, timing.engine, timing.precision)
    with tempfile.TemporaryDirectory(prefix="raydistill-shape-", ignore_cleanup_errors=True) as scratch:

        @cache
        def open_student() -> OpenedStudent:
            memory_before_mb = latency.used_memory_mb(device)
            student = shrink(teacher.model, plan, units=random_units(teacher.model.config, plan, seed=0))
            save_checkpoint(student, teacher.tokenizer, Path(scratch) / "model")
            cache_dir = Path(scratch) / "engine"
            options = EngineOptions(device=device, threads=threads, languages=teacher.languages, cache_dir=cache_dir)
            return open_engine(Path(scratch) / "model", engine, options), memory_before_mb

        return [_time_beams(beams, timing, make_key, open_student, weights) for beams in timing.beams]


def _time_beams(
    beams: int,
    timing: ShapeTiming,
    make_key: Callable[[Workload], dict[str, Any]],
    open_student: Callable[[], OpenedStudent],
    weights: ShapeCosts,
) -> TimedShape:
    """Latency with each batch size, and peak memory with the large one."""
    costs, background_cores, engine = dict(weights), 0.0, ""
    for cost, batch in LATENCY_BATCH_SIZES.items():
        workload = Workload(timing.source_tokens, timing.output_tokens, batch, beams)
        result, engine = _time_workload(workload, timing, make_key(workload), open_student)
        costs |= result.as_costs(cost)
        background_cores = max(background_cores, result.background_cores or 0.0)
        if cost == "latency_ms" and result.peak_mb is not None:
            costs["peak_mb"] = result.peak_mb
    return TimedShape(costs, engine, background_cores)


def _time_workload(
    workload: Workload,
    timing: ShapeTiming,
    key: dict[str, Any],
    open_student: Callable[[], OpenedStudent],
) -> tuple[latency.Timing, str]:
    """A timing from the table under `key`, or a new one, which is added to the table; and its engine."""
    table, expected = raydistill_home() / "latency.json", f"{timing.engine} {timing.precision}"
    known = latency.lookup(table, key)
    if known is not None and not (known.noisy and timing.remeasure_noisy):
        return known, expected
    engine, memory_before_mb = open_student()
    result = latency.measure(engine, workload, REPETITION, memory_before_mb)
    # Another engine is opened if CTranslate2 cannot be used; the key does not describe that engine's timings
    used = f"{engine.name} {engine.precision}"
    if used == expected:
        latency.record(table, key, result)
    return result, used


def count_params_m(config: Any, shape: str) -> float:
    """Millions of parameters of a student of this shape, at most for "used" tokens; allocates nothing.

    Args:
        config: The teacher's configuration.
        shape: Name of the shape, such as "12-3".
    """
    parsed = Shape.parse(shape)
    if isinstance(parsed.vocabulary, int):
        config = with_vocab_size(config, min(parsed.vocabulary, config.vocab_size))
    plan = plan_student(config, Student.of_shape(parsed))
    return families.count_parameters(student_config(config, plan)) / 1e6
