"""The teacher's scores on the data of a run, with which students are compared."""

from dataclasses import asdict
from typing import Any

from raydistill.config.run import Run
from raydistill.data.corpus import corpus_statistics
from raydistill.evaluation.latency import hardware
from raydistill.evaluation.metrics import lead_baseline, score, signature
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.teacher import open_teacher
from raydistill.training.tokenized_data import TokenizedData, load_tokenized_data, tokenize_split
from raydistill.training.validation import score_splits


def score_teacher(run: Run, device: str, threads: int) -> dict[str, Any]:
    """The teacher's scores with the run's decoding, and the statistics of the train split.

    Returns:
        A record for teacher.json. "scored" holds per-row statistics by split, [rows] or [rows, 10]; "tokens" holds the
        mean lengths of sources and targets, at which latency is measured.
    """
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    data = load_tokenized_data(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    preset_decoding = teacher.preset.decoding if teacher.preset else None
    beam = resolve_decoding(run.decoding, teacher.model.generation_config, preset_decoding, data.max_target_tokens)
    engine = open_engine(
        teacher.location, run.evaluation.engine, EngineOptions(device, threads, languages=teacher.languages)
    )
    splits = [split for split in data.corpora if split != "train"]
    evaluations = score_splits(engine, data, splits, beam, run.evaluation.batch_size)
    validation, test = evaluations["validation"], evaluations.get("test")
    targets = tokenize_split(teacher.tokenizer, run.dataset, "train", "target", data.max_target_tokens)
    return {
        "name": run.teacher,
        "key": teacher.key,
        "commit": teacher.commit,
        "size": families.size_name(teacher.model.config),
        "metric": data.metric,
        "metrics": validation.scores.metrics,
        "interval": list(validation.score_interval),
        "repetition": validation.repetition_rate,
        "test": test.summary() if test else None,
        "tokens": {"source": _mean_length(data.sources["train"]), "output": _mean_length(targets)},
        "beams": beam.beams,
        "decoding": asdict(beam),
        "signature": signature(data.metric),
        "engine": f"{engine.name} {engine.precision}",
        "machine": hardware(device, threads),
        "data": data.fingerprints,
        "rows": {split: len(corpus) for split, corpus in data.corpora.items()},
        "scored": {split: evaluation.scores.row_stats for split, evaluation in evaluations.items()},
        "corpus": corpus_statistics(data.corpora["train"]),
        "baseline": _lead_baseline(data),
    }


def _mean_length(rows: list[list[int]]) -> int:
    return round(sum(map(len, rows)) / len(rows))


def _lead_baseline(data: TokenizedData) -> dict[str, Any] | None:
    """Test scores of the first sentence of the source as the summary; None for translation."""
    if data.metric == "bleu" or "test" not in data.corpora:
        return None
    corpus = data.corpora["test"]
    return {"lead1": score("rouge2", [lead_baseline(s, 1) for s in corpus.sources], corpus.targets).metrics}
