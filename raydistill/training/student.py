"""What is trained: the student made from the teacher or from nothing, and what of it stays frozen."""

import itertools
from pathlib import Path

import torch
from transformers import PreTrainedModel

from raydistill.config.run import Decoding, Run
from raydistill.core.errors import UserError
from raydistill.inference.decoding import Beam
from raydistill.models import families
from raydistill.models.loading import load_model, locate
from raydistill.models.random_init import build_tokenizer, new_model
from raydistill.models.shrinking import Plan, plan, shrink
from raydistill.training.run_folder import making
from raydistill.training.tokenized_data import Teacher, read_split
from raydistill.training.workers import Worker


def make_student(run: Run, teacher: Teacher) -> tuple[PreTrainedModel, Plan]:
    """The untrained student and which layers it copies and is supervised by."""
    layers = plan(families.depths(teacher.model.config), run.student)
    other = run.student.copy_from
    decoder_from = load_model(locate(other, run.dataset.name)) if other else None
    student = shrink(teacher.model, layers, run.training.seed, decoder_from)
    if run.training.dropout is not None:
        _set_dropout(student, run.training.dropout)
    return student, layers


def random_start(run: Run, folder: Path, worker: Worker) -> Path:
    """A new model and its tokenizer as a checkpoint: made once by the leader, loaded by all."""
    place = folder / "start"
    if worker.leads and not place.is_dir():
        assert run.start is not None
        corpus = read_split(run.dataset, "train")
        if corpus is None:
            raise UserError(f"{run.dataset.name}: there is no train split to build a tokenizer from")
        with making(place) as new:
            tokenizer = build_tokenizer(run.start, itertools.chain(corpus.sources, corpus.targets), new)
            dropout = 0.1 if run.training.dropout is None else run.training.dropout
            new_model(run.start, tokenizer, dropout, run.training.seed).save_pretrained(new)
    if worker.world > 1:
        torch.distributed.barrier()
    return place


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


def _set_dropout(model: PreTrainedModel, dropout: float) -> None:
    """Set the residual dropout everywhere; attention and activation dropout stay as the teacher has them.

    T5 knows only one rate, which is all of them.
    """
    t5 = model.config.model_type == "t5"
    setattr(model.config, "dropout_rate" if t5 else "dropout", dropout)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = dropout
        # Attention modules hold their own rate under the same name.
        elif isinstance(getattr(module, "dropout", None), float) and (t5 or not hasattr(module, "head_dim")):
            module.dropout = dropout  # type: ignore[assignment]
