"""One run, from config to checkpoint. Read this page first: it says in order what a training is.

`train` reads the data (material.py), makes the student and decides what is frozen (student.py) and what the teacher's
part comes from, trains (loop.py), and leaves in its folder (record.py): run.json (what was asked), metrics.jsonl (every
validation), best/ (the checkpoint) and, last of all, result.json (the scores). Called again on the same folder it goes
on where it was.
"""

import platform
import shutil
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from raydistill.config.run import Run
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.files import read_json, write_json_atomic
from raydistill.data.batching import Examples
from raydistill.data.corpus import corpus_statistics
from raydistill.evaluation.latency import hardware
from raydistill.evaluation.metrics import lead_baseline, score, signature
from raydistill.evaluation.scoring import EvaluationResult, evaluate
from raydistill.inference.decoding import resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.freezing import FrozenParts, freeze, resolve_frozen_parts
from raydistill.models.loading import load_model, load_tokenizer
from raydistill.models.shrinking import LayerPlan
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.policy import make_cache_layout
from raydistill.teacher_cache.reader import open_decoder_states, open_encoder_states
from raydistill.training.distillation import DistillationStep
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import NonFiniteLoss, ReportFn, autocast_dtype, fit
from raydistill.training.run_folder import (
    check_same_config,
    check_same_inputs,
    run_identity,
    run_lock,
    write_checkpoint_metadata,
    write_failed_result,
    write_row_statistics,
)
from raydistill.training.state import TrainingState
from raydistill.training.student import make_random_checkpoint, make_student, set_generation_config
from raydistill.training.tokenized_data import (
    Teacher,
    TokenizedData,
    load_tokenized_data,
    make_examples,
    open_teacher,
    tokenize_split,
)
from raydistill.training.validation import Validator, missing_metric_library
from raydistill.training.workers import Worker

MAX_EXTRA_REPETITION = 0.5


def train(
    run: Run, folder: Path, report: ReportFn, inputs: RunInputs | None = None, worker: Worker | None = None
) -> dict[str, Any]:
    """Carry out one run in `folder`; returns its result, as result.json holds it (empty for workers that follow).

    `report(metrics, folder)` is called after every validation, and stops the run by returning a reason: its best
    checkpoint is then scored and kept like any other, with the status "stopped". Raises UserError for what the user
    can mend.
    """
    inputs = inputs or RunInputs()
    worker = replace(worker or Worker(), compute_dtype=inputs.compute_dtype)
    folder.mkdir(parents=True, exist_ok=True)
    with run_lock(folder) if worker.is_main_process else nullcontext():
        if worker.world_size > 1:
            torch.distributed.barrier()  # the leader holds the folder before anyone reads what is in it
        return _train_locked(run, folder, report, inputs, worker)


def _train_locked(run: Run, folder: Path, report: ReportFn, inputs: RunInputs, worker: Worker) -> dict[str, Any]:
    started = time.monotonic()
    if worker.is_main_process:
        check_same_config(folder, run)
    done = folder / "result.json"
    if done.is_file():
        return read_json(done)
    teacher = open_teacher(run.teacher, run.dataset) if run.teacher else None
    student: PreTrainedModel
    layers: LayerPlan | None
    if teacher:
        tokenizer = teacher.tokenizer
        student, layers = make_student(run, teacher)
    else:
        place = make_random_checkpoint(run, folder, worker)
        tokenizer, student, layers = load_tokenizer(place), load_model(place), None
    material = load_tokenized_data(run, teacher.preset if teacher else None, tokenizer, student.config)
    if worker.is_main_process:
        check_same_inputs(folder, {"teacher": teacher.key if teacher else None, "data": material.fingerprints})
    examples = make_examples(run, material, tokenizer, inputs.label_folders)
    frozen = resolve_frozen_parts(run, layers)
    freeze(student, frozen)
    torch.nn.Module.to(student, worker.device)
    supervision = make_distillation_step(run, student, layers, teacher, examples, frozen, inputs, worker)
    if teacher and supervision.teacher is None:
        teacher.unload_model()
    beam = resolve_decoding(
        run.decoding,
        student.generation_config,
        teacher.preset.decoding if teacher and teacher.preset else None,
        material.max_target_tokens,
    )
    set_generation_config(student, beam, run.decoding)
    metric = _validation_metric(material, worker)
    languages = teacher.languages if teacher else None
    validator = Validator(run, student, tokenizer, material, beam, languages, worker.device, metric)
    startup = time.monotonic() - started
    try:
        state = fit(supervision, run.training, validator.validate, folder, report, worker, started)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"the GPU has too little memory: {str(error).partition('. ')[0]}. Lower training.micro_tokens, or where "
            f"runs share a GPU raise training.gpus; what is done is kept, and the same command goes on"
        ) from None
    except NonFiniteLoss as error:
        facts = {**run_identity(run, layers, families.size_name(student.config)), **inputs.result_fields}
        hours = error.seconds * worker.num_devices(run.training) / 3600
        return write_failed_result(folder, run, facts, str(error), hours) if worker.is_main_process else {}
    if not worker.is_main_process:
        return {}
    return _score_and_write_result(folder, layers, state, validator, inputs, teacher, worker, startup)


def make_distillation_step(
    run: Run,
    student: PreTrainedModel,
    layer_plan: LayerPlan | None,
    teacher: Teacher | None,
    examples: Examples,
    frozen: FrozenParts,
    inputs: RunInputs,
    worker: Worker,
) -> DistillationStep:
    """Decide where the teacher's part comes from: its cache, or the teacher itself, step by step."""
    autocast = autocast_dtype(run.training, worker)
    supervision = DistillationStep(
        student,
        None,
        examples,
        run.method,
        run.loss,
        layer_plan,
        encoder_shared=frozen.encoder_shared,
        lm_head_shared=frozen.embeddings and teacher is not None,
        lm_head_weight=frozen_lm_head_weight(student, autocast),
    )
    if teacher is None:
        return supervision
    supervision = replace(supervision, **_open_cached_states(run, teacher, examples, inputs, worker.device, autocast))
    encoder_taught = not frozen.encoder_shared and layer_plan is not None and not layer_plan.copies_full_encoder
    live = (
        not supervision.cached_decoder_states or encoder_taught or not frozen.embeddings or run.loss.alpha_attention > 0
    )
    if run.method == "kd" and live:
        torch.nn.Module.to(teacher.model, worker.device)
        supervision = replace(supervision, teacher=teacher.model)
    return supervision


def frozen_lm_head_weight(student: PreTrainedModel, autocast: torch.dtype | None) -> Tensor | None:
    """The output embedding in the precision of training, once for all steps, where it is frozen and not in it."""
    if autocast is None or families.trainable_lm_head_parameters(student):
        return None
    head: Any = student.lm_head
    return head.weight.detach().to(autocast)


def _open_cached_states(
    run: Run, teacher: Teacher, examples: Examples, inputs: RunInputs, device: str, autocast: torch.dtype | None
) -> dict[str, Any]:
    """The run's stores of the teacher cache, opened; made here first where nothing made them before."""
    keep = inputs.cache_mode if run.training.teacher_cache == "auto" else run.training.teacher_cache
    if inputs.cache_root is None or keep == "off":
        return {}
    computed = "fp32" if autocast is None else "bf16"
    labels = {run.label_key: examples}
    work = make_cache_layout([(run, keep)], labels, teacher.key, teacher.model.config, inputs.cache_root, computed)
    if work.is_incomplete():
        torch.nn.Module.to(teacher.model, device)
        build_cache(work, teacher.model)
    return {
        "encoded": open_encoder_states(work) if work.encoder else None,
        "decoded": open_decoder_states(work) if work.label_sets else {},
    }


def _validation_metric(data: TokenizedData, worker: Worker) -> str:
    """What validations are scored by: the run's metric, or val_loss where its library is missing."""
    missing = missing_metric_library(data.metric)
    if missing is None:
        return data.metric
    if worker.is_main_process:
        print_progress(
            f"{missing} is not installed: checkpoints are compared by validation loss, and none is scored by text"
        )
    return "val_loss"


def _score_and_write_result(
    folder: Path,
    layer_plan: LayerPlan | None,
    state: TrainingState,
    validator: Validator,
    inputs: RunInputs,
    teacher: Teacher | None,
    worker: Worker,
    startup_seconds: float,
) -> dict[str, Any]:
    """Score the best checkpoint with the full decoding, write its card, and last of all the result.

    `startup_seconds`: seconds from the run's start to its first step.
    """
    started = time.monotonic()
    run, material = validator.run, validator.data
    best, checkpoint = folder / "best", folder / f"checkpoint-{state.best_step}"
    if checkpoint.is_dir():  # else it was renamed by an earlier call, which died while it scored
        shutil.rmtree(best, ignore_errors=True)
        checkpoint.rename(best)
    # The test split is for reporting what may be served; a stopped trial that is chosen after all is scored on it then.
    splits = ("validation",) if state.stopped else ("validation", "test")
    found = validator.score(best, splits, validator.beam)
    validation, test = found.get("validation"), found.get("test")
    rows = {split: evaluation.scored.rows for split, evaluation in found.items()}
    if rows:
        write_row_statistics(folder / "rows.npz", rows)
    hours = (state.seconds + time.monotonic() - started) * worker.num_devices(run.training) / 3600
    what = run_identity(run, layer_plan, families.size_name(validator.student.config))
    if validation and (why := collapse_reason(validation.repetition, inputs.teacher_repetition)):
        # Its losses are whole: tables of losses read them, and know it by its repetition.
        ended = {} if state.stopped else {"repetition": validation.repetition}
        return write_failed_result(folder, run, {**what, **inputs.result_fields}, why, hours, ended)
    scorer = "val_loss" if validator.metric == "val_loss" else signature(validator.metric)
    result = {
        "key": folder.name,
        "status": "stopped" if state.stopped else "done",
        "reason": state.reason or "all epochs done",
        **what,
        **inputs.result_fields,
        "metrics": {
            **_best_metrics(state, validation, validator.metric),
            "params_m": sum(p.numel() for p in validator.student.parameters()) / 1e6,
            "gpu_hours": hours,
            "startup_s": startup_seconds,
            **inputs.costs,
        },
        "interval": list(validation.interval) if validation else None,
        "test": test.summary() if test else None,
        "steps": state.step,
        "best_step": state.best_step,
        "signature": scorer,
        "checkpoint": "best",
        "seed": run.training.seed,
        "alignment": teacher.alignment_error if teacher else None,
        "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
    }
    facts = {
        **what,
        "teacher_key": teacher.key if teacher else None,
        "teacher_commit": teacher.commit if teacher else None,
        "data": material.fingerprints,
        "scores": {split: evaluation.summary() for split, evaluation in found.items()},
        "decoding": asdict(validator.beam),
        "signature": scorer,
    }
    write_checkpoint_metadata(best, run, layer_plan, facts)
    write_json_atomic(folder / "result.json", result)
    for stale in folder.glob("state*"):
        stale.unlink()
    return result


def _best_metrics(state: TrainingState, validation: EvaluationResult | None, metric: str) -> dict[str, float]:
    """Of the best checkpoint: with the full decoding if it was scored with it, else as the loop found it."""
    at_best = next(m for m in state.history if m["step"] == state.best_step)
    metrics = {"score": at_best["score"], "val_loss": at_best["val_loss"]}
    if validation:
        scores = validation.scored.metrics
        metrics |= {**scores, "score": scores[metric], "repetition": validation.repetition}
    return metrics


def collapse_reason(repetition: float, teacher_repetition: float | None) -> str | None:
    """Why a student counts as failed, or None: half of its outputs more than the teacher's repeat themselves."""
    if teacher_repetition is None or repetition <= teacher_repetition + MAX_EXTRA_REPETITION:
        return None
    return (
        f"collapsed: {repetition:.0%} of its outputs repeat themselves (the teacher's: {teacher_repetition:.0%}); "
        f"try a lower "
        f"learning rate, more steps, or pseudo-labels"
    )


def score_teacher(run: Run, device: str, threads: int) -> dict[str, Any]:
    """The teacher's own scores on the run's data and decoding, with the training split's statistics.

    What students are compared with, and what latency is measured at. `scored` are per-row statistics by split.
    """
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset)
    material = load_tokenized_data(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    preset = teacher.preset.decoding if teacher.preset else None
    beam = resolve_decoding(run.decoding, teacher.model.generation_config, preset, material.max_target_tokens)
    engine = open_engine(
        teacher.location,
        run.evaluation.engine,
        device=device,
        threads=threads,
        languages=teacher.languages,
    )
    found = {
        split: evaluate(
            engine,
            corpus.sources,
            corpus.targets,
            material.metric,
            beam,
            max_source_tokens=material.max_source_tokens,
            batch_size=run.evaluation.batch_size,
        )
        for split, corpus in material.corpora.items()
        if split != "train"
    }
    targets = tokenize_split(teacher.tokenizer, run.dataset, "train", "target", material.max_target_tokens)
    sources = material.sources["train"]
    test = found.get("test")
    return {
        "name": run.teacher,
        "key": teacher.key,
        "commit": teacher.commit,
        "size": families.size_name(teacher.model.config),
        "metric": material.metric,
        "metrics": found["validation"].scored.metrics,
        "interval": list(found["validation"].interval),
        "repetition": found["validation"].repetition,
        "test": test.summary() if test else None,
        "tokens": {
            "source": round(sum(map(len, sources)) / len(sources)),
            "output": round(sum(map(len, targets)) / len(targets)),
        },
        "beams": beam.beams,
        "decoding": asdict(beam),
        "signature": signature(material.metric),
        "engine": f"{engine.name} {engine.precision}",
        "machine": hardware(device, threads),
        "data": material.fingerprints,
        "rows": {split: len(corpus) for split, corpus in material.corpora.items()},
        "scored": {split: evaluation.scored.rows for split, evaluation in found.items()},
        "corpus": corpus_statistics(material.corpora["train"]),
        "baseline": _lead_baseline(material),
    }


def _lead_baseline(data: TokenizedData) -> dict[str, Any] | None:
    """The first sentence as the summary: what a summariser has to beat on test."""
    if data.metric == "bleu" or "test" not in data.corpora:
        return None
    corpus = data.corpora["test"]
    return {"lead1": score("rouge2", [lead_baseline(s, 1) for s in corpus.sources], corpus.targets).metrics}
