"""Sides of a comparison: ways to generate texts in plain processes without Ray, with start-up timed separately.

Each process opens its model, generates a few rows to warm up, and waits for the other processes. The batches are then
distributed one by one, as Ray's actor pool does, and the time is measured until the last batch is finished.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from raydistill.cluster.start import ENV_DEFAULTS
from raydistill.data.streaming import scan_split, usable_rows
from raydistill.inference.decoding import BeamSearchParams, CalibrationRows, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.jobs.pseudolabel import (
    CPU_BATCH_SIZES,
    GPU_BATCH_SIZE,
    NUM_CALIBRATION_ROWS,
    LabelJob,
    beam_search_params,
    describe_job,
)

START_TIMEOUT_S = 1800  # for all processes to open their models
WARMUP_ROWS = 2

GenerateFn = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class GenerationTask:
    """What every side generates.

    Attributes:
        checkpoint: the model's folder or hub name.
        beam: the parameters of beam search.
        max_source_tokens: sources are truncated to this length.
        sample: a few sources, for warm-up and calibration.
        cache: the folder of converted models.
    """

    checkpoint: str
    beam: BeamSearchParams
    max_source_tokens: int
    sample: tuple[str, ...]
    cache: Path


@dataclass(frozen=True)
class Side:
    """One side of a comparison.

    Attributes:
        name: shown in tables.
        engine: "generate" is a plain loop over transformers' `generate`; the others are this package's engines.
        precision: the engine's precision.
        device: "cpu" or "cuda".
        processes: number of processes.
        threads: threads per process.
        batch_size: rows generated at once; by default as in the label job.
        sorted_rows: whether a plain loop reads the rows by length, longest first, instead of in the order of the data.
    """

    name: str
    engine: Literal["generate", "transformers", "ctranslate2"]
    precision: str = "fp32"
    device: str = "cpu"
    processes: int = 2
    threads: int = 1
    batch_size: int | None = None
    sorted_rows: bool = False


@dataclass(frozen=True)
class GenerationResult:
    """The texts that a side generated.

    Attributes:
        texts: the texts of each batch.
        ends: process id and time (seconds since the epoch) of the end of each batch.
        seconds: from the first batch to the end of the last one.
        startup: seconds until all processes were warm; not part of `seconds`.
    """

    texts: list[list[str]]
    ends: list[tuple[int, float]]
    seconds: float
    startup: float


def make_task(job: LabelJob, cache: Path) -> GenerationTask:
    """The task of a label job, with teacher and decoding resolved as the job does."""
    scan_result = scan_split(job.dataset, job.split)
    description = describe_job(job, scan_result)
    beam, max_source_tokens = beam_search_params(description)
    rows = usable_rows(job.dataset, job.split, scan_result)
    sample = tuple(row.source for row, _ in zip(rows, range(NUM_CALIBRATION_ROWS), strict=False))
    return GenerationTask(description.teacher.path, beam, max_source_tokens, sample, cache)


def generate_batches(side: Side, task: GenerationTask, batches: list[list[str]]) -> GenerationResult:
    """Generate the texts of all batches with one side. Without batches, the models are only opened."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(side.processes + 1)
    launch = time.perf_counter()
    with _process_environment(side), spawn.Pool(side.processes, _initialize_process, (side, task, ready)) as pool:
        ready.wait(START_TIMEOUT_S)
        start = time.perf_counter()
        done = list(pool.imap(_generate_batch, batches))
        seconds = time.perf_counter() - start
        pool.close()
        pool.join()
    return GenerationResult([texts for texts, _ in done], [end for _, end in done], seconds, start - launch)


def plain_generate(side: Side, task: GenerationTask) -> GenerateFn:
    """The body of a plain loop that uses only transformers: tokenize a batch, pad, call `generate`, decode."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(side.threads)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(task.checkpoint)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[side.precision]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(task.checkpoint, dtype=dtype).to(side.device).eval()
    beam = task.beam
    beam_options = {"length_penalty": beam.length_penalty, "early_stopping": beam.early_stopping}

    def generate(texts: list[str]) -> list[str]:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=task.max_source_tokens, return_tensors="pt")
        batch = batch.to(side.device)
        with torch.inference_mode():
            output = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                num_beams=beam.beams,
                min_length=beam.min_length,
                max_length=beam.max_length,
                no_repeat_ngram_size=beam.no_repeat_ngram,
                **(beam_options if beam.beams > 1 else {}),
            )
        return [text.strip() for text in tokenizer.batch_decode(output, skip_special_tokens=True)]

    return generate


def engine_generate(side: Side, task: GenerationTask) -> GenerateFn:
    """One of this package's engines, opened and called as in the label job's actors."""
    engine = open_engine(
        task.checkpoint,
        "transformers" if side.engine == "transformers" else "ctranslate2",
        EngineOptions(
            device=side.device,
            threads=side.threads,
            precision=side.precision,
            cache_dir=task.cache,
            allow_fallback=False,
        ),
        calibration=CalibrationRows(task.sample, task.beam, task.max_source_tokens),
    )
    default_batch_size = CPU_BATCH_SIZES[side.engine] if side.device == "cpu" else GPU_BATCH_SIZE

    def generate(texts: list[str]) -> list[str]:
        rows = engine.generate(
            texts,
            task.beam,
            max_source_tokens=task.max_source_tokens,
            batch_size=side.batch_size or default_batch_size,
        )
        return [hypotheses[0].text.strip() for hypotheses in rows]

    return generate


_generate_fn: list[GenerateFn] = []  # of this process, once its model is open


def _initialize_process(side: Side, task: GenerationTask, ready: Any) -> None:
    try:
        generate = plain_generate(side, task) if side.engine == "generate" else engine_generate(side, task)
        generate(list(task.sample[:WARMUP_ROWS]))
    except BaseException:
        ready.abort()  # the other processes would wait for this one
        raise
    _generate_fn[:] = [generate]
    ready.wait(START_TIMEOUT_S)


def _generate_batch(texts: list[str]) -> tuple[list[str], tuple[int, float]]:
    return _generate_fn[0](texts), (os.getpid(), time.time())


@contextmanager
def _process_environment(side: Side) -> Iterator[None]:
    """Context with the environment of a side's processes: Ray's workers for an engine, a shell for the plain loop."""
    before = dict(os.environ)
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": str(side.threads), **(quiet if side.engine == "generate" else ENV_DEFAULTS)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
