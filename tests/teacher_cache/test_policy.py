"""What is cached: the union of what runs read, what fits and is faster to read, and the limit of disk space."""

import itertools
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest

from raydistill.config.run import Run
from raydistill.core import machine
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.teacher_cache import policy
from raydistill.teacher_cache.layout import CacheDtypes, CacheLayout
from raydistill.teacher_cache.policy import (
    EpochTimes,
    choose_mode,
    make_cache_layout,
    measure_epoch_times,
    measure_read_rate,
)
from tests.factories.teacher_cache import cache_examples, cache_layout

PHYSICAL_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def layout_of_2_4_mb(root, encoder=True, decoder=True):
    """2 MB of encoder states and 0.4 MB of decoder states."""
    examples = Examples([[1] * 100] * 10, [[1] * 10] * 10, list(range(10)))
    decoders = [(examples, [0, 2])] if decoder else []
    return CacheLayout(root, "key", examples, 1000, encoder, decoders, CacheDtypes("bf16"))


TIMES = EpochTimes(encoder=10.0, decoder=4.0, read_encoder=1.0, read_decoder=1.0)


@pytest.mark.parametrize(
    ("times", "available_bytes", "epochs", "encoder", "decoder", "mode", "reason"),
    [
        (TIMES, 3e6, 5, True, True, "full", "the states fit, and a cache is faster"),
        (TIMES, 2.2e6, 5, True, True, "encoder", "the decoder states do not fit"),
        (TIMES, 1e6, 5, True, True, "off", "the encoder states do not fit"),
        (replace(TIMES, read_encoder=9.0), 3e6, 5, True, True, "off", "a cache of the encoder states is not faster"),
        (
            replace(TIMES, read_decoder=4.0),
            3e6,
            5,
            True,
            True,
            "encoder",
            "a cache of the decoder states is not faster",
        ),
        (TIMES, 3e6, 1, True, True, "off", "a cache of the encoder states is not faster"),  # built for a single epoch
        (TIMES, 1e6, 5, False, True, "full", "the states fit, and a cache is faster"),
        (TIMES, 1e5, 5, False, True, "off", "the decoder states do not fit"),
        (TIMES, 3e6, 5, True, False, "encoder", "no run reads decoder states"),
    ],
)
def test_auto_caches_states_that_fit_and_are_faster_to_read(
    times, available_bytes, epochs, encoder, decoder, mode, reason, tmp_path
):
    chosen, chosen_reason = choose_mode(layout_of_2_4_mb(tmp_path, encoder, decoder), times, available_bytes, epochs)
    assert chosen == mode
    assert chosen_reason.startswith(reason)
    if "epochs in total" in chosen_reason:
        assert f"{epochs} epochs in total" in chosen_reason


def test_measured_times_are_scaled_to_the_corpus(teacher, tmp_path, monkeypatch):
    """The clock advances by half a second whenever it is read: a batch and the file of the disk take as long."""
    ticks = itertools.count(0, 0.5)
    monkeypatch.setattr(policy, "time", SimpleNamespace(perf_counter=lambda: next(ticks)))
    layouts = [cache_layout(tmp_path, cache_examples(n)) for n in (9, 9 * 40)]
    small, large = (measure_epoch_times(layout, teacher) for layout in layouts)
    assert small.encoder >= 0.5
    assert large.encoder > 5 * small.encoder
    assert large.decoder > 5 * small.decoder >= 2.5
    rate = policy.PROBE_BYTES / 0.5
    for layout, times in zip(layouts, (small, large), strict=True):
        encoder_bytes = layout.array_sizes[layout.encoder_array]
        assert times.read_encoder == encoder_bytes / rate
        assert times.read_decoder == (sum(layout.array_sizes.values()) - encoder_bytes) / rate
    assert measure_read_rate(tmp_path, cold_cache=True) == rate


def test_the_file_that_measures_the_read_rate_has_no_name_that_a_kill_could_leave(tmp_path, monkeypatch):
    fsync, names = os.fsync, []

    def list_and_fsync(descriptor):
        names.extend(path.name for path in tmp_path.iterdir())
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", list_and_fsync)
    measure_read_rate(tmp_path, cold_cache=True)
    assert names == []


@pytest.mark.parametrize(("limit", "reads_from_disk"), [(1_000, True), ("max", False)])
def test_memory_limit_of_the_control_group_decides_where_states_are_read_from(
    limit, reads_from_disk, teacher, tmp_path, monkeypatch
):
    monkeypatch.setattr(machine, "SYSTEM_ROOT", tmp_path / "system")
    for name, text in {"proc/self/cgroup": "0::/job", "sys/fs/cgroup/job/memory.max": limit}.items():
        path = tmp_path / "system" / name
        path.parent.mkdir(parents=True)
        path.write_text(f"{text}\n")
    layout = cache_layout(tmp_path / "cache", cache_examples())
    assert 500 < sum(layout.array_sizes.values()) < PHYSICAL_BYTES / 2
    dropped = []
    monkeypatch.setattr(os, "posix_fadvise", lambda *args: dropped.append(args))
    measure_epoch_times(layout, teacher)
    assert bool(dropped) == reads_from_disk


def make_run(method, size, labels="original", **training):
    student = {"size": size}
    settings = {"method": method, "labels": labels, "student": student, "training": training}
    return Run.model_validate({"name": "r", "teacher": "a/b", "dataset": "d", **settings})


def test_layout_holds_the_union_of_what_runs_read(tmp_path, teacher):
    examples = {
        "original": cache_examples(),
        "pseudo": Examples(cache_examples().sources, [[7, 2]] * 9, cache_examples().source_indices),
    }

    def layout_of(*runs):
        return make_cache_layout(runs, examples, "key", teacher.config, tmp_path, "bf16")

    layout = layout_of(
        (make_run("sft", "2-1"), "full"),
        (make_run("kd", "2-2"), "full"),  # supervised by layers 1 and 2
        (make_run("kd", "2-1"), "full"),  # supervised by layer 2
        (make_run("kd", "2-3", "pseudo"), "encoder"),
        (make_run("kd", "2-3"), "off"),
    )
    assert layout.encoder
    assert [(e is examples["original"], layers) for e, layers in layout.label_sets] == [(True, [1, 2])]
    assert not layout_of((make_run("kd", "1-1"), "full")).encoder
    assert not layout_of((make_run("sft", "2-1", freeze_embeddings=False), "full")).array_sizes


@pytest.mark.parametrize("mode", ["full", "encoder", "auto"])
def test_cache_gb_limits_every_mode(mode, teacher, tmp_path):
    def layout_with_limit(gigabytes):
        run = make_run("kd", "2-1", teacher_cache=mode, cache_gb=gigabytes)
        runs = [(run, "encoder" if mode == "encoder" else "full")]
        return make_cache_layout(runs, {"original": cache_examples()}, "k", teacher.config, tmp_path, "fp32")

    total_gb = sum(layout_with_limit(1).array_sizes.values()) / 1e9
    with pytest.raises(UserError, match=r"more than training\.cache_gb allows"):
        layout_with_limit(0.99 * total_gb).prepare()
    assert not list(tmp_path.iterdir())
    layout_with_limit(total_gb).prepare()
