"""The teacher's scores on the data of a run, with which students are compared."""

from dataclasses import asdict

import numpy as np

from raydistill.config.presets import is_translation
from raydistill.config.run import Run
from raydistill.data.corpus import corpus_statistics
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES, choose_threads, hardware
from raydistill.evaluation.metrics import score, signatures
from raydistill.evaluation.rouge import lead_baseline
from raydistill.inference.decoding import Engine, EngineOptions, Workload, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.teacher import open_teacher
from raydistill.training.records import SplitScores
from raydistill.training.teacher_record import TeacherScores
from raydistill.training.tokenized_data import (
    TokenizedData,
    input_fingerprints,
    load_tokenized_data,
    tokenize_split,
)
from raydistill.training.validation import score_splits

# Output tokens of the calls by which the number of threads is chosen; each token takes about the same time.
TRIED_TOKENS = 8


def score_teacher(run: Run, device: str, threads: int) -> tuple[TeacherScores, dict[str, np.ndarray]]:
    """The teacher's scores with the run's decoding, and the statistics of the train split.

    Call with `run_exclusive`, since the number of threads with which the teacher decodes fastest is measured.

    Returns:
        The record teacher.json, and per-row statistics by split, [rows] or [rows, statistics].
    """
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    data = load_tokenized_data(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    preset_decoding = teacher.preset.decoding if teacher.preset else None
    beam = resolve_decoding(run.decoding, teacher.model.generation_config, preset_decoding, data.max_target_tokens)
    targets = tokenize_split(teacher.tokenizer, run.dataset, "train", "target", data.max_target_tokens)
    source_tokens, output_tokens = _mean_length(data.sources["train"]), _mean_length(targets)

    def open_with(threads: int) -> Engine:
        options = EngineOptions(device, threads, languages=teacher.languages, source_prefix=teacher.source_prefix)
        return open_engine(teacher.location, run.evaluation.engine, options)

    workload = Workload(source_tokens, min(output_tokens, TRIED_TOKENS), LATENCY_BATCH_SIZES["latency_ms"], beam.beams)
    threads = choose_threads(open_with, workload, threads)
    engine = open_with(threads)
    splits = [split for split in data.corpora if split in ("validation", "test")]
    evaluations = score_splits(engine, data, splits, beam, run.evaluation.batch_size, data.metrics)
    validation, test = evaluations["validation"], evaluations.get("test")
    scores = TeacherScores(
        name=run.teacher,
        key=teacher.key,
        commit=teacher.commit,
        size=families.size_name(teacher.model.config),
        metric=data.metric,
        metric_reason=data.metrics.reason,
        metrics=validation.scores.metrics,
        interval=validation.score_interval,
        repetition=validation.repetition_rate,
        test=SplitScores(**test.scores.metrics, interval=test.score_interval, engine=test.engine) if test else None,
        source_tokens=source_tokens,
        output_tokens=output_tokens,
        decoding=asdict(beam),
        signature=signatures(data.metrics.names),
        engine=engine.name,
        precision=engine.precision,
        machine=hardware(device, threads),
        data=input_fingerprints(run).data,
        rows={split: len(corpus) for split, corpus in data.corpora.items()},
        corpus=corpus_statistics(data.corpora["train"]),
        lead1=_score_lead1(run, data),
    )
    return scores, {split: evaluation.scores.row_stats for split, evaluation in evaluations.items()}


def _mean_length(rows: list[list[int]]) -> int:
    return round(sum(map(len, rows)) / len(rows))


def _score_lead1(run: Run, data: TokenizedData) -> dict[str, float] | None:
    """Test scores of the first sentence of the source as the summary; None for translation."""
    corpus = data.corpora.get("test")
    if corpus is None or is_translation(run.dataset, data.metric, corpus.columns):
        return None
    summaries = [lead_baseline(source, 1) for source in corpus.sources]
    return score(data.metric, summaries, corpus.targets, corpus.sources, data.metrics.reported).metrics
