"""The benchmark of training steps: reads of limited rate, and a baseline that converts no weights."""

from pathlib import Path

import numpy as np
import torch
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks import kd_step
from raydistill.teacher_cache.reader import PartFile, RaggedArray
from tests.factories.clock import FakeClock


def test_reads_take_as_long_as_the_disk_needs(tmp_path: Path, monkeypatch):
    """Rows of 2, 3 and 1 vectors of four float32 numbers: 16 bytes a vector, at 16 bytes a second."""
    clock = FakeClock()
    monkeypatch.setattr(kd_step, "time", clock)
    vectors = np.arange(24, dtype=np.float32).reshape(6, 4)
    (tmp_path / "part").write_bytes(vectors.tobytes())
    part = PartFile(tmp_path / "part", 6, 4, "fp32", 0)
    array = RaggedArray([part], np.zeros(3, np.int64), np.array([0, 2, 5]), np.array([2, 3, 1]))
    disk = kd_step.Disk(16e-9)
    slow = kd_step.on_disk(array, disk)
    assert torch.equal(slow.read_flat([1, 2]), array.read_flat([1, 2]))
    assert clock.now == 1004
    assert torch.equal(slow.read_padded([0, 2]), array.read_padded([0, 2]))
    assert clock.now == 1007
    assert disk.num_bytes == 7 * 16
    kd_step.on_disk(array, kd_step.Disk(None)).read_flat([0])
    assert clock.now == 1007


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
