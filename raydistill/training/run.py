"""One run, from config to checkpoint. Read this page first: it says in order what a training is.

`train` reads the data, makes the student, decides what is frozen and what the teacher's part comes from, trains, and
leaves in its folder: run.json (what was asked), metrics.jsonl (every validation), best/ (the checkpoint) and, last of
all, result.json (the scores). Called again on the same folder it goes on where it was.
"""

import itertools
import json
import shutil
import time
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.errors import UserError
from raydistill.config.files import write_atomic, write_json_atomic
from raydistill.config.presets import DATASETS, TeacherPreset, teacher_preset
from raydistill.config.run import Dataset, Decoding, Run, Start
from raydistill.data.batches import Examples, buckets
from raydistill.data.corpus import Corpus, read_corpus, split_names
from raydistill.data.labels import choose_targets, read_label_set
from raydistill.evaluation.checkpoint import Evaluation, evaluate
from raydistill.evaluation.scores import signature
from raydistill.model import forms
from raydistill.model.generate import Beam, open_engine, resolve_decoding
from raydistill.model.shrink import Plan, plan, shrink
from raydistill.model.start import build_tokenizer, new_model
from raydistill.model.teachers import (
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    tokenize_sources,
    tokenize_targets,
)
from raydistill.training.loop import Diverged, Report, State, Worker, fit
from raydistill.training.losses import cross_entropy
from raydistill.training.supervision import Supervision
from raydistill.training.teacher_cache import (
    Ragged,
    decoder_store,
    encoder_bytes,
    encoder_store,
    source_tensors,
    target_tensor,
)

CARD = "raydistill.json"


@dataclass(frozen=True)
class Inputs:
    """What was made before the run: a label set's folder, the root of the teacher cache, and the shape's costs."""

    labels: Path | None = None
    cache: Path | None = None
    costs: dict[str, float] = field(default_factory=dict)
    note: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Teacher:
    """A loaded teacher with all that depends on it and the data alone; shared by the runs of one process."""

    where: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    key: str
    preset: TeacherPreset | None


@dataclass(frozen=True)
class Material:
    """Texts and their tokens by split."""

    corpora: dict[str, Corpus]
    sources: dict[str, list[list[int]]]
    max_source_tokens: int
    max_target_tokens: int
    metric: str


def train(
    run: Run, folder: Path, report: Report, inputs: Inputs | None = None, worker: Worker | None = None
) -> dict[str, Any]:
    """Carry out one run in `folder`; returns its result, as result.json holds it (empty for workers that follow).

    `report(metrics, folder)` is called after every validation. Raises UserError for what the user can mend.
    """
    inputs, worker = inputs or Inputs(), worker or Worker()
    done = folder / "result.json"
    if done.is_file():
        return json.loads(done.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    if worker.leads:
        _claim(folder, run)
    teacher = open_teacher(run.teacher, run.dataset.name) if run.teacher else None
    tokenizer = teacher.tokenizer if teacher else _own_tokenizer(run, folder, worker)
    student, layers = make_student(run, teacher, tokenizer)
    material = load_material(run, teacher.preset if teacher else None, tokenizer, student.config)
    examples = make_examples(run, material, tokenizer, inputs)
    student.to(worker.device)
    if teacher:
        teacher.model.to(worker.device)
    shared = freeze(run, student, layers)
    supervision = supervise(run, student, layers, teacher, examples, shared, inputs)
    beam = resolve_decoding(
        run.decoding,
        student.generation_config,
        teacher.preset.decoding if teacher and teacher.preset else None,
        material.max_target_tokens,
    )
    remember_decoding(student, beam, run.decoding)
    scorer = _Validator(run, student, tokenizer, material, beam, inputs, teacher, shared, worker)
    recorder = _recorder(folder, report, worker)
    try:
        state = fit(supervision, run.training, scorer.validate, folder, recorder, worker)
    except Diverged as error:
        return _fail(folder, run, layers, inputs, str(error), worker)
    return _finish(folder, run, layers, state, scorer, material, inputs, teacher, worker) if worker.leads else {}


@lru_cache(maxsize=2)
def open_teacher(name: str, dataset: str) -> Teacher:
    """Load a teacher once per process: weights, tokenizer, fingerprint, preset."""
    preset = teacher_preset(name, dataset)
    where = locate(name, dataset)
    languages = preset.languages if preset else None
    model = load_model(where)
    model.requires_grad_(False)
    return Teacher(where, model, load_tokenizer(where, languages), fingerprint(model), preset)


def make_student(
    run: Run, teacher: Teacher | None, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreTrainedModel, Plan | None]:
    """The untrained student (or new model) and, for a student, which layers it copies and is supervised by."""
    if teacher is None:
        assert run.start is not None
        dropout = 0.1 if run.training.dropout is None else run.training.dropout
        return new_model(run.start, tokenizer, dropout, run.training.seed), None
    layers = plan(forms.depths(teacher.model.config), run.student)
    student = shrink(teacher.model, layers, run.training.seed)
    if run.training.dropout is not None:
        _set_dropout(student, run.training.dropout)
    return student, layers


def freeze(run: Run, student: PreTrainedModel, layers: Plan | None) -> bool:
    """Freeze what the run asks for; returns whether the student's encoder stays the teacher's own.

    By default a shrunk student (a `size` is given) keeps its embeddings and, when fully copied, its encoder.
    """
    settings = run.training
    shrunk = layers is not None and run.student.size is not None
    complete = layers is not None and layers.encoder_complete
    frozen_embeddings = shrunk if settings.freeze_embeddings is None else settings.freeze_embeddings
    frozen_encoder = shrunk and complete if settings.freeze_encoder is None else settings.freeze_encoder
    for parameter in forms.embeddings(student) if frozen_embeddings else []:
        parameter.requires_grad_(False)
    for parameter in forms.encoder_layers(student) if frozen_encoder else []:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("nothing is left to train: encoder, embeddings and decoder are all frozen")
    _hold_padding_row(student)
    return bool(frozen_embeddings and frozen_encoder and complete)


def load_material(run: Run, preset: TeacherPreset | None, tokenizer: PreTrainedTokenizerBase, config: Any) -> Material:
    """Read and tokenise the splits; the test split is optional."""
    known = DATASETS.get(run.dataset.name)
    source = _length(run.dataset, "max_source_tokens", preset, known, config, 512)
    target = _length(run.dataset, "max_target_tokens", preset, known, config, 128)
    metric = run.evaluation.metric
    if metric == "auto":
        metric = known.metric if known else "rouge2"
    corpora = {split: c for split in ("train", "validation", "test") if (c := read_split(run.dataset, split))}
    if "train" not in corpora or "validation" not in corpora:
        raise UserError(
            f"{run.dataset.name}: training needs a train and a validation split; found {', '.join(corpora) or 'none'}"
        )
    sources = {split: tokens(tokenizer, run.dataset, split, "source", source) for split in ("train", "validation")}
    return Material(corpora, sources, source, target, metric)


@lru_cache(maxsize=8)
def read_split(dataset: Dataset, split: str) -> Corpus | None:
    """A split, read once per process; None where the data set does not have it."""
    return read_corpus(dataset, split) if split in split_names(dataset) else None


def make_examples(run: Run, material: Material, tokenizer: PreTrainedTokenizerBase, inputs: Inputs) -> Examples:
    """The tokenised training pairs, with the labels that the run asks for."""
    corpus = material.corpora["train"]
    labels = run.label_source
    where = inputs.labels or (Path(labels) if labels not in ("original", "pseudo", "original+pseudo") else None)
    pseudo = read_label_set(where) if where and labels != "original" else None
    rows, targets = choose_targets(corpus.ids, corpus.targets, labels, pseudo)
    return Examples(material.sources["train"], tokenize_targets(tokenizer, targets, material.max_target_tokens), rows)


def supervise(
    run: Run,
    student: PreTrainedModel,
    layers: Plan | None,
    teacher: Teacher | None,
    examples: Examples,
    shared: bool,
    inputs: Inputs,
) -> Supervision:
    """Decide where the teacher's part comes from: its cache, or the teacher itself, step by step."""
    kd = run.method == "kd"
    live = Supervision(
        student, teacher.model if teacher and kd else None, examples, run.method, run.loss, layers, shared
    )
    if teacher is None or inputs.cache is None or run.training.teacher_cache == "off":
        return live
    encoded = None
    if shared:
        encoded = encoder_store(inputs.cache, teacher.model, examples.sources, teacher.key)
    decoded: dict[int, Ragged] = {}
    if kd and run.training.teacher_cache != "encoder":
        decoded = decoder_store(inputs.cache, teacher.model, examples, encoded, live.layers_needed, teacher.key)
    return Supervision(student, live.teacher, examples, run.method, run.loss, layers, shared, encoded, decoded)


def cache_bytes(run: Run, layers: Plan, examples: Examples, width: int, teacher_layers: int) -> int:
    """Disk that the run's teacher cache takes: bf16 encoder states and, for kd, the decoder layers it needs."""
    need = encoder_bytes([len(s) for s in examples.sources], width)
    if run.method == "kd":
        wanted = {*layers.supervised_decoder, teacher_layers - 1} if run.loss.alpha_hidden > 0 else {teacher_layers - 1}
        need += encoder_bytes([len(t) for t in examples.targets], width) * len(wanted)
    return need


def remember_decoding(student: PreTrainedModel, beam: Beam, asked: Decoding) -> None:
    """Write the decoding into the checkpoint's generation config, where it has none or the run asks for its own."""
    config = student.generation_config
    pairs = {
        "num_beams": (beam.beams, asked.beams),
        "length_penalty": (beam.length_penalty, asked.length_penalty),
        "min_length": (beam.min_length, asked.min_length),
        "max_length": (beam.max_length, asked.max_length),
        "no_repeat_ngram_size": (beam.no_repeat_ngram, asked.no_repeat_ngram),
    }
    for name, (value, wanted) in pairs.items():
        if wanted is not None or getattr(config, name, None) is None:
            setattr(config, name, value)


@dataclass
class _Validator:
    """Scores the student as it is: loss on the validation rows, then generation through a serving engine."""

    run: Run
    student: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    material: Material
    beam: Beam
    inputs: Inputs
    teacher: Teacher | None
    shared: bool
    worker: Worker

    def validate(self, folder: Path) -> dict[str, float]:
        """Write the student into `folder` and score it there."""
        self.student.eval()
        save_checkpoint(self.student, self.tokenizer, folder)
        beams = self.run.evaluation.validation_beams or min(2, self.beam.beams)
        found = self.score(folder, "validation", beams)
        return {
            "val_loss": self.loss(),
            **found.scored.metrics,
            "score": found.scored.metrics[self.material.metric],
            "repetition": found.repetition,
        }

    def score(self, folder: Path, split: str, beams: int) -> Evaluation:
        """Generate and score a split with the checkpoint in `folder`."""
        engine = open_engine(
            folder,
            self.run.evaluation.engine,
            device=self.worker.device,
            threads=self.run.training.threads,
            languages=self.teacher.preset.languages if self.teacher and self.teacher.preset else None,
            cache=folder.parent / ".engine",
        )
        corpus = self.material.corpora[split]
        try:
            return evaluate(
                engine,
                corpus.sources,
                corpus.targets,
                self.material.metric,
                self.beam.with_beams(beams),
                max_source_tokens=self.material.max_source_tokens,
                batch_size=self.run.evaluation.batch_size,
            )
        finally:
            shutil.rmtree(folder.parent / ".engine", ignore_errors=True)

    def loss(self) -> float:
        """Mean cross-entropy per real target token of the validation rows."""
        sources = self.material.sources["validation"]
        targets = tokens(self.tokenizer, self.run.dataset, "validation", "target", self.material.max_target_tokens)
        total, count = 0.0, 0
        with torch.inference_mode():
            for batch in buckets([len(s) for s in sources], 8192):
                ids, mask = source_tensors(self.student, [sources[i] for i in batch])
                labels = target_tensor(self.student, [targets[i] for i in batch])
                encoded = forms.encode(self.student, ids, mask).last
                hidden = forms.decode(self.student, forms.shift_right(self.student, labels), encoded, mask).last
                real = labels != -100
                total += float(cross_entropy(forms.head(self.student, hidden[real]), labels[real]))
                count += int(real.sum())
        return total / count


def save_checkpoint(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """A folder that `from_pretrained` reads (safetensors); whole or not at all."""
    making = folder.with_name(f".{folder.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    model.save_pretrained(making)
    tokenizer.save_pretrained(making)
    shutil.rmtree(folder, ignore_errors=True)
    making.rename(folder)


def _finish(
    folder: Path,
    run: Run,
    layers: Plan | None,
    state: State,
    scorer: _Validator,
    material: Material,
    inputs: Inputs,
    teacher: Teacher | None,
    worker: Worker,
) -> dict[str, Any]:
    """Score the best checkpoint with the full decoding, write its card, and last of all the result."""
    started = time.monotonic()
    best = folder / "best"
    if not best.is_dir():
        (folder / f"checkpoint-{state.best_step}").rename(best)
    validation = scorer.score(best, "validation", scorer.beam.beams)
    test = scorer.score(best, "test", scorer.beam.beams) if "test" in material.corpora else None
    rows = {"validation": validation.scored.rows} | ({"test": test.scored.rows} if test else {})
    _write_rows(folder / "rows.npz", rows)
    at_best = next(m for m in state.history if m["step"] == state.best_step)
    seconds = (state.seconds + time.monotonic() - started) * worker.world
    parameters = sum(p.numel() for p in scorer.student.parameters())
    metrics = {
        **validation.scored.metrics,
        "score": validation.scored.metrics[material.metric],
        "val_loss": at_best["val_loss"],
        "repetition": validation.repetition,
        "params_m": parameters / 1e6,
        "gpu_hours": seconds / 3600,
        **inputs.costs,
    }
    result = {
        "key": folder.name,
        "status": "done",
        "reason": state.reason or "all epochs done",
        **_identity(run, layers, scorer.student),
        **inputs.note,
        "metrics": metrics,
        "interval": list(validation.interval),
        "test": test.summary() if test else None,
        "steps": state.step,
        "best_step": state.best_step,
        "signature": signature(material.metric),
        "checkpoint": "best",
        "seed": run.training.seed,
    }
    card = {
        "teacher": run.teacher,
        "teacher_fingerprint": teacher.key if teacher else None,
        **_identity(run, layers, scorer.student),
        "supervised": layers.supervised if layers else None,
        "config": run.model_dump(mode="json"),
        "data": {split: corpus.fingerprint for split, corpus in material.corpora.items()},
        "scores": {"validation": validation.summary(), "test": test.summary() if test else None},
        "decoding": scorer.beam.summary(),
        "signature": result["signature"],
        "versions": {name: version(name) for name in ("raydistill", "torch", "transformers")},
    }
    write_json_atomic(best / CARD, card)
    write_json_atomic(folder / "result.json", result)
    for stale in folder.glob("state*"):
        stale.unlink()
    return result


def _fail(folder: Path, run: Run, layers: Plan | None, inputs: Inputs, reason: str, worker: Worker) -> dict[str, Any]:
    if not worker.leads:
        return {}
    result = {
        "key": folder.name,
        "status": "failed",
        "reason": reason,
        **_identity(run, layers, None),
        **inputs.note,
        "metrics": {},
        "interval": None,
        "test": None,
        "seed": run.training.seed,
    }
    write_json_atomic(folder / "result.json", result)
    return result


def _identity(run: Run, layers: Plan | None, student: PreTrainedModel | None) -> dict[str, Any]:
    size = forms.size_name(student.config) if student is not None else run.student.size
    return {
        "method": run.method,
        "size": size if layers is None else "-".join(map(str, layers.size)),
        "copied": layers.copied if layers else None,
        "labels": run.label_source,
    }


def _claim(folder: Path, run: Run) -> None:
    """The folder belongs to this config: another config's half-done work is not gone on with."""
    asked = run.model_dump(mode="json")
    path = folder / "run.json"
    if path.is_file() and json.loads(path.read_text(encoding="utf-8")) != asked:
        raise UserError(
            f"{folder}: holds an unfinished run with other settings; give this run another name, or delete the folder"
        )
    write_json_atomic(path, asked)


def _recorder(folder: Path, report: Report, worker: Worker) -> Report:
    """Keep every validation in metrics.jsonl before passing it on; a repeated step replaces what came after it."""

    def record(metrics: dict[str, Any], where: Path | None) -> None:
        if worker.leads:
            path = folder / "metrics.jsonl"
            lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
            kept = [line for line in lines if json.loads(line)["step"] < metrics["step"]]
            write_atomic(path, ("\n".join([*kept, json.dumps(metrics)]) + "\n").encode())
        report(metrics, where)

    return record


def _own_tokenizer(run: Run, folder: Path, worker: Worker) -> PreTrainedTokenizerBase:
    """The tokenizer of a new model: built once from the training split by the leader, then loaded by all."""
    place = folder / "tokenizer"
    if worker.leads and not place.is_dir():
        assert run.start is not None
        _train_tokenizer(run.start, run.dataset, place)
    if worker.world > 1:
        torch.distributed.barrier()
    return load_tokenizer(str(place))


def _train_tokenizer(start: Start, dataset: Dataset, place: Path) -> None:
    corpus = read_split(dataset, "train")
    if corpus is None:
        raise UserError(f"{dataset.name}: there is no train split to build a tokenizer from")
    making = place.with_name(".tokenizer.making")
    shutil.rmtree(making, ignore_errors=True)
    build_tokenizer(start, itertools.chain(corpus.sources, corpus.targets), making)
    making.rename(place)


@lru_cache(maxsize=8)
def tokens(tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: str, side: str, limit: int) -> list[list[int]]:
    """Token ids of a split's sources or targets, made once per process."""
    corpus = read_split(dataset, split)
    assert corpus is not None
    if side == "source":
        return tokenize_sources(tokenizer, corpus.sources, limit)
    return tokenize_targets(tokenizer, corpus.targets, limit)


def _length(dataset: Dataset, name: str, preset: Any, known: Any, config: Any, default: int) -> int:
    """A maximum length: the run's, else the teacher preset's, else the data set's; within the model's positions."""
    positions = getattr(config, "max_position_embeddings", None)
    asked = getattr(dataset, name)
    if asked is not None:
        if positions is not None and asked > positions:
            raise UserError(f"dataset.{name} is {asked}, but the model has {positions} positions")
        return int(asked)
    length = getattr(preset, name, None) or getattr(known, name, None) or default
    return min(length, positions) if positions else length


def _set_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Set the residual dropout everywhere; attention and activation dropout stay as the teacher has them."""
    if model.config.model_type == "t5":
        model.config.dropout_rate = dropout
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = dropout
        return
    old = model.config.dropout
    model.config.dropout = dropout
    for module in model.modules():
        if isinstance(getattr(module, "dropout", None), float) and module.dropout == old:
            module.dropout = dropout


def _hold_padding_row(model: PreTrainedModel) -> None:
    """Keep a zero padding row zero: CTranslate2 starts Marian's decoder from zero, whatever that row holds."""
    for parameter in forms.embeddings(model):
        pad_id = model.config.pad_token_id
        if not parameter.requires_grad or pad_id >= len(parameter) or parameter[pad_id].any():
            continue

        def clear(gradient: Tensor, row: int = pad_id) -> Tensor:
            gradient = gradient.clone()
            gradient[row] = 0
            return gradient

        parameter.register_hook(clear)


def _write_rows(path: Path, rows: dict[str, np.ndarray]) -> None:
    making = path.with_name(f".{path.name}")
    with making.open("wb") as file:
        np.savez_compressed(file, **rows)  # type: ignore[arg-type]
    making.replace(path)
