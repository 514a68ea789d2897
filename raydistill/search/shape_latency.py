"""The latency table of a space: each shape timed once, before anything is trained."""

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from raydistill.config.run import Student
from raydistill.core.console import home
from raydistill.evaluation import latency
from raydistill.evaluation.serving import BATCHES
from raydistill.inference.decoding import Engine
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.shrinking import Plan, plan, shrink
from raydistill.training.run_folder import save_checkpoint
from raydistill.training.tokenized_data import Teacher


def time_shape(
    teacher: Teacher,
    size: str,
    about: dict[str, Any],
    beams: Sequence[int],
    engine: Literal["auto", "ctranslate2", "transformers"],
    device: str,
    threads: int,
    anew: bool = True,
) -> list[dict[str, float]]:
    """Milliseconds (batch of 32 and of 1: median, lowest, highest), parameters, weights and peak memory of one shape.

    One mapping for each number of beams, which also tells how many cores `others` kept busy at most. `about` holds the
    lengths in tokens to time with. The engine is the one that serves on this machine; what the table knows already is
    not timed again, unless others disturbed it and it is to be timed `anew`.
    """
    layers = plan(families.depths(teacher.model.config), Student(size=size))
    config = families.with_depths(teacher.model.config, *layers.size)
    parameters = latency.parameters(config)
    table = home() / "latency.json"
    lengths = {"source_tokens": about["tokens"]["source"], "output_tokens": about["tokens"]["output"]}
    name, precision = about["engine"].split()
    machine = latency.hardware(device, threads)
    weights = {"params_m": parameters / 1e6, "memory_mb": latency.memory_mb(config, precision)}
    rows: list[dict[str, float]] = []
    before: float | None = None
    opened: Engine | None = None
    scratch = Path(tempfile.mkdtemp(prefix="raydistill-shape-"))
    try:
        for many in beams:
            found: dict[str, float] = {"others": 0.0}
            for cost, batch in BATCHES.items():
                how = {"beams": many, "batch": batch, **lengths}
                facts = latency.facts_of(machine, latency.shape(config), name, precision, **how)
                timing = latency.lookup(table, facts)
                if timing is None or (timing.disturbed and anew):
                    if opened is None:
                        before = latency.held_mb(device)
                        opened = _open(teacher, layers, engine, device, threads, scratch)
                    timing = latency.measure(opened, repeats=7, min_seconds=1.0, held_before=before, **how)
                    if (opened.name, opened.precision) == (name, precision):  # else CTranslate2 could not be used
                        latency.record(table, facts, timing)
                found |= {cost: timing.median_ms, f"{cost}_low": timing.low_ms, f"{cost}_high": timing.high_ms}
                found["others"] = max(found["others"], timing.others or 0.0)
                if cost == "latency_ms" and timing.peak_mb is not None:
                    found["peak_mb"] = timing.peak_mb
            rows.append({**found, **weights})
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return rows


def _open(teacher: Teacher, layers: Plan, engine: Any, device: str, threads: int, scratch: Path) -> Engine:
    """An engine on an untrained student of the shape: its weights' values do not change its speed."""
    save_checkpoint(shrink(teacher.model, layers), teacher.tokenizer, scratch / "model")
    return open_engine(
        scratch / "model",
        engine,
        device=device,
        threads=threads,
        languages=teacher.languages,
        cache=scratch / "engine",
    )


def counted(config: Any, size: str) -> float:
    """Millions of parameters of a shape of a teacher's configuration; nothing is allocated."""
    encoder, decoder = plan(families.depths(config), Student(size=size)).size
    return latency.parameters(families.with_depths(config, encoder, decoder)) / 1e6
