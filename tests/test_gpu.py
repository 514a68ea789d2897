"""What only a GPU can show: a CPU's losses and texts, and a step that never waits for the device."""

import copy
from dataclasses import replace

import pytest
import torch

from raydistill.config.run import Training
from raydistill.inference.decoding import Beam
from raydistill.inference.engines import open_engine
from raydistill.training.loop import make_optimizer, read_step, step
from raydistill.training.workers import Worker
from tests.test_training import EXACT_NUMBERS, texts, tiny, with_stores
from tests.tiny import FAMILIES

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BATCH = list(range(6))
SETTINGS = Training(batch_size=6, learning_rate=1e-3)


def on_gpu(supervision):
    """The same supervision, its models copied to the GPU."""
    teacher = None if supervision.teacher is None else copy.deepcopy(supervision.teacher).cuda()
    return replace(supervision, student=copy.deepcopy(supervision.student).cuda(), teacher=teacher)


def made_steps(supervision, device, count=3):
    """The loss terms of a few steps, and the student's weights after them."""
    worker = Worker(device=device)
    parameters = [p for p in supervision.student.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, SETTINGS)
    found = []
    for _ in range(count):
        now = read_step(supervision, BATCH, SETTINGS, worker)
        found.append(step(supervision, now, SETTINGS, worker, None, parameters, optimizer))
    means = [{name: float(value) for name, value in terms.items()} for terms in found]
    return means, torch.cat([p.detach().flatten().cpu() for p in parameters])


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_a_gpu_are_those_on_a_cpu(family, cached, tmp_path):
    supervision = tiny(family, tmp_path / "t")
    if cached:
        supervision = with_stores(supervision, supervision.teacher, tmp_path / "cache", EXACT_NUMBERS)
    there = on_gpu(supervision)
    ours, weights = made_steps(supervision, "cpu")
    theirs, others = made_steps(there, "cuda")
    for a, b in zip(ours, theirs, strict=True):
        assert a == pytest.approx(b, rel=1e-3)
    assert float((weights - others).norm() / weights.norm()) < 1e-3


@pytest.mark.parametrize("family", ["bart", "pegasus", "marian", "mbart"])
def test_a_step_from_the_cache_never_waits_for_the_gpu(family, tmp_path):
    """torch raises where a call has to wait for the device."""
    supervision = tiny(family, tmp_path / "t")
    supervision = on_gpu(with_stores(supervision, supervision.teacher, tmp_path / "cache", EXACT_NUMBERS))
    made_steps(supervision, "cuda", 1)
    worker = Worker(device="cuda")
    parameters = [p for p in supervision.student.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, SETTINGS)
    now = read_step(supervision, BATCH, SETTINGS, worker)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(supervision, now, SETTINGS, worker, torch.bfloat16, parameters, optimizer)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("beams", [1, 4])
def test_the_reference_engine_writes_the_same_on_a_gpu(beams, tmp_path):
    tiny("bart", tmp_path / "t")
    beam = Beam(beams, 1.0, 3, 16, 0, False, None)
    sources = texts(8)[0]
    written = [
        [
            h[0].text
            for h in open_engine(tmp_path / "t", "transformers", device=device, precision="fp32").generate(
                sources, beam, max_source_tokens=40
            )
        ]
        for device in ("cpu", "cuda")
    ]
    assert written[0] == written[1]
