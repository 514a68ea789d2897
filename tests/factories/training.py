"""Tiny teachers, students and runs for the tests of training."""

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from raydistill.config.run import Loss, Run, Student, Training
from raydistill.core.artifact import MANIFEST
from raydistill.data.batching import Examples
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.label_sets.manifest import LabelManifest
from raydistill.models.freezing import FrozenParts, freeze
from raydistill.models.loading import load_model
from raydistill.models.pruning import random_units
from raydistill.models.shrinking import plan_student, shrink
from raydistill.models.tokenization import load_tokenizer, tokenize_sources, tokenize_targets
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.reader import open_decoder_states, open_encoder_states
from raydistill.training.distillation import DistillationStep
from raydistill.training.loop import fit
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.state import STATE_FOLDER, StateManifest, TrainingState
from tests.factories.models import save_tiny, sentences

# The lines of metrics.jsonl of a run with two validations.
VALIDATIONS = [
    {"step": n, "total_steps": 2, "metric": "bleu", "score": 20.0 + n, "engine": "ctranslate2 fp32", "bleu": 20.0 + n}
    for n in (1, 2)
]

KD_LOSS = Loss(alpha_data=1.0, alpha_logits=0.8, alpha_hidden=3.0, temperature=2.0)
FP32_CACHE = CacheDtypes("fp32", "fp32")
FP32: dict[str, Any] = {"precision": "fp32", "warmup_steps": 2, "learning_rate": 1e-2, "adam_eps": 1e-3}
# Six steps over the six rows of `tiny_distillation`, with a validation after each.
SETTINGS = Training(**FP32, batch_size=2, epochs=2, checks_per_epoch=3, patience=99)
# Metrics that differ between two runs of the same steps.
TIMING_METRICS = ("time_s", "validation_s", "device_hours", "step_ms", "data_wait")


def text_pairs(n, seed=0):
    """`n` sources of different lengths, and the first words of each source as its target."""
    words = sentences(2 * n, seed)
    sources = [" ".join(words[2 * i : 2 * i + 1 + i % 2]) for i in range(n)]
    return sources, [" ".join(source.split()[: 2 + i % 4]) for i, source in enumerate(sources)]


def tiny_distillation(family, folder, student: str | Student = "2-2", n=6, dropout=0.0, loss=KD_LOSS):
    """A kd step of a teacher of 2-3 layers, saved in `folder`, and a `student` of it over `n` pairs."""
    if not (folder / "config.json").is_file():
        save_tiny(family, folder, dropout=dropout, logits_bias=True)
    teacher, tokenizer = load_model(folder), load_tokenizer(folder)
    teacher.requires_grad_(False)
    plan = plan_student(teacher.config, Student(size=student) if isinstance(student, str) else student)
    model = shrink(teacher, plan, seed=0, units=random_units(teacher.config, plan, seed=0))
    freeze(model, FrozenParts(plan.copies_full_encoder, True, plan.copies_full_encoder))
    sources, targets = text_pairs(n)
    examples = Examples(
        tokenize_sources(tokenizer, sources, 40), tokenize_targets(tokenizer, targets, 20), list(range(n))
    )
    return DistillationStep(model, teacher, examples, "kd", loss, plan, plan.copies_full_encoder, lm_head_shared=True)


def step_cache_layout(distillation, folder, dtypes=FP32_CACHE):
    """The layout of the teacher cache that a step reads."""
    examples = distillation.examples
    decoders = [(examples, distillation.layers_needed)] if distillation.method == "kd" else []
    width = distillation.student.config.d_model
    return CacheLayout(folder, "key", examples, width, distillation.encoder_shared, decoders, dtypes)


def with_cache(distillation, teacher, folder, dtypes=FP32_CACHE):
    """A copy of the step that reads the teacher cache, which is built in `folder`."""
    layout = step_cache_layout(distillation, folder, dtypes)
    build_cache(layout, teacher)
    return replace(
        distillation,
        cached_encoder_states=open_encoder_states(layout) if layout.encoder else None,
        cached_decoder_states=open_decoder_states(layout) if layout.label_sets else {},
    )


def loss_and_gradient(distillation, batch, autocast=None):
    """The sum of every loss term, and the gradient of the step's loss as one vector."""
    distillation.student.zero_grad()
    weights, alphas = distillation.term_weights(batch), distillation.alphas()
    scales = {name: alphas[name] / weight for name, weight in weights.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        loss, sums = distillation.loss_terms(distillation.read_batch(batch), scales)
    loss.backward()
    gradients = [p.grad.flatten() for p in distillation.student.parameters() if p.grad is not None]
    return {name: float(value) for name, value in sums.items()}, torch.cat(gradients)


def transformers_forward(model, distillation, batch, encoder_states=None):
    """The output of the model's own forward over a padded batch, and the padded labels."""
    examples, pad_id = distillation.examples, model.config.pad_token_id
    rows = [torch.tensor(examples.sources[i]) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_id)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(examples.targets[i]) for i in batch], batch_first=True, padding_value=-100
    )
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        mask[i, : len(row)] = 1
    extra = {} if encoder_states is None else {"encoder_outputs": (encoder_states,)}
    with torch.no_grad():
        output = model(
            input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False, **extra
        )
    return output, labels


def relative_distance(a: Tensor, b: Tensor) -> float:
    """The norm of `a - b` divided by the norm of `b`."""
    return float((a - b).norm() / b.norm())


def flat_weights(model) -> Tensor:
    """A copy of all weights as one vector."""
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


def rising_scores(distillation):
    """A validation that saves the weights and gives a higher score at every call."""
    calls = itertools.count(1)

    def validate(folder, engine=None):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(flat_weights(distillation.student), folder / "weights.pt")
        return {"metric": "rouge2", "score": float(next(calls)), "val_loss": 1.0}

    return validate


def read_state(folder: Path) -> TrainingState:
    """The saved state of a run."""
    return StateManifest.read(folder / STATE_FOLDER / MANIFEST).progress


def no_report(_metrics, _folder):
    """A report callback that never stops the run."""


def fail_if_called(_metrics, _folder):
    """A report callback for runs that are finished."""
    raise AssertionError("a finished run reports nothing")


def fit_and_record(distillation, settings, folder, report=no_report, validate=None):
    """Train in `folder`; returns the validations' metrics without times and scores, and the state at the end."""
    folder.mkdir(exist_ok=True)
    step = OptimizerStep.create(distillation, settings)
    state = fit(step, folder, validate or rising_scores(distillation), report)
    return [{k: v for k, v in m.items() if k not in (*TIMING_METRICS, "score")} for m in state.history], state


def write_run_workspace(root: Path) -> Path:
    """A folder with a tiny teacher, a corpus of 24, 6 and 5 rows, and a pseudo-label set."""
    for seed, (split, n) in enumerate({"train": 24, "validation": 6, "test": 5}.items()):
        pairs = zip(*text_pairs(n, seed), strict=True)
        rows = [json.dumps({"id": f"{split}{i}", "source": s, "target": t}) for i, (s, t) in enumerate(pairs)]
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    save_tiny("bart", root / "teacher", logits_bias=True)
    write_label_set(
        root / "labels",
        [(f"train{i}", [Candidate(f"Two small dogs {i}.", 0.0)]) for i in range(24)],
        lambda: LabelManifest(rows=24),
    )
    return root


def make_run(workspace, method="sft", **changes) -> Run:
    """A run of three steps in a folder of `write_run_workspace`, with changed settings; None removes a setting."""
    training = {"epochs": 1, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "precision": "fp32"}
    data = {
        "name": "tiny",
        "teacher": str(workspace / "teacher"),
        "dataset": {"name": str(workspace), "max_source_tokens": 40, "max_target_tokens": 20},
        "method": method,
        "student": {"size": "2-1"},
        "training": training | changes.pop("training", {}),
        "decoding": {"beams": 2, "max_length": 8},
        **changes,
    }
    return Run.model_validate({key: value for key, value in data.items() if value is not None})


def parse_json_file(path: Path) -> dict[str, Any]:
    """The content of a JSON file."""
    return json.loads(path.read_text())


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The validations of a run, as metrics.jsonl holds them."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
