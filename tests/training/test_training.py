"""Training: what the losses see, that steps are exact however they are split, and that nothing is lost."""

import contextlib
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
import time
import types
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from raydistill.config.run import Dataset, LayerChoice, Loss, Run, Student, Training
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples, bucket_by_length, epoch_batches, shard_batch, split_by_tokens
from raydistill.label_sets.label_set import Candidate, write_label_set
from raydistill.models import families
from raydistill.models.freezing import FrozenParts, freeze, resolve_frozen_parts
from raydistill.models.loading import load_model, load_tokenizer, tokenize_sources, tokenize_targets
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.results.records import read_trials
from raydistill.teacher_cache.builder import (
    CacheBuilder,
    CacheDtypes,
    build_cache,
    open_decoder_states,
    open_encoder_states,
)
from raydistill.training import loop, run_folder, validation
from raydistill.training.distillation import DistillationStep
from raydistill.training.inputs import RunInputs
from raydistill.training.loop import (
    NonFiniteLoss,
    clip_and_step,
    fit,
    learning_rate_factor,
    make_optimizer,
    read_step_inputs,
    train_step,
)
from raydistill.training.run import collapse_reason, frozen_lm_head_weight, make_distillation_step, train
from raydistill.training.run_folder import run_lock
from raydistill.training.student import make_student
from raydistill.training.tokenized_data import input_fingerprints, open_teacher
from raydistill.training.workers import Worker
from tests.factories.models import save_tiny, sentences

KD = Loss(alpha_data=1.0, alpha_logits=0.8, alpha_hidden=3.0, temperature=2.0)
EXACT_NUMBERS = CacheDtypes("fp32", "fp32")
EXACT = {"precision": "fp32", "warmup_steps": 2, "learning_rate": 1e-2, "adam_eps": 1e-3}


def texts(n, seed=0):
    """Sources of different lengths, and a part of each as its target."""
    made = sentences(2 * n, seed)
    sources = [" ".join(made[2 * i : 2 * i + 1 + i % 2]) for i in range(n)]
    return sources, [" ".join(source.split()[: 2 + i % 4]) for i, source in enumerate(sources)]


def tiny(family, folder, size="2-2", method="kd", n=6, dropout=0.0, loss=KD, student=None, seed=0):
    """A teacher of 2-3 layers and a student of it over `n` pairs, as `train` would put them together."""
    if not (folder / "config.json").is_file():
        save_tiny(family, folder, dropout=dropout, logits_bias=family != "t5")
    teacher, tokenizer = load_model(folder), load_tokenizer(folder)
    teacher.requires_grad_(False)
    layers = plan_layers((2, 3), student or Student(size=size))
    model = shrink(teacher, layers, seed)
    freeze(model, FrozenParts(layers.copies_full_encoder, True, layers.copies_full_encoder))
    sources, targets = texts(n)
    examples = Examples(
        tokenize_sources(tokenizer, sources, 40), tokenize_targets(tokenizer, targets, 20), list(range(n))
    )
    return DistillationStep(
        model, teacher if method == "kd" else None, examples, method, loss, layers, layers.copies_full_encoder, True
    )


def pass_of(supervision, folder, numbers, layers=None):
    """The pass whose stores a supervision reads."""
    s = supervision
    decoders = [(s.examples, layers or s.layers_needed)] if s.method == "kd" else []
    width = s.student.config.d_model
    return CacheBuilder(folder, "key", s.examples, width, s.encoder_shared, decoders, numbers)


def with_stores(supervision, teacher, folder, numbers=EXACT_NUMBERS):
    """The same supervision from the teacher cache."""
    work = pass_of(supervision, folder, numbers)
    build_cache(work, teacher)
    encoded = open_encoder_states(work) if work.encoder else None
    return replace(supervision, encoded=encoded, decoded=open_decoder_states(work) if work.label_sets else {})


def loss_and_gradient(supervision, batch, autocast=None):
    """Sums by term, and the gradient of the step's loss as one vector."""
    supervision.student.zero_grad()
    weights, alphas = supervision.term_weights(batch), supervision.alphas()
    scales = {name: alphas[name] / weight for name, weight in weights.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        loss, sums = supervision.loss_terms(supervision.read_batch(batch), scales)
    loss.backward()
    parts = [p.grad.flatten() for p in supervision.student.parameters() if p.grad is not None]
    return {name: float(value) for name, value in sums.items()}, torch.cat(parts)


def distance(a, b):
    return float((a - b).norm() / b.norm())


def weights_of(model):
    return torch.cat([p.detach().flatten().clone() for p in model.parameters()])


# What the losses see


def reference(model, supervision, batch, encoder_states=None):
    """The model's own forward over a padded batch, by transformers alone: logits, hidden states, labels."""
    examples, pad = supervision.examples, model.config.pad_token_id
    rows = [torch.tensor(examples.sources[i]) for i in batch]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(examples.targets[i]) for i in batch], batch_first=True, padding_value=-100
    )
    mask = torch.zeros_like(ids)
    for at, row in enumerate(rows):
        mask[at, : len(row)] = 1
    extra = {} if encoder_states is None else {"encoder_outputs": (encoder_states,)}
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True, use_cache=False, **extra
        )
    return out, labels


@pytest.mark.parametrize("family", ["bart", "pegasus", "mbart", "marian", "t5"])
@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_every_term_is_what_transformers_own_forward_gives(family, size, tmp_path):
    """Masks from labels, layer outputs at [l + 1], each model over its own encoder, biases and scales in the head."""
    supervision = tiny(family, tmp_path / "t", size)
    batch = [0, 1, 2, 5]
    sums, _ = loss_and_gradient(supervision, batch)
    ours, labels = reference(supervision.student, supervision, batch)
    theirs, _ = reference(supervision.teacher, supervision, batch)
    real = labels != -100
    assert supervision.term_weights(batch)["logits"] == int(real.sum())
    assert sums["data"] == pytest.approx(float(ours.loss) * int(real.sum()), rel=1e-4)
    p = F.log_softmax(theirs.logits[real].double() / 2, -1)
    q = F.log_softmax(ours.logits[real].double() / 2, -1)
    assert sums["logits"] == pytest.approx(float((p.exp() * (p - q)).sum()) * 4, rel=1e-4)
    phi = {"2-2": [1, 2], "1-2": [1, 2]}[size]  # ceil((i + 1) * 3 / 2) - 1
    hidden = sum(
        ((ours.decoder_hidden_states[i + 1][real] - theirs.decoder_hidden_states[t + 1][real]) ** 2).mean(-1).sum()
        for i, t in enumerate(phi)
    )
    assert sums["hidden"] == pytest.approx(float(hidden), rel=1e-4)
    if size == "1-2":
        tokens = torch.zeros_like(ours.encoder_last_hidden_state[..., 0], dtype=torch.bool)
        for at, i in enumerate(batch):
            tokens[at, : len(supervision.examples.sources[i])] = True
        states = (ours.encoder_hidden_states[1] - theirs.encoder_hidden_states[2])[tokens]
        assert sums["encoder_hidden"] == pytest.approx(float(states.pow(2).mean(-1).sum()), rel=1e-4)
        assert supervision.term_weights(batch)["encoder_hidden"] == int(tokens.sum())
        wrong, _ = reference(supervision.teacher, supervision, batch, ours.encoder_last_hidden_state)
        w = F.log_softmax(wrong.logits[real].double() / 2, -1)
        assert sums["logits"] != pytest.approx(float((w.exp() * (w - q)).sum()) * 4, rel=1e-2)
    else:
        assert "encoder_hidden" not in sums


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
@pytest.mark.parametrize(("method", "size"), [("kd", "2-2"), ("kd", "2-1"), ("sft", "2-2"), ("kd", "1-2")])
def test_cached_and_live_supervision_give_the_same_losses_and_gradients(family, method, size, tmp_path):
    live = tiny(family, tmp_path / "t", size, method)
    cached = with_stores(live, load_model(tmp_path / "t"), tmp_path / "cache")
    assert (cached.encoded is not None) == (size != "1-2")
    assert bool(cached.cached_decoder_states) == (method == "kd")
    batch = [4, 0, 3]
    sums, gradient = loss_and_gradient(live, batch)
    cached_sums, cached_gradient = loss_and_gradient(cached, batch)
    assert cached_sums == pytest.approx(sums, rel=1e-5)
    assert distance(cached_gradient, gradient) < 1e-5


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
@pytest.mark.parametrize("size", ["2-2", "2-1"])
def test_cached_and_live_supervision_agree_where_training_computes_in_bf16(family, size, tmp_path):
    """Seen: terms up to 2.1e-4 apart, gradients up to 0.012; a final norm's states are rounded when they are kept."""
    live = soft(tiny(family, tmp_path / "t", size))
    live = replace(live, table=frozen_lm_head_weight(live.student, torch.bfloat16))
    cached = with_stores(live, live.teacher, tmp_path / "cache", CacheDtypes("bf16", "bf16"))
    batch = [0, 1, 2, 3]
    exact, _ = loss_and_gradient(replace(live, table=None), batch)
    sums, gradient = loss_and_gradient(live, batch, "bf16")
    cached_sums, cached_gradient = loss_and_gradient(cached, batch, "bf16")
    assert sums != exact
    assert cached_sums == pytest.approx(sums, rel=5e-4)
    assert distance(cached_gradient, gradient) < 0.025


def soft(supervision):
    """T5 does not scale attention, so that a tiny model's is close to an argmax: it is made less so, in both models."""
    if supervision.student.config.model_type == "t5":
        with torch.no_grad():
            for model in (supervision.teacher, supervision.student):
                for name, weight in model.named_parameters():
                    weight.mul_(0.25 if name.endswith("Attention.q.weight") else 1)
    return supervision


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_a_bf16_cache_costs_little(family, tmp_path):
    """bf16 keeps 8 bits, a relative error of at most 2**-8 per value; sums over many average it out."""
    live = soft(tiny(family, tmp_path / "t"))
    cached = with_stores(live, live.teacher, tmp_path / "cache", CacheDtypes("bf16", "fp32"))
    sums, gradient = loss_and_gradient(live, [0, 1, 2, 3])
    cached_sums, cached_gradient = loss_and_gradient(cached, [0, 1, 2, 3])
    assert cached_sums == pytest.approx(sums, rel=1e-2)
    assert 0 < distance(cached_gradient, gradient) < 0.1


def test_a_cached_run_asks_neither_encoder_nor_teacher(tmp_path):
    live = tiny("bart", tmp_path / "t")
    cached = replace(with_stores(live, live.teacher, tmp_path / "cache"), teacher=None)

    def never(*_args, **_kwargs):
        raise AssertionError("this was to come from the cache")

    expected = loss_and_gradient(live, [0, 1])
    cached.student.get_encoder().forward = never
    sums, gradient = loss_and_gradient(cached, [0, 1])
    assert sums == pytest.approx(expected[0], rel=1e-5)
    assert distance(gradient, expected[1]) < 1e-5


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_a_student_with_an_encoder_or_embeddings_of_its_own_reads_what_still_holds(family, tmp_path):
    """Trained embeddings: the student's encoder and head move away from the teacher's; the decoder's states stay."""
    live = tiny(family, tmp_path / "t")
    for parameter in families.embedding_parameters(live.student):
        parameter.requires_grad_(True)
    live = replace(live, encoder_shared=False, head_shared=False)
    with torch.no_grad():
        for parameter in live.student.parameters():
            parameter.mul_(1.01)
    cached = with_stores(live, live.teacher, tmp_path / "cache")
    assert cached.encoded is None
    assert sorted(cached.cached_decoder_states) == live.layers_needed

    sums, gradient = loss_and_gradient(live, [0, 3])
    cached.teacher.get_encoder().forward = cached.teacher.get_decoder().forward = None  # only its head is used
    cached_sums, cached_gradient = loss_and_gradient(cached, [0, 3])
    assert cached_sums == pytest.approx(sums, rel=1e-5)
    assert distance(cached_gradient, gradient) < 1e-5


@pytest.mark.parametrize("family", ["bart", "pegasus", "mbart", "marian", "t5"])
@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_padding_changes_nothing(family, size, tmp_path):
    supervision = tiny(family, tmp_path / "t", size)
    lengths = {(len(supervision.examples.sources[i]), len(supervision.examples.targets[i])) for i in (0, 1, 3)}
    assert len(lengths) == 3
    together, _ = loss_and_gradient(supervision, [0, 1, 3])
    alone = [loss_and_gradient(supervision, [i])[0] for i in (0, 1, 3)]
    assert together == pytest.approx({k: sum(one[k] for one in alone) for k in together}, rel=1e-4)


def test_a_full_student_of_its_teacher_has_no_distillation_loss(tmp_path):
    supervision = tiny("bart", tmp_path / "t", size="2-3")
    sums, _ = loss_and_gradient(supervision, [0, 1])
    assert sums["logits"] == pytest.approx(0, abs=1e-4)
    assert sums["hidden"] == pytest.approx(0, abs=1e-6)
    assert sums["data"] > 1


# Steps


@pytest.mark.parametrize("family", ["bart", "pegasus", "mbart", "marian"])
def test_the_masks_that_a_gpu_is_given_say_what_the_plain_one_says(family, tmp_path):
    supervision = tiny(family, tmp_path / "t")
    batch, student = supervision.read_batch([0, 1, 2]), supervision.student.eval()
    assert not batch.source_mask.all()
    with torch.no_grad():
        encoded = families.encode(student, batch.ids, batch.source_mask).last_hidden_state
        ids = families.shift_right(student, batch.labels)
        plain = families.decode(student, ids, encoded, batch.source_mask).last_hidden_state
        masks = families.sdpa_masks(student, ids, batch.source_mask)
        given = student.get_decoder()(ids, encoder_hidden_states=encoded, use_cache=False, **masks).last_hidden_state
    torch.testing.assert_close(plain, given)


def stepped(supervision, settings, worker=None, batches=((0, 1, 2, 3, 4, 5),)):
    parameters = [p for p in supervision.student.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    means = {}
    for batch in batches:
        now = read_step_inputs(supervision, batch, settings, worker or Worker())
        means = train_step(supervision, now, settings, worker or Worker(), None, parameters, optimizer)
    return {name: float(value) for name, value in means.items()}, weights_of(supervision.student)


@pytest.mark.parametrize("size", ["2-2", "1-2"])
def test_micro_batches_of_different_lengths_make_the_same_step(size, tmp_path):
    settings = Training(batch_size=6, gradient_clip=1e9)
    start = weights_of(tiny("bart", tmp_path / "t", size).student)
    means, whole = stepped(tiny("bart", tmp_path / "t", size), settings)
    micro_means, split = stepped(tiny("bart", tmp_path / "t", size), settings.model_copy(update={"accumulation": 4}))
    assert micro_means == pytest.approx(means, rel=1e-5)
    assert distance(split - start, whole - start) < 1e-5


def test_gradients_are_clipped_to_the_norm_asked_for(tmp_path):
    start = weights_of(tiny("bart", tmp_path / "t").student)
    _, after = stepped(tiny("bart", tmp_path / "t"), Training(batch_size=6, gradient_clip=0.5))
    assert float((after - start).norm()) == pytest.approx(0.1 * 0.5, rel=1e-3)  # learning rate times norm


@pytest.mark.parametrize("family", ["bart", "t5"])
def test_the_plain_attention_kernel_trains_as_the_fused_one(family, tmp_path, monkeypatch):
    """In bf16 on a CPU, where short micro-batches take it: nearer to each other than either is to float32."""

    def gradient(short, precision):
        monkeypatch.setattr("raydistill.training.loop.MATH_ATTENTION_MAX_TOKENS", short)
        supervision = tiny(family, tmp_path / "t")
        parameters = [p for p in supervision.student.parameters() if p.requires_grad]
        now = read_step_inputs(supervision, list(range(6)), Training(batch_size=6), Worker())
        settings, optimizer = Training(gradient_clip=1e9), torch.optim.SGD(parameters)
        train_step(supervision, now, settings, Worker(), precision, parameters, optimizer)
        return torch.cat([p.grad.flatten() for p in parameters])

    plain, fused, exact = gradient(128, torch.bfloat16), gradient(0, torch.bfloat16), gradient(0, None)
    assert 0 < distance(plain, fused) < 0.7 * distance(fused, exact)


@pytest.mark.parametrize("most", [0.5, 1e9])
@pytest.mark.parametrize("kind", ["adamw", "adafactor"])
def test_clipping_within_the_step_is_clipping_before_it(kind, most):
    torch.manual_seed(0)
    start = [torch.randn(4, 3), torch.randn(5)]
    gradients = [[torch.randn_like(p) for p in start] for _ in range(3)]
    settings = Training(optimizer=kind, learning_rate=0.1, weight_decay=0.1)

    def ends(take):
        parameters = [torch.nn.Parameter(p.clone()) for p in start]
        optimizer = make_optimizer(parameters, settings)
        for step_gradients in gradients:
            for p, gradient in zip(parameters, step_gradients, strict=True):
                p.grad = gradient.clone()
            take(optimizer, parameters)
        return torch.cat([p.detach().flatten() for p in parameters])

    def one_after_another(optimizer, parameters):
        torch.nn.utils.clip_grad_norm_(parameters, most)
        optimizer.step()

    torch.testing.assert_close(ends(lambda o, ps: clip_and_step(o, ps, most)), ends(one_after_another))


def no_scores(supervision):
    """A validation that keeps the weights and scores nothing: each check is better than the one before."""
    calls = itertools.count(1)

    def validate(folder):
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(weights_of(supervision.student), folder / "weights.pt")
        return {"score": float(next(calls))}

    return validate


DATA_PARALLEL = {**EXACT, "batch_size": 5, "epochs": 2, "checks_per_epoch": 3, "max_steps": 6}


def data_parallel(folder, stored):
    """What each worker trains; `stored`: from the teacher cache, made by the first to ask."""
    live = tiny("bart", folder / "t", n=11)
    return with_stores(live, live.teacher, folder / "cache") if stored else live


def _data_parallel_worker(rank, world, folder, stored):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    supervision = data_parallel(folder, stored)
    settings = Training(**DATA_PARALLEL, workers=world)
    state = fit(
        supervision, settings, no_scores(supervision), folder / "run", lambda m, f: None, Worker(rank, world, "cpu")
    )
    torch.save((weights_of(supervision.student), state.history), folder / f"rank{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("stored", [False, True])
def test_two_workers_with_the_same_global_batch_train_the_same_weights(stored, tmp_path):
    """11 rows in batches of 5: the last batch has one row, so that one of the workers has none."""
    alone = data_parallel(tmp_path, stored)
    start = weights_of(alone.student)
    (tmp_path / "one").mkdir()
    (tmp_path / "run").mkdir()
    state = fit(alone, Training(**DATA_PARALLEL), no_scores(alone), tmp_path / "one", lambda m, f: None)
    torch.multiprocessing.spawn(_data_parallel_worker, (2, tmp_path, stored), nprocs=2)
    for rank in (0, 1):
        weights, history = torch.load(tmp_path / f"rank{rank}.pt")
        assert distance(weights - start, weights_of(alone.student) - start) < 1e-4
        assert [h["loss"] for h in history] == pytest.approx([h["loss"] for h in state.history], rel=1e-4)
    assert state.step == 6


# The loop


CLOCKS = ("time_s", "validation_s", "gpu_hours", "step_ms", "data_wait")


def recorded(supervision, settings, folder, report=lambda m, f: None, validate=None):
    folder.mkdir(exist_ok=True)
    state = fit(supervision, settings, validate or no_scores(supervision), folder, report)
    return [{k: v for k, v in m.items() if k not in (*CLOCKS, "score")} for m in state.history], state


LOOP = Training(**EXACT, batch_size=2, epochs=2, checks_per_epoch=3, patience=99)


def test_dropout_acts_in_the_loop(tmp_path):
    """Else the tests of resuming below would hold for nothing."""
    with_dropout, _ = recorded(tiny("bart", tmp_path / "t", dropout=0.3), LOOP, tmp_path / "a")
    other_seed, _ = recorded(
        tiny("bart", tmp_path / "t", dropout=0.3), LOOP.model_copy(update={"seed": 1}), tmp_path / "b"
    )
    again, _ = recorded(tiny("bart", tmp_path / "t", dropout=0.3), LOOP, tmp_path / "c")
    assert with_dropout == again
    assert with_dropout != other_seed


DEATHS = ["after the state", "before the state", "after the checkpoint alone"]


@pytest.mark.parametrize(
    ("died", "optimizer", "stored"),
    [*itertools.product(DEATHS, ["adamw", "adafactor"], [False]), ("after the state", "adamw", True)],
)
def test_a_killed_run_goes_on_as_if_it_had_not_been(died, optimizer, stored, tmp_path, monkeypatch):
    settings = LOOP.model_copy(update={"optimizer": optimizer})

    def begun():
        live = tiny("bart", tmp_path / "t", dropout=0.3)
        return with_stores(live, live.teacher, tmp_path / "cache") if stored else live

    whole = begun()
    expected, _ = recorded(whole, settings, tmp_path / "whole")
    assert len(expected) == 6

    class Killed(Exception):
        pass

    def dies(metrics, _folder):
        if metrics["step"] == 3:
            raise Killed

    killed = begun()
    real_save, real_write = loop.save_state, loop.write_atomic
    if died == "before the state":

        def dying(folder, state, *rest):
            dies({"step": state.step}, folder)
            real_save(folder, state, *rest)

        monkeypatch.setattr(loop, "save_state", dying)
    if died == "after the checkpoint alone":

        def dying_write(path, content):
            if path.name == "metrics.jsonl" and content.count(b"\n") == 3:
                raise Killed
            real_write(path, content)

        monkeypatch.setattr(loop, "write_atomic", dying_write)
    with pytest.raises(Killed):
        recorded(killed, settings, tmp_path / "run", report=dies)
    monkeypatch.undo()
    torch.manual_seed(12345)  # whatever the new process drew before
    torch.rand(7)
    later = begun()
    found, state = recorded(later, settings, tmp_path / "run")
    assert found == expected
    assert torch.equal(weights_of(later.student), weights_of(whole.student))
    assert state.step == 6
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    names = sorted(p.name for p in (tmp_path / "run").iterdir())
    assert names == [f"checkpoint-{state.best_step}", "metrics.jsonl", "state-6.safetensors", "state.json"]


def test_the_clock_has_the_start_and_every_validation_in_it_and_goes_on_after_a_kill(tmp_path):
    """Each validation takes 0.2 s, and each of the two starts was 5 s before the loop; the first dies at its third."""
    supervision = tiny("bart", tmp_path / "t")
    keep = no_scores(supervision)

    def slow(folder):
        time.sleep(0.2)
        return keep(folder)

    def dies(metrics, _folder):
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(KeyboardInterrupt):
        fit(supervision, LOOP, slow, folder, dies, started_at=time.monotonic() - 5)
    saved = json.loads((folder / "state.json").read_text())["seconds"]
    assert 5.6 <= saved < 8
    state = fit(supervision, LOOP, slow, folder, lambda m, f: None, started_at=time.monotonic() - 5)
    assert saved + 5.6 <= state.history[-1]["time_s"] <= state.seconds < saved + 8
    assert state.history[2]["time_s"] == pytest.approx(saved, abs=1e-3)


def test_settings_of_memory_may_change_when_a_run_is_taken_up(tmp_path):
    run = Run.model_validate({"name": "r", "teacher": "t", "dataset": "d", "training": {"micro_tokens": 16384}})
    run_folder.check_same_config(tmp_path, run)
    other = {"name": "r", "teacher": "t", "dataset": "d", "training": {"gpus": 0.5}}
    run_folder.check_same_config(tmp_path, Run.model_validate(other))
    other["training"]["batch_size"] = 7
    with pytest.raises(UserError, match="other settings"):
        run_folder.check_same_config(tmp_path, Run.model_validate(other))


def test_a_micro_batch_on_a_gpu_is_bounded_by_its_share_and_by_targets_first():
    examples = Examples([[1] * 400] * 64, [[1] * 25] * 64, list(range(64)))

    def sizes(gpus, shared, targets=25):
        longer = Examples(examples.sources, [[1] * targets] * 64, examples.source_indices)
        supervision = types.SimpleNamespace(encoder_shared=shared)
        most = loop.micro_batch_limits(supervision, Training(gpus=gpus), Worker(device="cuda:0"))
        return [len(part) for part in split_by_tokens(range(64), longer, *most)]

    assert sizes(1, True) == [64]  # 64 * (100 + 25) = 8,000 of 16,384
    assert sizes(0.25, True) == [32, 32]  # 32 * 125 = 4,000 of 4,096
    assert sizes(1, False) == [38, 26]  # 38 * 425 = 16,150
    assert sizes(1, True, targets=512) == [26, 26, 12]  # 26 * 612 = 15,912
    assert loop.micro_batch_limits(None, Training(gpus=0.25), Worker()) == (16_384, 1.0)
    told = Training(gpus=0.25, micro_tokens=999)
    assert loop.micro_batch_limits(None, told, Worker(device="cuda:0")) == (999, 1.0)


def test_a_gpu_without_memory_is_told_with_what_to_do(tmp_path):
    """Raised here by hand, where torch raises it: in the midst of training."""
    save_tiny("bart", tmp_path / "teacher")

    def full(metrics, folder):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    lines = [
        json.dumps({"id": str(i), "source": s, "target": t}) for i, (s, t) in enumerate(zip(*texts(6), strict=True))
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text("\n".join(lines))
    run = {"name": "r", "teacher": str(tmp_path / "teacher"), "student": {"size": "2-2"}, "dataset": str(tmp_path)}
    run["training"] = {"max_steps": 1, "precision": "fp32"}
    with pytest.raises(UserError, match=r"too little memory: CUDA out of memory\. Lower training\.micro_tokens"):
        train(Run.model_validate(run), tmp_path / "run", full)


def test_a_run_under_way_is_charged_a_gpu_per_worker_or_the_cores_of_its_threads(tmp_path):
    threads = LOOP.model_copy(update={"threads": 3})
    assert [Worker(world_size=2, device=name).num_devices(threads) for name in ("cpu", "cuda", "cuda:1")] == [6, 2, 2]
    assert Worker(device="cuda").num_devices(LOOP.model_copy(update={"gpus": 0.25})) == 0.25
    supervision = tiny("bart", tmp_path / "t")
    folder = tmp_path / "trials" / "run"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text("{}")
    state = fit(supervision, threads, no_scores(supervision), folder, lambda m, f: None)
    [trial] = read_trials(tmp_path)
    assert (trial.status, trial.device_hours) == ("running", state.history[-1]["gpu_hours"])
    assert trial.device_hours == pytest.approx(3 * state.history[-1]["time_s"] / 3600, rel=0.01)


def scripted(supervision, scores):
    keep = no_scores(supervision)

    def validate(folder):
        return {"score": scores[int(keep(folder)["score"]) - 1]}

    return validate


@pytest.mark.parametrize(
    ("patience", "scores", "checks", "best"),
    [
        (2, [1, 3, 2, 3, 9, 9, 9, 9], 4, 2),  # an equal score is no better one
        (3, [5, 4, 3, 2, 9, 9, 9, 9], 4, 1),
        (2, [1, 2, 1, 3, 2, 4, 1, 5], 8, 8),
        (None, [4, 3, 2, 1, 9, 9, 9, 9], 3, 1),  # the default is an epoch of checks: 2
    ],
)
def test_it_stops_without_a_better_score_and_keeps_the_best(patience, scores, checks, best, tmp_path):
    supervision = tiny("bart", tmp_path / "t", n=8)
    # 4 steps an epoch: a check after every second
    settings = LOOP.model_copy(update={"patience": patience, "epochs": 4, "checks_per_epoch": 2})
    at_check = []
    state = recorded(
        supervision,
        settings,
        tmp_path / "run",
        report=lambda m, f: at_check.append(weights_of(supervision.student)),
        validate=scripted(supervision, scores),
    )[1]
    assert (len(state.history), state.best_step, state.best_score) == (checks, 2 * best, scores[best - 1])
    kept = list((tmp_path / "run").glob("checkpoint-*"))
    assert [p.name for p in kept] == [f"checkpoint-{2 * best}"]
    assert torch.equal(torch.load(kept[0] / "weights.pt"), at_check[best - 1])
    again = tiny("bart", tmp_path / "t", n=8)
    after = fit(again, settings, scripted(again, [99]), tmp_path / "run", lambda m, f: None)
    assert after.step == state.step  # stopped is stopped


def test_learning_rates_are_those_worked_out_by_hand():
    linear = Training(warmup_steps=4)
    expected = [0.25, 0.5, 0.75, 1.0, 1.0, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6, 0]
    assert [learning_rate_factor(s, linear, 10) for s in range(11)] == pytest.approx(expected)
    constant = Training(warmup_steps=2, schedule="constant")
    assert [learning_rate_factor(s, constant, 10) for s in (0, 1, 2, 9)] == [0.5, 1.0, 1.0, 1.0]
    none = Training(warmup_steps=0)
    assert [learning_rate_factor(s, none, 4) for s in range(4)] == [1.0, 0.75, 0.5, 0.25]
    longer_than_the_run = Training(warmup_steps=500)  # warm-up takes half of it at most
    assert [learning_rate_factor(s, longer_than_the_run, 4) for s in range(4)] == [0.5, 1.0, 1.0, 0.5]


def test_the_loop_uses_the_schedule_also_after_going_on(tmp_path):
    class Killed(Exception):
        pass

    def dies(metrics, _folder):
        if metrics["step"] == 2:
            raise Killed

    settings = LOOP.model_copy(update={"warmup_steps": 0, "learning_rate": 0.06})
    with pytest.raises(Killed):
        recorded(tiny("bart", tmp_path / "t"), settings, tmp_path / "run", report=dies)
    history, _ = recorded(tiny("bart", tmp_path / "t"), settings, tmp_path / "run")
    # The rate that the next step will use.
    assert [h["learning_rate"] for h in history] == pytest.approx([0.05, 0.04, 0.03, 0.02, 0.01, 0.0])


def test_epochs_are_counted_without_the_noise_of_floating_point(tmp_path):
    supervision = tiny("bart", tmp_path / "t", n=10)
    settings = LOOP.model_copy(update={"batch_size": 1, "epochs": 1.1, "checks_per_epoch": 1})
    _, state = recorded(supervision, settings, tmp_path / "run")
    assert state.step == 11  # 1.1 * 10 is 11.000000000000002


def test_a_loss_that_is_no_number_ends_the_run(tmp_path):
    supervision = tiny("bart", tmp_path / "t")
    with torch.no_grad():
        supervision.student.get_decoder().layers[0].fc1.weight.fill_(math.nan)
    with pytest.raises(NonFiniteLoss, match="the loss is nan at step 1; try a lower learning rate"):
        recorded(supervision, LOOP, tmp_path / "run")


def test_a_metric_that_is_no_number_ends_the_run_too(tmp_path):
    supervision = tiny("bart", tmp_path / "t")
    with pytest.raises(NonFiniteLoss, match="val_loss is nan"):
        recorded(supervision, LOOP, tmp_path / "run", validate=lambda f: {"score": 0.0, "val_loss": math.nan})


# Frozen parts


@pytest.mark.parametrize("family", ["bart", "marian", "t5"])
def test_training_leaves_encoder_embeddings_and_teacher_bitwise_alone(family, tmp_path):
    supervision = tiny(family, tmp_path / "t", dropout=0.3)
    teacher, student = supervision.teacher, supervision.student
    before = {name: p.detach().clone() for name, p in student.named_parameters()}
    teacher_before = weights_of(teacher)
    recorded(supervision, LOOP, tmp_path / "run")
    fixed = ("shared.", "embed_tokens.", "embed_positions.", "lm_head.", "encoder.")
    for name, parameter in student.named_parameters():
        if not name.endswith("k_proj.bias"):  # a softmax does not depend on it
            assert torch.equal(parameter, before[name]) == any(part in name for part in fixed), name
    assert torch.equal(weights_of(teacher), teacher_before)
    assert all(p.grad is None for p in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize("family", ["bart", "t5"])
@pytest.mark.parametrize("embeddings", [True, False])
def test_dropout_does_not_act_on_a_frozen_encoder(family, embeddings, tmp_path):
    supervision = tiny(family, tmp_path / "t", dropout=0.5)
    if not embeddings:
        for parameter in families.embedding_parameters(supervision.student):
            parameter.requires_grad_(True)
        supervision = DistillationStep(
            supervision.student, None, supervision.examples, "sft", Loss(), supervision.plan, encoder_shared=False
        )
    loop._set_train_mode(supervision)
    ids = torch.tensor([supervision.examples.sources[0]])
    mask = torch.ones_like(ids)
    one, two = (families.encode(supervision.student, ids, mask).last_hidden_state for _ in range(2))
    assert torch.equal(one, two)
    read = [families.decode(supervision.student, ids, one, mask).last_hidden_state for _ in range(2)]
    assert not torch.equal(*read)


def test_a_trained_encoder_has_dropout(tmp_path):
    supervision = tiny("bart", tmp_path / "t", size="1-2", dropout=0.5)
    loop._set_train_mode(supervision)
    ids = torch.tensor([supervision.examples.sources[0]])
    one, two = (families.encode(supervision.student, ids, torch.ones_like(ids)).last_hidden_state for _ in range(2))
    assert not torch.equal(one, two)


def test_everything_frozen_is_refused(tmp_path):
    student = load_model(save_tiny("bart", tmp_path / "t"))
    for parameter in student.get_decoder().parameters():
        parameter.requires_grad_(False)
    with pytest.raises(UserError, match="nothing is left to train"):
        freeze(student, FrozenParts(True, True, True))


# Batches


@given(
    st.lists(st.integers(1, 50), max_size=300),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_an_epoch_covers_every_example_once_and_is_decided_by_seed_and_epoch(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)


def test_other_seeds_and_epochs_have_other_orders_and_batches_hold_neighbours_in_length():
    lengths = [i % 40 + 1 for i in range(400)]
    orders = {str(epoch_batches(lengths, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch_batches(lengths, 8, 0, 0)) <= 2


@given(st.lists(st.integers(), unique=True, max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_shares_partition_a_batch_over_workers_and_micro_batches(batch, world, accumulation):
    shares = [shard_batch(batch, rank, world, accumulation) for rank in range(world)]
    assert sorted(i for mine in shares for micro in mine for i in micro) == sorted(batch)
    assert all(len(mine) <= accumulation and all(mine) for mine in shares)
    sizes = [sum(map(len, mine)) for mine in shares]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 50), max_size=100), st.integers(1, 200))
def test_buckets_hold_each_row_once_within_their_padded_tokens(lengths, tokens):
    found = list(bucket_by_length(lengths, tokens))
    assert sorted(i for batch in found for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= tokens for b in found)


# One run, from config to checkpoint


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a tiny teacher and a corpus of 24, 6 and 5 rows."""
    root = tmp_path_factory.mktemp("runs")
    for seed, (split, n) in enumerate({"train": 24, "validation": 6, "test": 5}.items()):
        pairs = zip(*texts(n, seed), strict=True)
        rows = [json.dumps({"id": f"{split}{i}", "source": s, "target": t}) for i, (s, t) in enumerate(pairs)]
        (root / f"{split}.jsonl").write_text("\n".join(rows) + "\n")
    save_tiny("bart", root / "teacher", logits_bias=True)
    write_label_set(
        root / "labels",
        [(f"train{i}", [Candidate(f"Two small dogs {i}.", 0.0)]) for i in range(24)],
        lambda: {"rows": 24},
    )
    return root


def make_run(place, method="sft", **changes):
    training = {"epochs": 1, "batch_size": 8, "warmup_steps": 2, "checks_per_epoch": 2, "precision": "fp32"}
    data = {
        "name": "tiny",
        "teacher": str(place / "teacher"),
        "dataset": {"name": str(place), "max_source_tokens": 40, "max_target_tokens": 20},
        "method": method,
        "student": {"size": "2-1"},
        "training": training | changes.pop("training", {}),
        "decoding": {"beams": 2, "max_length": 8},
        **changes,
    }
    return Run.model_validate({key: value for key, value in data.items() if value is not None})


def read(path):
    return json.loads(path.read_text())


@pytest.mark.parametrize("method", ["sft", "kd", "pl"])
def test_a_run_leaves_its_checkpoint_its_card_and_its_result(place, method, tmp_path):
    reports = []
    inputs = RunInputs(
        label_folders={"pseudo": place / "labels"},
        cache_root=tmp_path / "cache",
        costs={"latency_ms": 5.0},
        result_fields={"trial": 3},
    )
    folder = tmp_path / "run"
    result = train(make_run(place, method), folder, lambda m, f: reports.append(m), inputs)
    assert result == read(folder / "result.json")
    assert (result["status"], result["steps"], result["size"], result["trial"]) == ("done", 3, "2-1", 3)
    assert result["metrics"]["latency_ms"] == 5.0
    assert set(result["metrics"]) >= {"rouge1", "rouge2", "rougeL", "rougeLsum", "score", "val_loss", "gpu_hours"}
    assert result["labels"] == {"pl": "pseudo"}.get(method, "original")
    assert [m["step"] for m in reports] == [2, 3]
    assert {"step_ms", "data_wait", "validation_s"} <= set(reports[0])
    assert 0 <= reports[0]["data_wait"] <= 1
    assert reports == [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    with np.load(folder / "rows.npz") as rows:
        assert (rows["validation"].shape, rows["test"].shape) == ((6,), (5,))
        assert rows["validation"].mean() == pytest.approx(result["metrics"]["rouge2"])
    assert sorted(p.name for p in folder.iterdir()) == [
        *(".lock", "best", "metrics.jsonl", "origin.json", "result.json", "rows.npz", "run.json")
    ]

    card = read(folder / "best" / "raydistill.json")
    assert card["teacher"] == str(place / "teacher")
    assert (card["size"], card["method"]) == ("2-1", method)
    assert card["copied"] == {"encoder": [0, 1], "decoder": [0]}
    assert card["supervised"] == {"encoder": [0, 1], "decoder": [2]}
    assert card["config"] == read(folder / "run.json") == make_run(place, method).model_dump(mode="json")
    assert set(card["data"]) == set(card["scores"]) | {"train"} == {"train", "validation", "test"}
    assert card["scores"]["validation"]["rouge2"] == result["metrics"]["rouge2"]
    assert card["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]

    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "best")
    assert families.size_name(model.config) == "2-1"
    assert (model.generation_config.num_beams, model.generation_config.max_length) == (2, 8)
    assert AutoTokenizer.from_pretrained(folder / "best")("A dog").input_ids
    assert model.state_dict()["final_logits_bias"].abs().sum() > 0
    before = (folder / "result.json").stat().st_mtime_ns
    assert train(make_run(place, method), folder, never_called, inputs) == result
    assert (folder / "result.json").stat().st_mtime_ns == before


def test_pseudo_labels_are_what_a_pl_student_learns(place, tmp_path):
    """After some epochs on one constant sentence the loss on it is far below that of a student of the originals."""
    constant = [(f"train{i}", [Candidate("No one.", 0.0)]) for i in range(24)]
    write_label_set(tmp_path / "same", constant, lambda: {"rows": 24})
    training = {"epochs": 10, "learning_rate": 0.03, "checks_per_epoch": 1, "patience": 10}
    run = make_run(place, "pl", training=training, labels=str(tmp_path / "same"))
    train(run, tmp_path / "pl", lambda m, f: None)
    train(make_run(place, training=training), tmp_path / "sft", lambda m, f: None)
    losses = {name: read_metrics(tmp_path / name)[-1]["loss_data"] for name in ("pl", "sft")}
    assert losses["pl"] < 0.8 * losses["sft"]


def never_called(_metrics, _folder):
    raise AssertionError("a finished run reports nothing")


def read_metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("form", ["bart", "marian"])
def test_a_random_start_trains_a_new_model(place, form, tmp_path):
    start = {"form": form, "encoder_layers": 1, "decoder_layers": 2, "d_model": 16, "heads": 2, "ffn_dim": 32}
    start |= {"vocab_size": 330, "max_positions": 64}
    run = make_run(place, teacher=None, student=None, start=start, training={"learning_rate": 0.01})
    folder = tmp_path / "run"
    result = train(run, folder, lambda m, f: None)
    assert (result["status"], result["size"], result["copied"]) == ("done", "1-2", None)
    best, begun = load_model(folder / "best"), load_model(folder / "start")
    for name, parameter in best.named_parameters():
        if "embed_positions" not in name or form == "bart":
            assert not torch.equal(parameter, dict(begun.named_parameters())[name]), name
    if form == "marian":
        tables: Any = (best.get_input_embeddings(), best.get_decoder().embed_tokens, best.lm_head)
        for table in tables:
            assert not table.weight[best.config.pad_token_id].any()
    assert read(folder / "best" / "raydistill.json")["teacher"] is None
    assert load_tokenizer(folder / "best").decode(load_tokenizer(folder / "best")("A dog").input_ids)


def test_a_killed_train_goes_on_to_the_same_checkpoint(place, tmp_path):
    run = make_run(place, "kd", training={"epochs": 2})

    class Killed(Exception):
        pass

    def dies(metrics, _folder):
        raise Killed

    train(run, tmp_path / "whole", lambda m, f: None)
    for _ in range(2):
        with pytest.raises(Killed):
            train(run, tmp_path / "run", dies)
    train(run, tmp_path / "run", lambda m, f: None)
    whole, later = (load_model(tmp_path / name / "best") for name in ("whole", "run"))
    assert torch.equal(weights_of(whole), weights_of(later))
    untimed = [
        [{k: v for k, v in m.items() if k not in CLOCKS} for m in read_metrics(tmp_path / n)] for n in ("whole", "run")
    ]
    assert untimed[0] == untimed[1]


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_that_holds_another_config_is_refused(place, finished, tmp_path):
    def report(_metrics, _folder):
        if not finished:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt):
        train(make_run(place), tmp_path / "run", report)
    with pytest.raises(UserError, match="run: holds a run with other settings"):
        train(make_run(place, training={"learning_rate": 0.5}), tmp_path / "run", lambda m, f: None)


def test_a_run_that_diverges_has_a_failed_result_with_its_reason(place, tmp_path):
    run = make_run(place, training={"learning_rate": 1e30, "warmup_steps": 0, "epochs": 4, "schedule": "constant"})
    result = train(run, tmp_path / "run", lambda m, f: None, RunInputs(result_fields={"trial": 1}))
    assert (result["status"], result["trial"], result["size"]) == ("failed", 1, "2-1")
    assert list(result["metrics"]) == ["gpu_hours"]  # it is charged what it took
    assert result["metrics"]["gpu_hours"] > 0
    assert "is nan at step" in result["reason"] or "is inf at step" in result["reason"]
    assert train(run, tmp_path / "run", lambda m, f: None) == result


def test_a_teachers_generation_config_is_not_its_students(place):
    teacher = open_teacher(str(place / "teacher"), Dataset(name=str(place)))
    student, _ = make_student(make_run(place), teacher)
    student.generation_config.num_beams = 77
    assert teacher.model.generation_config.num_beams != 77


def test_a_dropout_asked_for_is_set_and_the_teachers_stays(place, tmp_path):
    teacher = open_teacher(str(place / "teacher"), Dataset(name=str(place)))
    student, _ = make_student(make_run(place, training={"dropout": 0.25}), teacher)
    layers: Any = student.get_decoder().layers
    layer = layers[0]
    assert (layer.dropout, student.get_decoder().dropout, student.config.dropout) == (0.25, 0.25, 0.25)
    assert (layer.self_attn.dropout, layer.activation_dropout) == (0.0, 0.0)
    theirs: Any = teacher.model.get_decoder().layers
    assert theirs[0].dropout == 0.1
    student.train()
    assert layer.self_attn.dropout == student.config.attention_dropout


def test_a_cache_filled_before_is_what_the_run_opens(place, tmp_path):
    run, inputs = make_run(place, "kd"), RunInputs(cache_root=tmp_path / "cache")
    train(run, tmp_path / "first", lambda m, f: None, inputs)
    files = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")}
    assert sorted(p.parent.name for p in files) == ["layer-02", "states"]
    assert "model" not in vars(open_teacher(run.teacher, run.dataset))  # its memory is free while steps run
    train(run, tmp_path / "run", lambda m, f: None, inputs)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.bin")} == files


@pytest.mark.parametrize(
    ("cache", "keep", "training", "size", "stores", "teacher"),
    [
        ("full", "off", {}, "2-1", (True, True), False),
        ("encoder", "full", {}, "2-1", (True, False), True),
        ("off", "full", {}, "2-1", (False, False), True),
        ("auto", "full", {}, "2-1", (True, True), False),
        ("auto", "encoder", {}, "2-1", (True, False), True),
        ("auto", "off", {}, "2-1", (False, False), True),
        ("full", "off", {}, "1-1", (False, True), True),  # the shrunk encoder is taught by the teacher's
        ("full", "off", {"freeze_encoder": False}, "2-1", (False, True), False),
        ("full", "off", {"freeze_embeddings": False}, "2-1", (False, True), True),  # for its head
    ],
)
def test_which_stores_a_run_uses_and_whether_a_teacher_runs(
    place, cache, keep, training, size, stores, teacher, tmp_path
):
    run = make_run(place, "kd", student={"size": size}, training={"teacher_cache": cache, **training})
    theirs = open_teacher(str(place / "teacher"), Dataset(name=str(place)))
    student, layers = make_student(run, theirs)
    examples = Examples([[5, 6, 2]], [[7, 2]], [0])
    frozen = resolve_frozen_parts(run, layers)
    made = make_distillation_step(
        run, student, layers, theirs, examples, frozen, RunInputs(cache_root=tmp_path, cache_mode=keep), Worker()
    )
    assert (made.cached_encoder_states is not None, bool(made.cached_decoder_states)) == stores
    assert (made.teacher is not None) == teacher


def test_without_the_scoring_library_checkpoints_are_compared_by_validation_loss(place, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(validation, "METRIC_LIBRARIES", {"rouge2": "no_such_library"})
    result = train(make_run(place), tmp_path / "run", lambda m, f: None)
    metrics = result["metrics"]
    assert metrics["score"] == -metrics["val_loss"] == max(m["score"] for m in read_metrics(tmp_path / "run"))
    assert "rouge2" not in metrics
    assert (result["test"], result["interval"], result["signature"]) == (None, None, "val_loss")
    assert "no_such_library is not installed" in capsys.readouterr().err
    assert load_model(tmp_path / "run" / "best")


def test_validation_loss_is_the_mean_over_real_tokens(place, tmp_path):
    """Against transformers' own loss, row by row, of the best checkpoint."""
    train(make_run(place), tmp_path / "run", lambda m, f: None)
    model, tokenizer = load_model(tmp_path / "run" / "best"), load_tokenizer(tmp_path / "run" / "best")
    total, count = 0.0, 0
    for line in (place / "validation.jsonl").read_text().splitlines():
        row = json.loads(line)
        labels = torch.tensor([tokenizer(row["target"], truncation=True, max_length=20).input_ids])
        ids = torch.tensor([tokenizer(row["source"], truncation=True, max_length=40).input_ids])
        with torch.no_grad():
            total += float(model(input_ids=ids, labels=labels).loss) * labels.numel()
        count += labels.numel()
    assert read(tmp_path / "run" / "result.json")["metrics"]["val_loss"] == pytest.approx(total / count, rel=1e-4)


def test_a_checkpoint_appears_whole(tmp_path, monkeypatch):
    from raydistill.training.run_folder import save_checkpoint

    save_tiny("bart", tmp_path / "t")
    model, tokenizer = load_model(tmp_path / "t"), load_tokenizer(tmp_path / "t")

    def fails(*_args, **_kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(type(tokenizer), "save_pretrained", fails)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(model, tokenizer, tmp_path / "checkpoint-1")
    assert not (tmp_path / "checkpoint-1").exists()


def test_a_layer_choice_decides_copies_and_supervision(tmp_path):
    chosen = Student(size="2-2", copied=LayerChoice(decoder=[1, 2]), supervised=LayerChoice(decoder=[0, 1]))
    supervision = tiny("bart", tmp_path / "t", student=chosen)
    assert supervision.layers_needed == [0, 1, 2]  # the last one for the logits
    sums, _ = loss_and_gradient(supervision, [0])
    ours, _ = reference(supervision.student, supervision, [0])
    theirs, _ = reference(supervision.teacher, supervision, [0])
    hidden = sum(
        ((ours.decoder_hidden_states[i + 1] - theirs.decoder_hidden_states[i + 1]) ** 2).mean(-1).sum() for i in (0, 1)
    )
    assert sums["hidden"] == pytest.approx(float(hidden), rel=1e-4)


def test_a_run_that_is_told_to_stop_keeps_its_best_checkpoint_scored(place, tmp_path):
    run = make_run(place, training={"epochs": 4})
    reasons = iter([None, "others are better"])
    result = train(run, tmp_path / "s", lambda metrics, where: next(reasons), RunInputs())
    assert (result["status"], result["reason"]) == ("stopped", "others are better")
    lines = [json.loads(line) for line in (tmp_path / "s" / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert lines[-1]["step"] == result["steps"]
    assert 0 < lines[0]["progress"] < lines[1]["progress"] < 1
    assert result["interval"][0] <= result["metrics"]["score"] <= result["interval"][1]
    assert (tmp_path / "s" / "best" / "model.safetensors").is_file()
    assert train(run, tmp_path / "s", lambda metrics, where: None, RunInputs()) == result


def test_what_an_older_release_began_goes_on_though_it_lacks_a_setting(place, tmp_path):
    run = make_run(place)
    whole = train(run, tmp_path / "run", lambda metrics, where: None)
    path = tmp_path / "run" / "run.json"
    known = read(path)
    del known["evaluation"]["validation_length_penalty"], known["training"]["cache_precision"]
    path.write_text(json.dumps(known))
    assert train(run, tmp_path / "run", never_called) == whole
    path.write_text(json.dumps(known | {"method": "kd"}))
    with pytest.raises(UserError, match="holds a run with other settings"):
        train(run, tmp_path / "run", never_called)


@pytest.mark.parametrize("part", ["teacher", "train"])
def test_a_run_is_not_taken_up_with_another_teacher_or_other_data(place, tmp_path, part):
    def dies(metrics, where):
        raise KeyboardInterrupt

    run = make_run(place)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", dies)
    path = tmp_path / "run" / "origin.json"
    begun = read(path)
    assert begun == input_fingerprints(run)
    path.write_text(json.dumps(begun | ({"teacher": "other"} if part == "teacher" else {"data": {"train": "other"}})))
    with pytest.raises(UserError, match=f"the {part}.* changed since this run was begun"):
        train(run, tmp_path / "run", never_called)
    path.write_text(json.dumps(begun))
    assert train(run, tmp_path / "run", lambda metrics, where: None)["status"] == "done"


def test_a_run_whose_machine_goes_is_saved_at_that_step_and_goes_on_the_same_elsewhere(place, tmp_path):
    """Between two validations: nothing is done again, and the end is that of a run that nobody disturbed."""
    run = make_run(place, training={"epochs": 4, "checks_per_epoch": 1, "patience": 9})
    train(run, tmp_path / "whole", lambda metrics, where: None)
    asked = []

    def leaving():
        asked.append(True)
        return len(asked) == 4

    with pytest.raises(loop.Preempted, match="saved at step 5"):  # at step 3 there was a validation
        train(run, tmp_path / "run", lambda metrics, where: None, RunInputs(), Worker(is_draining=leaving))
    assert read(tmp_path / "run" / "state.json")["step"] == 5
    steps = []
    train(run, tmp_path / "run", lambda metrics, where: steps.append(metrics["step"]))
    assert steps == [6, 9, 12]
    whole, gone = (weights_of(load_model(tmp_path / name / "best")) for name in ("whole", "run"))
    torch.testing.assert_close(gone, whole, rtol=0, atol=1e-6)


def test_checks_during_training_have_a_decoding_of_their_own_and_the_end_has_the_runs(place, tmp_path, monkeypatch):
    """The paper's XSUM recipe looks at 2 beams with length penalty 0.5, and reports the teacher's own decoding."""
    used = []
    score = validation.Validator.score

    def noted(self, checkpoint, splits, beam):
        used.append((checkpoint.name == "best", *splits, beam.beams, beam.length_penalty, beam.max_length))
        return score(self, checkpoint, splits, beam)

    monkeypatch.setattr(validation.Validator, "score", noted)
    run = make_run(
        place,
        decoding={"beams": 3, "length_penalty": 1.5, "max_length": 8},
        evaluation={"validation_length_penalty": 0.5},
        training={"checks_per_epoch": 1},
    )
    train(run, tmp_path / "run", lambda metrics, where: None)
    assert used == [
        (False, "validation", 2, 0.5, 8),
        (True, "validation", "test", 3, 1.5, 8),
    ]


def test_a_stopped_run_that_dies_while_it_is_scored_is_stopped_still(place, tmp_path, monkeypatch):
    run = make_run(place, training={"epochs": 4})
    whole = train(run, tmp_path / "whole", stopped_at_the_second(), RunInputs())
    score = validation.Validator.score

    def dies(self, checkpoint, splits, beam):
        if checkpoint.name == "best":
            raise KeyboardInterrupt
        return score(self, checkpoint, splits, beam)

    monkeypatch.setattr(validation.Validator, "score", dies)
    with pytest.raises(KeyboardInterrupt):
        train(run, tmp_path / "run", stopped_at_the_second(), RunInputs())
    monkeypatch.setattr(validation.Validator, "score", score)
    again = train(run, tmp_path / "run", never_called, RunInputs())
    for name in ("status", "reason", "steps", "best_step", "interval", "test"):
        assert again[name] == whole[name], name
    assert torch.equal(*(weights_of(load_model(tmp_path / name / "best")) for name in ("whole", "run")))


def test_the_best_checkpoint_takes_the_place_of_an_older_one(place, tmp_path):
    run = make_run(place)
    whole = train(run, tmp_path / "whole", lambda m, f: None, RunInputs())
    (tmp_path / "run" / "best").mkdir(parents=True)
    (tmp_path / "run" / "best" / "stale").touch()
    assert train(run, tmp_path / "run", lambda m, f: None, RunInputs())["best_step"] == whole["best_step"]
    assert not (tmp_path / "run" / "best" / "stale").exists()


def test_a_steps_time_is_until_its_numbers_are_there():
    """On a GPU a step returns before it is done; here the numbers come late."""

    class Late:
        def __truediv__(self, steps):
            time.sleep(0.1)
            return torch.tensor(3.0) / steps

    losses = loop._RunningMeans()
    losses.add({"loss": Late()}, time.monotonic() - 1.0, 0.25)
    found = losses.pop(Worker())
    assert found["loss"] == 3.0
    assert found["step_ms"] >= 1100
    assert found["data_wait"] == pytest.approx(250 / found["step_ms"])


def stopped_at_the_second():
    reasons = iter([None, "others are better"])
    return lambda metrics, folder: next(reasons)


def test_a_run_is_trained_by_one_process_at_a_time(place, tmp_path, monkeypatch):
    """A worker that outlived its driver still holds the folder: it is waited for, and not written beside."""
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT_S", 0.2)
    with run_lock(tmp_path), pytest.raises(UserError, match="another process trains this run"):
        train(make_run(place), tmp_path, never_called)
    assert [p.name for p in tmp_path.iterdir()] == [".lock"]
    monkeypatch.setattr(run_folder, "LOCK_TIMEOUT_S", 30)
    hold = (
        "import filelock, sys, time; a = filelock.FileLock(sys.argv[1]); a.acquire(); print(flush=True); time.sleep(60)"
    )
    outlived = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path / ".lock")], stdout=subprocess.PIPE)
    outlived.stdout.readline()
    threading.Timer(0.5, outlived.kill).start()
    assert train(make_run(place), tmp_path, lambda m, f: None)["status"] == "done"
    assert outlived.wait() == -signal.SIGKILL


def test_a_collapsed_run_keeps_its_reason_and_hours_and_no_checkpoint(place, tmp_path):
    folder = tmp_path / "trials" / "run"
    result = train(make_run(place), folder, lambda m, f: None, RunInputs(teacher_repetition=-1.0))
    assert (result["status"], list(result["metrics"])) == ("failed", ["repetition", "gpu_hours"])
    assert "collapsed" in result["reason"]
    assert not (folder / "best").exists()
    (folder / "best").mkdir()  # as a kill before it was deleted leaves it
    [trial] = read_trials(tmp_path)
    assert trial.checkpoint is None


def test_a_student_that_collapsed_where_its_teacher_did_not_has_failed():
    assert collapse_reason(0.9, None) is None
    assert collapse_reason(0.9, 0.6) is None
    assert "90% of its outputs" in str(collapse_reason(0.9, 0.1))
