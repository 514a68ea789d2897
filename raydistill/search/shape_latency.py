"""The latency table of a space: each shape timed once, before anything is trained."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from raydistill.config.run import Student
from raydistill.core.paths import raydistill_home
from raydistill.evaluation import latency
from raydistill.evaluation.serving import LATENCY_BATCH_SIZES
from raydistill.inference.decoding import Engine, EngineOptions, Workload
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import LayerPlan, plan_layers, shrink
from raydistill.models.teacher import Teacher

REPETITION = latency.Repetition(repeats=7, min_seconds=1.0)


def time_shape(
    teacher: Teacher,
    size: str,
    teacher_record: dict[str, Any],
    beams: Sequence[int],
    engine: Literal["auto", "ctranslate2", "transformers"],
    device: str,
    threads: int,
    remeasure_noisy: bool = True,
) -> list[dict[str, float]]:
    """Milliseconds (batch of 32 and of 1: median, lowest, highest), parameters, weights and peak memory of one shape.

    One mapping for each number of beams, which also tells how many cores `others` kept busy at most.
    `teacher_record` holds the
    lengths in tokens to time with. The engine is the one that serves on this machine; what the table knows already is
    not timed again, unless others disturbed it and it is to be timed `remeasure_noisy`.
    """
    layers = plan_layers(families.num_layers(teacher.model.config), Student(size=size))
    config = families.with_num_layers(teacher.model.config, *layers.size)
    parameters = families.count_parameters(config)
    table = raydistill_home() / "latency.json"
    lengths = {"source_tokens": teacher_record["tokens"]["source"], "output_tokens": teacher_record["tokens"]["output"]}
    name, precision = teacher_record["engine"].split()
    machine = latency.hardware(device, threads)
    weights = {"params_m": parameters / 1e6, "memory_mb": families.weights_mb(config, precision)}
    rows: list[dict[str, float]] = []
    before: float | None = None
    opened: Engine | None = None
    scratch = Path(tempfile.mkdtemp(prefix="raydistill-shape-"))
    try:
        for many in beams:
            found: dict[str, float] = {"others": 0.0}
            for cost, batch in LATENCY_BATCH_SIZES.items():
                workload = Workload(batch=batch, beams=many, **lengths)
                facts = latency.measurement_key(machine, families.architecture_key(config), name, precision, workload)
                timing = latency.lookup(table, facts)
                if timing is None or (timing.noisy and remeasure_noisy):
                    if opened is None:
                        before = latency.used_memory_mb(device)
                        opened = _open_untrained_student(teacher, layers, engine, device, threads, scratch)
                    timing = latency.measure(opened, workload, REPETITION, memory_before_mb=before)
                    if (opened.name, opened.precision) == (name, precision):  # else CTranslate2 could not be used
                        latency.record(table, facts, timing)
                found |= timing.as_costs(cost)
                found["others"] = max(found["others"], timing.background_cores or 0.0)
                if cost == "latency_ms" and timing.peak_mb is not None:
                    found["peak_mb"] = timing.peak_mb
            rows.append({**found, **weights})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def _open_untrained_student(
    teacher: Teacher, layers: LayerPlan, engine: Any, device: str, threads: int, scratch: Path
) -> Engine:
    """An engine on an untrained student of the shape: its weights' values do not change its speed."""
    save_checkpoint(shrink(teacher.model, layers), teacher.tokenizer, scratch / "model")
    return open_engine(
        scratch / "model",
        engine,
        EngineOptions(device=device, threads=threads, languages=teacher.languages, cache_dir=scratch / "engine"),
    )


def count_params_m(config: Any, size: str) -> float:
    """Millions of parameters of a shape of a teacher's configuration; nothing is allocated."""
    encoder, decoder = plan_layers(families.num_layers(config), Student(size=size)).size
    return families.count_parameters(families.with_num_layers(config, encoder, decoder)) / 1e6
