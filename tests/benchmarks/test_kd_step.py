"""The benchmark of training steps: reads of limited rate, and baselines with our precision, LM head and clipping."""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks import cold_cache, kd_step
from raydistill.models import families
from raydistill.teacher_cache.reader import PartFile, RaggedArray
from raydistill.training import teacher_states
from raydistill.training.optimizer_step import clip_and_step
from tests.factories.clock import FakeClock

OPTIONS = argparse.Namespace(
    **{"device": "cpu", "family": "bart", "layers": 2, "width": 64, "size": "2-1", "row_multiple": 8}
)


def test_reads_take_as_long_as_the_disk_needs(tmp_path: Path, monkeypatch):
    """Rows of 2, 3 and 1 vectors of four float32 numbers: 16 bytes a vector, at 16 bytes a second."""
    clock = FakeClock()
    monkeypatch.setattr(cold_cache, "time", clock)
    vectors = np.arange(24, dtype=np.float32).reshape(6, 4)
    (tmp_path / "part").write_bytes(vectors.tobytes())
    part = PartFile(tmp_path / "part", 6, 4, "fp32", 0)
    array = RaggedArray([part], np.zeros(3, np.int64), np.array([0, 2, 5]), np.array([2, 3, 1]))
    slow = kd_step.on_disk(array, cold_cache.SimulatedDisk(16.0), 0)
    assert torch.equal(slow.read_flat([1, 2]), array.read_flat([1, 2]))
    assert clock.now == 1004
    slow.read_ahead([0, 2])
    clock.sleep(2.5)
    # Half a second of the three that the transfer takes is left
    assert torch.equal(slow.read_padded([0, 2]), array.read_padded([0, 2]))
    assert clock.now == 1007
    assert torch.equal(slow.read_flat([2, 2]), array.read_flat([2, 2]))
    assert clock.now == 1008  # a row is transferred once for a batch that reads it twice
    assert kd_step.on_disk(array, None, 0) is array


def tiny_models(monkeypatch: pytest.MonkeyPatch, vocabulary: int) -> kd_step.Models:
    """Teacher and student of `OPTIONS` with a small vocabulary."""
    config = kd_step.bart_config(OPTIONS.layers, OPTIONS.width)
    config.vocab_size = vocabulary
    monkeypatch.setattr(kd_step, "bart_config", lambda layers, width: config)
    return kd_step.make_models(OPTIONS)


def test_default_model_has_the_shape_of_bart_large():
    large, default = kd_step.bart_config(12, 1024).to_dict(), BartConfig(dropout=0.0).to_dict()
    assert large == default


def test_all_sides_start_from_equal_weights(monkeypatch):
    first, second = (tiny_models(monkeypatch, 30).student.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_baselines_have_the_precision_of_the_step(precision, monkeypatch):
    models = tiny_models(monkeypatch, 30)
    autocast = kd_step.prepare_baseline(models, OPTIONS, precision)
    frozen = torch.bfloat16 if precision == "bf16" else torch.float32
    assert autocast == (torch.bfloat16 if precision == "bf16" else None)
    assert {p.dtype for p in models.teacher.parameters()} == {frozen}
    assert {(p.requires_grad, p.dtype) for p in models.student.parameters()} == {(True, torch.float32), (False, frozen)}
    assert {tensor.dtype for tensor in kd_step.frozen_tensors(models.student)} == {frozen}


def test_lm_head_of_a_baseline_is_padded_where_ours_is(monkeypatch):
    """On a GPU the product's step has a padded weight; here the function that makes the weight is replaced."""
    models = tiny_models(monkeypatch, 30)
    student: Any = models.student
    hidden = torch.randn(2, 3, OPTIONS.width, generator=torch.Generator().manual_seed(0))
    expected = families.lm_head(student, hidden)
    kd_step.pad_lm_head(student, torch.bfloat16, 8)
    assert isinstance(student.lm_head, torch.nn.Linear)  # no padding on a CPU
    padded = torch.nn.functional.pad(student.lm_head.weight.detach(), (0, 0, 0, 2))
    monkeypatch.setattr(kd_step, "frozen_lm_head_weight", lambda model, autocast, row_multiple: padded)
    kd_step.pad_lm_head(student, torch.bfloat16, 8)
    assert student.lm_head.weight.shape == (32, OPTIONS.width)
    assert torch.allclose(student.lm_head(hidden), expected, atol=1e-6)


def test_frozen_lm_head_of_the_product_is_rounded_for_autocast(monkeypatch):
    models = tiny_models(monkeypatch, 30)
    weight = teacher_states.frozen_lm_head_weight(models.student, torch.bfloat16)
    assert weight is not None
    assert weight.dtype == torch.bfloat16


def test_optimizer_of_the_trainer_clips_like_the_product():
    """Gradients of norm 5 and of norm 0.5."""
    for gradient in ([3.0, 4.0], [0.3, 0.4]):
        updated = []
        for kind in (torch.optim.AdamW, kd_step.ClippingAdamW):
            weight = torch.nn.Parameter(torch.ones(2))
            weight.grad = torch.tensor(gradient)
            optimizer = kind([weight], lr=0.1, eps=1.0, weight_decay=0.0, fused=True)
            if kind is torch.optim.AdamW:
                clip_and_step(optimizer, [weight], 1.0)
            else:
                optimizer.step()
            updated.append(weight.detach())
        assert torch.equal(*updated)
        # The first step of Adam with gradient g is lr * g / (|g| + eps)
        clipped = torch.tensor([0.6, 0.8] if gradient[0] == 3 else gradient)
        assert torch.allclose(updated[0], 1 - 0.1 * clipped / (clipped + 1), atol=1e-5)


def test_figures_of_processes_are_their_common_rate():
    """2 and 3 steps a second are 5 steps a second together."""
    first = {"seconds": 0.5, "fastest": 0.5, "slowest": 1.0, "peak_mb": 10, "data_wait": 0.1, "read_mb": 3, "loss": 1.0}
    other = first | {"seconds": 1 / 3, "slowest": 0.5, "peak_mb": 20, "data_wait": 0.2}
    together = kd_step.combine_processes([first, other])
    assert together["seconds"] == pytest.approx(0.2)
    assert (together["fastest"], together["slowest"]) == (pytest.approx(0.25), pytest.approx(1 / 3))
    assert (together["peak_mb"], together["data_wait"], together["read_mb"]) == (30, 0.2, 3)
    text = kd_step.as_markdown({"ours bf16": first, "ours-x2 bf16": together})
    assert "| KD: ours / ours-x2, seconds per step of all processes | 2.50 |" in text


def test_processes_wait_for_each_other(tmp_path: Path, monkeypatch):
    clock = FakeClock()
    monkeypatch.setattr(kd_step, "time", clock)
    (tmp_path / "another").touch()
    kd_step.wait_for_others(tmp_path, 2)
    with pytest.raises(TimeoutError, match="3 processes"):
        kd_step.wait_for_others(tmp_path, 3)


def test_frozen_weights_of_a_baseline_are_stored_in_bf16():
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    models = [BartForConditionalGeneration(BartConfig(vocab_size=30, **sizes, **heads)) for _ in range(2)]
    teacher, student = models
    student.get_encoder().requires_grad_(False)
    kd_step.prepare_precision(kd_step.Models(teacher, student, None), "fp32")
    assert {p.dtype for model in models for p in model.parameters()} == {torch.float32}
    kd_step.prepare_precision(kd_step.Models(teacher, student, None), "bf16")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert {(p.requires_grad, p.dtype) for p in student.parameters()} == {
        (True, torch.float32),
        (False, torch.bfloat16),
    }


def test_baseline_keeps_no_encoder_states_that_its_loss_does_not_read(monkeypatch):
    model = tiny_models(monkeypatch, 30).teacher
    ids = torch.full((1, 3), 7)
    batch = {"attention_mask": torch.ones_like(ids), "decoder_input_ids": ids}
    output = kd_step.decode_with_states(model, torch.zeros(1, 3, OPTIONS.width), batch)
    assert output.encoder_hidden_states is None
    assert len(output.decoder_hidden_states) == 1 + OPTIONS.layers
