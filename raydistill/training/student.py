"""The student of a run before training: made from the teacher, or a new model with random weights."""

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedTokenizerBase

from raydistill.config.run import Decoding, Run
from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.inference.decoding import BeamSearchParams
from raydistill.models import families
from raydistill.models.freezing import FrozenParts, resolve_frozen_parts
from raydistill.models.loading import load_config, load_model, locate_checkpoint
from raydistill.models.random_init import build_tokenizer, make_random_model
from raydistill.models.saving import build_checkpoint
from raydistill.models.shrinking import KeptUnits, LayerPlan, plan_student, shrink
from raydistill.models.teacher import Teacher, open_teacher
from raydistill.models.tokenization import load_tokenizer
from raydistill.training.student_choice import load_or_make_choice
from raydistill.training.tokenized_data import read_split, select_student_tokens
from raydistill.training.workers import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RANDOM_START_FOLDER = "start"
DEFAULT_DROPOUT = 0.1


@dataclass(frozen=True)
class StudentSetup:
    """An untrained student and the models that it comes from.

    Attributes:
        student: The model to train.
        tokenizer: The tokenizer of student and teacher.
        layer_plan: The teacher layers that are copied and that supervise; None for a random start.
        teacher: The teacher; None for a random start.
    """

    student: "PreTrainedModel"
    tokenizer: PreTrainedTokenizerBase
    layer_plan: LayerPlan | None = None
    teacher: Teacher | None = None

    @property
    def size(self) -> str:
        """Encoder and decoder layers of the student, such as "12-3"."""
        return families.size_name(self.student.config)

    def frozen_parts(self, run: Run) -> FrozenParts:
        """The parts of the student that the run does not train."""
        return resolve_frozen_parts(run, self.layer_plan)


def prepare_student(run: Run, folder: Path, worker: Worker, label_folders: Mapping[str, Path]) -> StudentSetup:
    """The untrained student of a run: a copy of teacher layers, or a random start that is saved in `folder`.

    Where the run trims the vocabulary, the student is made from the teacher with the trimmed vocabulary, and learns
    from the teacher's distribution over the kept tokens. `label_folders`: folders of the label sets by source, for the
    choice of tokens, and of layers or units by training rows.
    """
    if run.teacher is None:
        checkpoint = make_random_checkpoint(run, folder, worker)
        return StudentSetup(load_model(checkpoint), load_tokenizer(checkpoint, source_prefix=run.dataset.source_prefix))
    teacher = open_teacher(run.teacher, run.dataset)
    token_ids = select_student_tokens(run, teacher.tokenizer, load_config(teacher.location), label_folders)
    teacher = open_teacher(run.teacher, run.dataset, token_ids)
    choice = load_or_make_choice(run, teacher, folder, worker, label_folders)
    chosen = run.model_copy(update={"student": choice.apply(run.student)})
    student, layer_plan = make_student(chosen, teacher, choice.kept_units)
    return StudentSetup(student, teacher.tokenizer, layer_plan, teacher)


def make_student(run: Run, teacher: Teacher, units: KeptUnits | None = None) -> "tuple[PreTrainedModel, LayerPlan]":
    """The untrained student of a teacher, and the layers that it copies and is supervised by.

    `units` are the feed-forward units to keep, for each side whose units the plan reduces.
    """
    layer_plan = plan_student(teacher.model.config, run.student)
    copy_from = run.student.copy_from
    decoder_from = load_model(locate_checkpoint(copy_from, run.dataset.name)) if copy_from else None
    student = shrink(teacher.model, layer_plan, run.training.seed, decoder_from, units)
    if run.training.dropout is not None:
        _set_dropout(student, run.training.dropout)
    return student, layer_plan


def make_random_checkpoint(run: Run, folder: Path, worker: Worker) -> Path:
    """The checkpoint of a new model and its tokenizer; the main process creates it, all workers load it.

    Raises:
        UserError: There is no train split to build a tokenizer from.
        OSError: The checkpoint cannot be written.
    """
    path = folder / RANDOM_START_FOLDER
    if worker.is_main_process and not artifact.is_complete(path):
        assert run.start is not None
        corpus = read_split(run.dataset, "train")
        if corpus is None:
            raise UserError(f"{run.dataset.name}: there is no train split to build a tokenizer from")
        with build_checkpoint(path) as temporary:
            tokenizer = build_tokenizer(run.start, itertools.chain(corpus.sources, corpus.targets), temporary)
            dropout = DEFAULT_DROPOUT if run.training.dropout is None else run.training.dropout
            make_random_model(run.start, tokenizer, dropout, run.training.seed).save_pretrained(temporary)
    worker.share_folder()
    return path


def set_generation_config(student: "PreTrainedModel", beam: BeamSearchParams, requested: Decoding) -> None:
    """Write a decoding into the student's generation config: settings that the run requests or the config lacks.

    Args:
        student: The model whose generation config changes.
        beam: The resolved decoding.
        requested: The decoding that the run's config names; None for a setting that it leaves open.
    """
    config = student.generation_config
    settings = {
        "num_beams": (beam.beams, requested.beams),
        "length_penalty": (beam.length_penalty, requested.length_penalty),
        "min_length": (beam.min_length, requested.min_length),
        "max_length": (beam.max_length, requested.max_length),
        "no_repeat_ngram_size": (beam.no_repeat_ngram, requested.no_repeat_ngram),
    }
    for name, (value, requested_value) in settings.items():
        if requested_value is not None or getattr(config, name, None) is None:
            setattr(config, name, value)


def _set_dropout(model: "PreTrainedModel", dropout: float) -> None:
    """Set the residual dropout of a model; its attention and activation dropout do not change.

    T5 has a single dropout rate, which covers all three.
    """
    family = families.family_of(model.config)
    one_rate = family.dropout == "dropout_rate"
    setattr(model.config, family.dropout, dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        # Attention modules, which have a head_dim, store attention dropout in an attribute of this name.
        elif isinstance(getattr(module, "dropout", None), float) and (one_rate or not hasattr(module, "head_dim")):
            module.dropout = dropout  # type: ignore[assignment]
