"""Training on a GPU: losses and texts are equal to a CPU's, and a step never waits for the device."""

import copy
from dataclasses import replace

import pytest
import torch

from raydistill.config.run import Training
from raydistill.inference.decoding import BeamSearchParams, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.training.optimizer_step import OptimizerStep
from raydistill.training.workers import Worker
from tests.factories.models import FAMILIES
from tests.factories.training import flat_weights, relative_distance, text_pairs, tiny_distillation, with_cache

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BATCH = list(range(6))
SETTINGS = Training(batch_size=6, learning_rate=1e-3, precision="fp32")


def on_gpu(distillation):
    """A copy of the step with both models on the GPU."""
    teacher = None if distillation.teacher is None else copy.deepcopy(distillation.teacher).cuda()
    return replace(distillation, student=copy.deepcopy(distillation.student).cuda(), teacher=teacher)


def run_steps(distillation, device, count=3):
    """Take a few steps; returns the loss terms of each, and the student's weights after the last."""
    step = OptimizerStep.create(distillation, SETTINGS, Worker(device=device))
    terms = [step.run(step.read_inputs(BATCH)) for _ in range(count)]
    means = [{name: float(value) for name, value in step_terms.items()} for step_terms in terms]
    return means, flat_weights(distillation.student).cpu()


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_steps_on_a_gpu_equal_those_on_a_cpu(family, cached, tmp_path):
    distillation = tiny_distillation(family, tmp_path / "t")
    if cached:
        distillation = with_cache(distillation, distillation.teacher, tmp_path / "cache")
    gpu_distillation = on_gpu(distillation)
    cpu_means, cpu_weights = run_steps(distillation, "cpu")
    gpu_means, gpu_weights = run_steps(gpu_distillation, "cuda")
    for cpu_terms, gpu_terms in zip(cpu_means, gpu_means, strict=True):
        assert cpu_terms == pytest.approx(gpu_terms, rel=1e-3)
    assert relative_distance(gpu_weights, cpu_weights) < 1e-3


@pytest.mark.parametrize("family", ["bart", "pegasus", "marian", "mbart"])
def test_step_from_the_cache_never_waits_for_the_gpu(family, tmp_path):
    """torch raises an error where a call waits for the device."""
    distillation = tiny_distillation(family, tmp_path / "t")
    distillation = on_gpu(with_cache(distillation, distillation.teacher, tmp_path / "cache"))
    run_steps(distillation, "cuda", 1)
    settings = SETTINGS.model_copy(update={"precision": "bf16"})
    step = OptimizerStep.create(distillation, settings, Worker(device="cuda"))
    inputs = step.read_inputs(BATCH)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step.run(inputs)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("beams", [1, 4])
def test_reference_engine_writes_equal_texts_on_a_gpu(beams, tmp_path):
    tiny_distillation("bart", tmp_path / "t")
    beam = BeamSearchParams(beams, 1.0, 3, 16, 0, False, None)
    sources, _ = text_pairs(8)
    texts = {}
    for device in ("cpu", "cuda"):
        engine = open_engine(tmp_path / "t", "transformers", EngineOptions(device=device, precision="fp32"))
        texts[device] = [hypotheses[0].text for hypotheses in engine.generate(sources, beam, max_source_tokens=40)]
    assert texts["cpu"] == texts["cuda"]
