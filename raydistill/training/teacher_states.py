"""Where a run's teacher states come from: the teacher cache, or the teacher, which then runs with every step."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from raydistill.config.run import Run
from raydistill.data.batching import Examples
from raydistill.models import families
from raydistill.models.freezing import FrozenParts
from raydistill.models.teacher import Teacher, open_teacher
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.policy import make_cache_layout
from raydistill.teacher_cache.reader import RaggedArray, open_decoder_states, open_encoder_states
from raydistill.teacher_cache.store import ComputeDtype
from raydistill.training.distillation import DistillationStep
from raydistill.training.inputs import RunInputs
from raydistill.training.optimizer_step import autocast_dtype
from raydistill.training.student import StudentSetup
from raydistill.training.workers import Worker

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# The tensor cores' fast kernels need rows of 16 bytes: 8 numbers of 16 bits. BART has 50,265 words.
GPU_ROW_MULTIPLE = 8


def make_distillation_step(
    run: Run, setup: StudentSetup, examples: Examples, inputs: RunInputs, worker: Worker
) -> DistillationStep:
    """The loss of a run's micro-batches, with the teacher states that it needs.

    Builds the run's part of the teacher cache where it is missing, and moves the teacher to the worker's device where
    the teacher has to run; otherwise frees the teacher's memory.
    """
    teacher, frozen = setup.teacher, setup.frozen_parts(run)
    autocast = autocast_dtype(run.training, worker)
    distillation = DistillationStep(
        student=setup.student,
        teacher=None,
        examples=examples,
        method=run.method,
        loss=run.loss,
        layer_plan=setup.layer_plan,
        encoder_shared=frozen.encoder_shared,
        lm_head_shared=frozen.embeddings and teacher is not None,
        lm_head_weight=frozen_lm_head_weight(setup.student, autocast),
    )
    if teacher is None:
        return distillation
    encoder_states, decoder_states = _open_cached_states(run, teacher, examples, inputs, worker)
    distillation = replace(distillation, cached_encoder_states=encoder_states, cached_decoder_states=decoder_states)
    if _needs_teacher(run, distillation, frozen):
        torch.nn.Module.to(teacher.model, worker.device)
        return replace(distillation, teacher=teacher.model)
    teacher.unload_model()
    return distillation


def frozen_lm_head_weight(
    student: "PreTrainedModel", autocast: torch.dtype | None, gpu_row_multiple: int = GPU_ROW_MULTIPLE
) -> Tensor | None:
    """A copy of the LM head's weight [rows, width] in the autocast dtype, which saves a cast for every chunk.

    On a GPU, the rows of the vocabulary are followed by zeros up to a multiple of `gpu_row_multiple`, as
    `families.lm_head` accepts. None where the weight is trained, or where there is no autocast.
    """
    if autocast is None or families.trainable_lm_head_parameters(student):
        return None
    lm_head: Any = student.lm_head
    weight: Tensor = lm_head.weight.detach().to(autocast)
    if weight.device.type != "cuda":
        return weight
    return torch.nn.functional.pad(weight, (0, 0, 0, -len(weight) % gpu_row_multiple))


def _needs_teacher(run: Run, distillation: DistillationStep, frozen: FrozenParts) -> bool:
    """Whether the teacher has to run with every step: the cache lacks states that the loss terms read."""
    if run.method != "kd":
        return False
    return (
        not distillation.cached_decoder_states
        or distillation.encoder_supervised
        or not frozen.embeddings  # the teacher's LM head differs from the student's
        or run.loss.alpha_attention > 0  # attention maps are not cached
    )


def _open_cached_states(
    run: Run, teacher: Teacher, examples: Examples, inputs: RunInputs, worker: Worker
) -> tuple[RaggedArray | None, dict[int, RaggedArray]]:
    """The cached encoder states, and the cached decoder states by layer; missing parts are computed first.

    The cache does not depend on the vocabulary of a student: its content and its keys are computed from the tokens in
    the teacher's full vocabulary.
    """
    mode = inputs.cache_mode if run.training.teacher_cache == "auto" else run.training.teacher_cache
    if inputs.cache_root is None or mode == "off":
        return None, {}
    compute_dtype: ComputeDtype = "fp32" if autocast_dtype(run.training, worker) is None else "bf16"
    if teacher.token_ids is not None:
        examples = examples.with_token_ids(teacher.token_ids)
    examples_by_label = {run.label_key: examples}
    layout = make_cache_layout(
        [(run, mode)], examples_by_label, teacher.key, teacher.model.config, inputs.cache_root, compute_dtype
    )
    if layout.is_incomplete():
        assert run.teacher is not None
        full_teacher = open_teacher(run.teacher, run.dataset)
        build_cache(layout, torch.nn.Module.to(full_teacher.model, worker.device))
        if full_teacher is not teacher:
            full_teacher.unload_model()
    encoder_states = open_encoder_states(layout) if layout.encoder else None
    return encoder_states, open_decoder_states(layout) if layout.label_sets else {}
