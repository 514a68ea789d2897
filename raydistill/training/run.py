"""One run, from config to checkpoint. Read this page first: it says in order what a training is.

`train` reads the data, makes the student, decides what is frozen and what the teacher's part comes from, trains, and
leaves in its folder: run.json (what was asked), metrics.jsonl (every validation), best/ (the checkpoint) and, last of
all, result.json (the scores). Called again on the same folder it goes on where it was.
"""

import itertools
import json
import shutil
import time
from dataclasses import asdict, dataclass, field, replace
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
from raydistill.config.run import Dataset, Decoding, Run
from raydistill.data.batches import Examples, buckets
from raydistill.data.corpus import Corpus, read_corpus, split_names
from raydistill.data.labels import choose_targets, read_label_set
from raydistill.evaluation.checkpoint import Evaluation, evaluate
from raydistill.evaluation.scores import lead, score, signature
from raydistill.model import forms
from raydistill.model.generate import Beam, open_engine, resolve_decoding
from raydistill.model.shrink import Plan, plan, shrink
from raydistill.model.start import build_tokenizer, new_model
from raydistill.model.teachers import (
    fingerprint,
    load_model,
    load_tokenizer,
    locate,
    set_languages,
    tokenize_sources,
    tokenize_targets,
)
from raydistill.training.loop import Diverged, Report, State, Worker, fit
from raydistill.training.losses import cross_entropy
from raydistill.training.supervision import Supervision
from raydistill.training.teacher_cache import (
    Ragged,
    decoder_store,
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
    student: PreTrainedModel
    layers: Plan | None
    if teacher:
        tokenizer = teacher.tokenizer
        student, layers = make_student(run, teacher)
    else:
        place = _random_start(run, folder, worker)
        tokenizer, student, layers = load_tokenizer(place), load_model(place), None
    material = load_material(run, teacher.preset if teacher else None, tokenizer, student.config)
    examples = make_examples(run, material, tokenizer, inputs)
    student.to(worker.device)
    if teacher:
        teacher.model.to(worker.device)
    frozen = what_is_frozen(run, layers)
    freeze(student, frozen)
    supervision = supervise(run, student, layers, teacher, examples, frozen.shared, inputs)
    beam = resolve_decoding(
        run.decoding,
        student.generation_config,
        teacher.preset.decoding if teacher and teacher.preset else None,
        material.max_target_tokens,
    )
    remember_decoding(student, beam, run.decoding)
    scorer = _Validator(run, student, tokenizer, material, beam, teacher, worker)
    recorder = _recorder(folder, report, worker)
    try:
        state = fit(supervision, run.training, scorer.validate, folder, recorder, worker)
    except Diverged as error:
        return _fail(folder, run, layers, inputs, str(error), worker)
    return _finish(folder, run, layers, state, scorer, material, inputs, teacher, worker) if worker.leads else {}


def score_teacher(run: Run, device: str, threads: int) -> dict[str, Any]:
    """The teacher's own scores on the run's data and decoding, with the corpus's mean token counts.

    What students are compared with, and what latency is measured at.
    """
    assert run.teacher is not None
    teacher = open_teacher(run.teacher, run.dataset.name)
    material = load_material(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    preset = teacher.preset.decoding if teacher.preset else None
    beam = resolve_decoding(run.decoding, teacher.model.generation_config, preset, material.max_target_tokens)
    engine = open_engine(
        teacher.where,
        run.evaluation.engine,
        device=device,
        threads=threads,
        languages=teacher.preset.languages if teacher.preset else None,
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
    train_corpus = material.corpora["train"]
    targets = tokens(teacher.tokenizer, run.dataset, "train", "target", material.max_target_tokens)
    sources = material.sources["train"]
    test = found.get("test")
    return {
        "name": run.teacher,
        "key": teacher.key,
        "size": forms.size_name(teacher.model.config),
        "metric": material.metric,
        "metrics": found["validation"].scored.metrics,
        "interval": list(found["validation"].interval),
        "test": test.summary() if test else None,
        "tokens": {
            "source": round(sum(map(len, sources)) / len(sources)),
            "output": round(sum(map(len, targets)) / len(targets)),
        },
        "beams": beam.beams,
        "decoding": asdict(beam),
        "signature": signature(material.metric),
        "engine": f"{engine.name} {engine.precision}",
        "data": {split: corpus.fingerprint for split, corpus in material.corpora.items()},
        "rows": {split: len(corpus) for split, corpus in material.corpora.items()},
        "baseline": _lead(material, train_corpus.labelled),
    }


def fill_cache(run: Run, inputs: Inputs, device: str) -> int:
    """Make what the run's teacher cache lacks; returns its bytes. What is there already is left alone."""
    assert run.teacher is not None
    assert inputs.cache is not None
    teacher = open_teacher(run.teacher, run.dataset.name)
    teacher.model.to(device)
    material = load_material(run, teacher.preset, teacher.tokenizer, teacher.model.config)
    examples = make_examples(run, material, teacher.tokenizer, inputs)
    layers = plan(forms.depths(teacher.model.config), run.student)
    shared = what_is_frozen(run, layers).shared
    made = supervise(run, teacher.model, layers, teacher, examples, shared, inputs)
    stores = [*made.decoded.values(), *([made.encoded] if made.encoded else [])]
    return sum(store.data.nbytes for store in stores)


def _lead(material: Material, labelled: bool) -> dict[str, Any] | None:
    """The first sentence as the summary: what a summariser has to beat on test."""
    if material.metric == "bleu" or "test" not in material.corpora or not labelled:
        return None
    corpus = material.corpora["test"]
    return {"lead1": score("rouge2", [lead(s, 1) for s in corpus.sources], corpus.targets).metrics}


@lru_cache(maxsize=2)
def open_teacher(name: str, dataset: str) -> Teacher:
    """Load a teacher once per process: weights, tokenizer, fingerprint, preset."""
    preset = teacher_preset(name, dataset)
    where = locate(name, dataset)
    languages = preset.languages if preset else None
    model, tokenizer = load_model(where), load_tokenizer(where, languages)
    set_languages(model, tokenizer)
    model.requires_grad_(False)
    return Teacher(where, model, tokenizer, fingerprint(model), preset)


def make_student(run: Run, teacher: Teacher) -> tuple[PreTrainedModel, Plan]:
    """The untrained student and which layers it copies and is supervised by."""
    layers = plan(forms.depths(teacher.model.config), run.student)
    student = shrink(teacher.model, layers, run.training.seed)
    if run.training.dropout is not None:
        _set_dropout(student, run.training.dropout)
    return student, layers


@dataclass(frozen=True)
class Frozen:
    """What stays as the teacher has it; `shared`: the student's encoder states are the teacher's."""

    encoder: bool
    embeddings: bool
    shared: bool


def what_is_frozen(run: Run, layers: Plan | None) -> Frozen:
    """What the run asks to freeze; by default, of a shrunk student, the embeddings and a fully copied encoder.

    A student is shrunk where the run gives a `size`, be it the teacher's own; without one a teacher is fine-tuned.
    """
    shrunk = layers is not None and run.student.size is not None
    complete = layers is not None and layers.encoder_complete
    embeddings = run.training.freeze_embeddings
    encoder = run.training.freeze_encoder
    embeddings = shrunk if embeddings is None else embeddings
    encoder = shrunk and complete if encoder is None else encoder
    return Frozen(encoder, embeddings, encoder and embeddings and complete)


def freeze(student: PreTrainedModel, frozen: Frozen) -> None:
    """Freeze it; UserError where nothing is left to train."""
    for parameter in forms.embeddings(student) if frozen.embeddings else []:
        parameter.requires_grad_(False)
    for parameter in forms.encoder_layers(student) if frozen.encoder else []:
        parameter.requires_grad_(False)
    if not any(p.requires_grad for p in student.parameters()):
        raise UserError("nothing is left to train: encoder, embeddings and decoder are all frozen")
    _hold_padding_row(student)


def load_material(run: Run, preset: TeacherPreset | None, tokenizer: PreTrainedTokenizerBase, config: Any) -> Material:
    """Read and tokenise the splits; the test split is optional."""
    known = DATASETS.get(run.dataset.name)
    source = _length(run.dataset, "max_source_tokens", preset, known, config, 512)
    target = _length(run.dataset, "max_target_tokens", preset, known, config, 128)
    asked = run.evaluation.metric
    metric = asked if asked != "auto" else known.metric if known else "rouge2"
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
    teacher: Teacher | None
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
                replace(self.beam, beams=beams),
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
        "decoding": asdict(scorer.beam),
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


def _random_start(run: Run, folder: Path, worker: Worker) -> Path:
    """A new model and its tokenizer as a checkpoint: made once by the leader, loaded by all."""
    place = folder / "start"
    if worker.leads and not place.is_dir():
        assert run.start is not None
        corpus = read_split(run.dataset, "train")
        if corpus is None:
            raise UserError(f"{run.dataset.name}: there is no train split to build a tokenizer from")
        making = folder / ".start.making"
        shutil.rmtree(making, ignore_errors=True)
        tokenizer = build_tokenizer(run.start, itertools.chain(corpus.sources, corpus.targets), making)
        dropout = 0.1 if run.training.dropout is None else run.training.dropout
        new_model(run.start, tokenizer, dropout, run.training.seed).save_pretrained(making)
        making.rename(place)
    if worker.world > 1:
        torch.distributed.barrier()
    return place


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
