"""The sides of a comparison: ways to write texts, in plain processes without Ray, start-up apart from writing.

Each process opens its model, writes a few rows to be warm, and waits for the others; then the batches are handed out
one by one, as Ray's pool does it, and the clock runs until the last one is written.
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

START_SECONDS = 1800  # a process that has not opened its model by then never will
WARM_ROWS = 2

Write = Callable[[list[str]], list[str]]


@dataclass(frozen=True)
class GenerationTask:
    """What is written: by which checkpoint and how; `sample` is a few of the sources, `cache` holds conversions."""

    checkpoint: str
    beam: BeamSearchParams
    max_source_tokens: int
    sample: tuple[str, ...]
    cache: Path


@dataclass(frozen=True)
class Side:
    """`generate` is the obvious loop over plain transformers; the others are our engines."""

    name: str
    engine: Literal["generate", "transformers", "ctranslate2"]
    precision: str = "fp32"
    device: str = "cpu"
    processes: int = 2
    threads: int = 1
    rows_at_once: int | None = None


@dataclass(frozen=True)
class GenerationResult:
    """The texts of each batch, who ended it when (process id, seconds of the clock), and seconds in all.

    `startup` is the time from no process to all of them warm, and is not among `seconds`.
    """

    texts: list[list[str]]
    ends: list[tuple[int, float]]
    seconds: float
    startup: float


def make_task(job: LabelJob, cache: Path) -> GenerationTask:
    """The job's teacher and decoding as the product resolves them."""
    found = scan_split(job.dataset, job.split)
    description = describe_job(job, found)
    beam, max_source_tokens = beam_search_params(description)
    rows = usable_rows(job.dataset, job.split, found)
    sample = tuple(row.source for row, _ in zip(rows, range(NUM_CALIBRATION_ROWS), strict=False))
    return GenerationTask(description.teacher.path, beam, max_source_tokens, sample, cache)


def generate_batches(side: Side, work: GenerationTask, batches: list[list[str]]) -> GenerationResult:
    """Write the texts of all batches with one side. With no batches the model is opened and that is all."""
    spawn = multiprocessing.get_context("spawn")
    ready = spawn.Barrier(side.processes + 1)
    began = time.perf_counter()
    with _environment(side), spawn.Pool(side.processes, _open, (side, work, ready)) as pool:
        ready.wait(START_SECONDS)
        started = time.perf_counter()
        done = list(pool.imap(_write_one, batches))
        seconds = time.perf_counter() - started
        pool.close()
        pool.join()
    return GenerationResult([texts for texts, _ in done], [end for _, end in done], seconds, started - began)


def plain_generate(side: Side, work: GenerationTask) -> Write:
    """The body of the obvious loop, with nothing of ours: tokenize a batch, pad it, `generate`, decode."""
    import torch
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(side.threads)
    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(work.checkpoint)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[side.precision]
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(work.checkpoint, dtype=dtype).to(side.device).eval()
    beam = work.beam
    searching = {"length_penalty": beam.length_penalty, "early_stopping": beam.early_stopping}

    def write(texts: list[str]) -> list[str]:
        batch = tokenizer(texts, padding=True, truncation=True, max_length=work.max_source_tokens, return_tensors="pt")
        batch = batch.to(side.device)
        with torch.inference_mode():
            written = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                do_sample=False,
                num_beams=beam.beams,
                min_length=beam.min_length,
                max_length=beam.max_length,
                no_repeat_ngram_size=beam.no_repeat_ngram,
                **(searching if beam.beams > 1 else {}),
            )
        return [text.strip() for text in tokenizer.batch_decode(written, skip_special_tokens=True)]

    return write


def our_engine(side: Side, work: GenerationTask) -> Write:
    """An engine as the product's actors open and call it."""
    engine = open_engine(
        work.checkpoint,
        "transformers" if side.engine == "transformers" else "ctranslate2",
        EngineOptions(
            device=side.device,
            threads=side.threads,
            precision=side.precision,
            cache_dir=work.cache,
            allow_fallback=False,
        ),
        calibration=CalibrationRows(work.sample, work.beam, work.max_source_tokens),
    )

    def write(texts: list[str]) -> list[str]:
        found = engine.generate(
            texts,
            work.beam,
            max_source_tokens=work.max_source_tokens,
            batch_size=side.rows_at_once or (CPU_BATCH_SIZES[side.engine] if side.device == "cpu" else GPU_BATCH_SIZE),
        )
        return [hypotheses[0].text.strip() for hypotheses in found]

    return write


_writer: list[Write] = []  # of this process, once it is open


def _open(side: Side, work: GenerationTask, ready: Any) -> None:
    try:
        write = plain_generate(side, work) if side.engine == "generate" else our_engine(side, work)
        write(list(work.sample[:WARM_ROWS]))
    except BaseException:
        ready.abort()  # the others would wait for this one
        raise
    _writer[:] = [write]
    ready.wait(START_SECONDS)


def _write_one(texts: list[str]) -> tuple[list[str], tuple[int, float]]:
    return _writer[0](texts), (os.getpid(), time.time())


@contextmanager
def _environment(side: Side) -> Iterator[None]:
    """What processes of a side are born with: ours as Ray's workers are, the plain loop as a shell's."""
    before = dict(os.environ)
    quiet = {"PYTHONWARNINGS": "ignore", "TOKENIZERS_PARALLELISM": "false"}
    os.environ |= {"OMP_NUM_THREADS": str(side.threads), **(quiet if side.engine == "generate" else ENV_DEFAULTS)}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
