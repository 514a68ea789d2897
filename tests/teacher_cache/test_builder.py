"""The teacher's states on disk: what they are, that a killed pass loses no part, and what is worth keeping."""

import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from raydistill.config.presets import DATASETS
from raydistill.config.run import Run
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.inference.ctranslate2_conversion import torch_threads
from raydistill.models.loading import load_model
from raydistill.search.dry_run import estimate_cache_bytes
from raydistill.teacher_cache import builder, store
from raydistill.teacher_cache.builder import (
    CacheBuilder,
    CacheDtypes,
    build_cache,
    open_decoder_states,
    open_encoder_states,
)
from raydistill.teacher_cache.policy import (
    EpochTimes,
    choose_mode,
    make_cache_builder,
    measure_epoch_times,
    measure_read_rate,
)
from tests.factories.models import save_tiny
from tests.factories.workspace import command, last_json

FP32 = CacheDtypes("fp32", "fp32")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return load_model(save_tiny("bart", tmp_path_factory.mktemp("t"), dropout=0.1))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(store, "PART_TOKENS", 30)


def pairs(n=9):
    """Sources and targets of ever other lengths; every source has a pair, source 2 has two, and 4 has none."""
    draw = torch.Generator().manual_seed(0)

    def tokens(length):
        return [*torch.randint(4, 100, (length,), generator=draw).tolist(), 2]

    rows = [2, *[row for row in range(n) if row != 4]]
    return Examples([tokens(3 + 5 * i % 11) for i in range(n)], [tokens(1 + i % 5) for i in range(len(rows))], rows)


def pass_of(root, examples, layers=(0, 2), numbers=FP32, encoder=True):
    return CacheBuilder(root, "key", examples, 16, encoder, [(examples, list(layers))], numbers)


def states_of(teacher, examples, i):
    """Encoder states and decoder layers of one example alone, by transformers' own forward."""
    source, target = examples.sources[examples.source_indices[i]], examples.targets[i]
    with torch.no_grad():
        out = teacher(
            input_ids=torch.tensor([source]), labels=torch.tensor([target]), output_hidden_states=True, use_cache=False
        )
    return out.encoder_last_hidden_state[0], [h[0] for h in out.decoder_hidden_states[1:]]


def near(found, expected):
    """The same but for the rounding of float32: one row alone and among others are summed in another order."""
    return found.shape == expected.shape and float((found - expected).norm() / expected.norm()) < 1e-4


def test_states_are_those_of_each_row_alone_in_its_real_positions(teacher, tmp_path):
    examples = pairs()
    work = pass_of(tmp_path, examples)
    build_cache(work, teacher)
    assert len(work.parts) > 2
    encoded, decoded = open_encoder_states(work), open_decoder_states(work)
    for i, row in enumerate(examples.source_indices):
        states, layers = states_of(teacher, examples, i)
        assert near(encoded.read_flat([row]), states)
        for layer in (0, 2):
            assert near(decoded[layer].read_flat([i]), layers[layer])
    assert encoded.nbytes == sum(map(len, examples.sources)) * 16 * 4
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.bin")) == sum(work.arrays.values())
    together = encoded.read_padded([1, 5])
    assert torch.equal(together[0, : len(examples.sources[1])], encoded.read_flat([1]))
    assert not together[0, len(examples.sources[1]) :].any()
    assert not list(tmp_path.rglob("*.making"))


def test_bf16_is_the_nearest_to_what_was_worked_out(teacher, tmp_path):
    exact, half = pass_of(tmp_path, pairs()), pass_of(tmp_path, pairs(), numbers=CacheDtypes("bf16", "fp32"))
    for work in (exact, half):
        build_cache(work, teacher)
    assert torch.equal(
        open_encoder_states(half).read_flat([3, 0]), open_encoder_states(exact).read_flat([3, 0]).bfloat16()
    )


def test_layers_are_added_without_touching_those_there(teacher, tmp_path):
    build_cache(pass_of(tmp_path, pairs(), [2]), teacher)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    encoder = teacher.get_encoder()
    real = encoder.forward
    encoder.forward = None  # its states are there
    try:
        work = pass_of(tmp_path, pairs(), [0, 2])
        build_cache(work, teacher)
    finally:
        encoder.forward = real
    assert {p: p.stat().st_mtime_ns for p in before} == before
    _, layers = states_of(teacher, pairs(), 4)
    assert near(open_decoder_states(work)[0].read_flat([4]), layers[0])


@given(st.lists(st.integers(1, 60), max_size=80))
def test_parts_hold_each_row_once_within_their_tokens(lengths):
    parts = store.plan_parts(lengths)
    assert sorted(row for part in parts for row in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or sum(lengths[row] for row in part) <= store.PART_TOKENS for part in parts)


KILLED = """
import sys
from pathlib import Path
from raydistill.data import store
from raydistill.teacher_cache.builder import make_here
from raydistill.models.loading import load_model
from tests.teacher_cache.test_builder import pairs, pass_of
import torch
torch.set_num_threads(1)
store.PART_TOKENS = 30
slow = store.write_part
def write(array, number, vectors):
    slow(array, number, vectors)
    if array.name == "layer-02":
        print(number, flush=True)
        if number == 1:
            (array / ".part-000009.bin.1.making").write_bytes(b"half")
            import time; time.sleep(60)
store.write_part = write
make_here(pass_of(Path(sys.argv[1]), pairs()), load_model(sys.argv[2]))
"""


def test_a_killed_pass_keeps_its_finished_parts_and_goes_on(teacher, tmp_path):
    place = save_tiny("bart", tmp_path / "t", dropout=0.1)
    root = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(root), str(place)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    try:
        assert [process.stdout.readline().strip() for _ in range(2)] == [b"0", b"1"]
    finally:
        process.kill()
        process.wait()
    work = pass_of(root, pairs())
    assert work.is_incomplete()
    assert work.missing() == list(range(2, len(work.parts)))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")}
    assert len(before) == 6
    assert work.missing_bytes() == sum(work.arrays.values()) - sum(p.stat().st_size for p in before)
    with torch_threads(1):  # as many as the killed process had: sums over several threads differ in the last digit
        build_cache(work, teacher)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not list(root.rglob("*.making"))
    whole = pass_of(tmp_path / "whole", pairs())
    with torch_threads(1):
        build_cache(whole, teacher)
    rows = list(range(9))
    assert torch.equal(open_encoder_states(work).read_flat(rows), open_encoder_states(whole).read_flat(rows))
    assert torch.equal(open_decoder_states(work)[2].read_flat(rows), open_decoder_states(whole)[2].read_flat(rows))


def test_no_more_parts_are_mapped_at_once_than_the_bound(teacher, tmp_path, monkeypatch):
    """The bound keeps a process within the mappings that Linux allows it; what is read does not hang on it."""
    work = pass_of(tmp_path, pairs())
    build_cache(work, teacher)
    rows = [8, 0, 5, 3]
    encoded = open_encoder_states(work)

    def maps():
        return Path("/proc/self/maps").read_text().count(f"{work.encoder_store}/")

    expected = encoded.read_padded(rows)
    assert maps() == len({int(encoded.part_numbers[row]) for row in rows}) > 2
    builder.map_part.cache_clear()
    monkeypatch.setattr(builder, "map_part", lru_cache(2)(builder.map_part.__wrapped__))
    for _ in range(2):
        assert torch.equal(encoded.read_padded(rows), expected)
        assert maps() == 2


def test_a_part_that_goes_away_while_a_run_reads_it_is_told(teacher, tmp_path):
    work = pass_of(tmp_path, pairs())
    build_cache(work, teacher)
    encoded = open_encoder_states(work)
    shutil.rmtree(work.encoder_store)
    with pytest.raises(UserError, match="damaged or missing"):
        encoded.read_flat([0])


@pytest.mark.parametrize("fault", ["cut", "gone"])
def test_a_damaged_part_is_told_with_what_to_delete(fault, teacher, tmp_path):
    work = pass_of(tmp_path, pairs())
    build_cache(work, teacher)
    part = next((work.encoder_store / "states").glob("*.bin"))
    part.unlink() if fault == "gone" else part.write_bytes(part.read_bytes()[:-4])
    with pytest.raises(UserError, match=f"damaged or missing; delete {work.encoder_store}"):
        open_encoder_states(work)


def test_keys_tell_teachers_sources_labels_and_numbers_apart(tmp_path):
    base = pass_of(tmp_path, pairs())
    others = [
        replace(base, teacher_key="other"),
        replace(base, numbers=CacheDtypes("bf16", "fp32")),
        replace(base, numbers=CacheDtypes("fp32", "bf16")),
        pass_of(tmp_path, pairs(8)),
    ]
    names = {work.encoder_store.name for work in (base, *others)}
    assert len(names) == 5
    relabelled = Examples(pairs().sources, [[7, 2]] * 9, pairs().source_indices)
    assert pass_of(tmp_path, relabelled).encoder_store == base.encoder_store
    assert pass_of(tmp_path, relabelled).decoder_stores != base.decoder_stores
    assert pass_of(tmp_path, pairs(), [1]).decoder_stores == base.decoder_stores


def test_old_stores_are_listed_and_removed(teacher, tmp_path):
    work = replace(pass_of(tmp_path, pairs()), about={"teacher": "bart", "data": "news"})
    build_cache(work, teacher)
    time.sleep(0.01)
    open_encoder_states(work)
    found = list(store.list_stores(tmp_path))
    assert [kept.folder for kept in found] == [work.decoder_stores[0], work.encoder_store]  # the last used last
    assert [kept.arrays for kept in found] == [["layer-00", "layer-02"], ["states"]]
    assert sum(kept.bytes for kept in found) == sum(work.arrays.values())
    assert found[0].metadata["data"] == "news"
    store.remove(found[1])
    assert work.is_incomplete()
    assert [kept.folder for kept in store.list_stores(tmp_path)] == work.decoder_stores


def test_a_store_that_is_being_made_is_not_removed(teacher, tmp_path):
    work = pass_of(tmp_path, pairs())
    build_cache(work, teacher)
    for kept in store.list_stores(tmp_path):
        with work.lock(), pytest.raises(UserError, match=f"{kept.folder}: is being made"):
            store.remove(kept)
    assert not work.is_incomplete()


def test_a_store_that_was_removed_while_it_was_made_is_told(tmp_path):
    work = pass_of(tmp_path, pairs())
    work.prepare()
    with pytest.raises(UserError, match="was removed while it was made; run again"):
        work.finish()


# What is worth keeping


def sized(tmp_path, encoder=True, decoders=True):
    examples = Examples([[1] * 100] * 10, [[1] * 10] * 10, list(range(10)))
    return CacheBuilder(
        tmp_path, "key", examples, 1000, encoder, [(examples, [0, 2])] if decoders else []
    )  # 2 MB and 0.4 MB


PAYS = EpochTimes(encoder=10.0, decoder=4.0, read_encoder=1.0, read_decoder=1.0)


@pytest.mark.parametrize(
    ("costs", "room", "epochs", "encoder", "decoders", "keep", "why"),
    [
        (PAYS, 3e6, 5, True, True, "full", "it fits and pays"),
        (PAYS, 2.2e6, 5, True, True, "encoder", "the decoder states do not fit"),
        (PAYS, 1e6, 5, True, True, "off", "the encoder states do not fit"),
        (replace(PAYS, read_encoder=9.0), 3e6, 5, True, True, "off", "reading the encoder states does not pay"),
        (replace(PAYS, read_decoder=4.0), 3e6, 5, True, True, "encoder", "reading the decoder states does not pay"),
        (PAYS, 3e6, 1, True, True, "off", "reading the encoder states does not pay"),  # made for a single epoch
        (PAYS, 1e6, 5, False, True, "full", "it fits and pays"),
        (PAYS, 1e5, 5, False, True, "off", "the decoder states do not fit"),
        (PAYS, 3e6, 5, True, False, "encoder", "no run reads decoder states"),
    ],
)
def test_auto_keeps_what_fits_and_pays(costs, room, epochs, encoder, decoders, keep, why, tmp_path):
    found, said = choose_mode(sized(tmp_path, encoder, decoders), costs, room, epochs)
    assert found == keep
    assert said.startswith(why)
    if "epochs in all" in said:
        assert f"{epochs} epochs in all" in said


def test_costs_are_measured_and_grow_with_the_corpus(teacher, tmp_path):
    few, many = (measure_epoch_times(pass_of(tmp_path, pairs(n)), teacher) for n in (9, 9 * 40))
    assert all(value > 0 for value in (few.encoder, few.decoder, few.read_encoder, few.read_decoder))
    assert many.encoder > 5 * few.encoder
    assert many.read_encoder > 5 * few.read_encoder
    assert measure_read_rate(tmp_path, cold_cache=True) > 1e6
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".probe")]


def test_a_pass_holds_the_union_of_what_runs_read(tmp_path, teacher):
    def run(method, size, labels="original", **training):
        return Run.model_validate(
            {
                "name": "r",
                "teacher": "a/b",
                "dataset": "d",
                "method": method,
                "labels": labels,
                "student": {"size": size},
                "training": training,
            }
        )

    examples = {"original": pairs(), "pseudo": Examples(pairs().sources, [[7, 2]] * 9, pairs().source_indices)}
    runs = [
        (run("sft", "2-1"), "full"),
        (run("kd", "2-2"), "full"),  # supervised by layers 1 and 2
        (run("kd", "2-1"), "full"),  # by layer 2
        (run("kd", "2-3", "pseudo"), "encoder"),
        (run("kd", "2-3"), "off"),
    ]
    work = make_cache_builder(runs, examples, "key", teacher.config, tmp_path, "bf16")
    assert work.encoder
    assert [(e is examples["original"], layers) for e, layers in work.label_sets] == [(True, [1, 2])]
    assert not make_cache_builder(
        [(run("kd", "1-1"), "full")], examples, "key", teacher.config, tmp_path, "bf16"
    ).encoder
    assert not make_cache_builder(
        [(run("sft", "2-1", freeze_embeddings=False), "full")], examples, "key", teacher.config, tmp_path, "bf16"
    ).array_sizes


@pytest.mark.parametrize("mode", ["full", "encoder", "auto"])
def test_the_bound_on_the_disk_holds_for_every_mode(mode, teacher, tmp_path):
    def work(gigabytes):
        run = {
            "name": "r",
            "teacher": "a/b",
            "dataset": "d",
            "method": "kd",
            "student": {"size": "2-1"},
            "training": {"teacher_cache": mode, "cache_gb": gigabytes},
        }
        keep = "encoder" if mode == "encoder" else "full"
        return make_cache_builder(
            [(Run.model_validate(run), keep)], {"original": pairs()}, "k", teacher.config, tmp_path, "fp32"
        )

    need = sum(work(1).arrays.values()) / 1e9
    with pytest.raises(UserError, match=r"more than training\.cache_gb allows"):
        work(0.99 * need).prepare()
    assert not list(tmp_path.iterdir())
    work(need).prepare()


# Reading ahead and micro-batches


def test_ragged_rows_of_no_part_are_no_file(tmp_path):
    store.write_part(tmp_path, 3, np.zeros((2, 4), np.float32))
    assert store.missing_parts(tmp_path, 5) == [0, 1, 2, 4]
    store.finish_array(tmp_path, {})
    assert store.missing_parts(tmp_path, 5) == []


# The estimate, and the command


def test_xsum_at_full_size_is_about_170_gb_of_encoder_states():
    """BART-large's configuration is the class's own; 204,017 rows of 358 words (the paper's Table 3)."""
    from transformers import BartConfig

    rows, source, target = DATASETS["xsum"].paper_stats
    run = Run.model_validate(
        {"name": "r", "teacher": "bart", "dataset": "xsum", "method": "kd", "student": {"size": "12-3"}}
    )
    data = {"rows": rows, "source": source, "target": target}
    encoder, decoder = estimate_cache_bytes([run], BartConfig(), data)
    assert 160e9 < encoder < 180e9
    assert decoder == pytest.approx(3 * encoder * target / source, rel=1e-3)  # layers 3, 7 and 11
    off = run.model_copy(update={"training": run.training.model_copy(update={"teacher_cache": "off"})})
    assert estimate_cache_bytes([off], BartConfig(), data) == (0, 0)
    shrunk = run.model_copy(update={"student": run.student.model_copy(update={"size": "6-3"})})
    assert estimate_cache_bytes([shrunk], BartConfig(), data) == (0, decoder)


def test_the_command_lists_and_removes(teacher, tmp_path):
    home = tmp_path / "outputs"
    work = replace(pass_of(home / "cache", pairs()), about={"teacher": "bart", "data": "news"})
    build_cache(work, teacher)
    listed = last_json(command(home, "cache", "list", "--json"))["stores"]
    assert sorted(s["name"] for s in listed) == sorted(w.name for w in [work.encoder_store, *work.decoder_stores])
    assert sum(s["bytes"] for s in listed) == sum(work.arrays.values())
    refused = command(home, "cache", "remove")
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "--unused-days" in refused.stderr
    unknown = command(home, "cache", "remove", "encoder-x")
    assert unknown.returncode == 2
    assert work.encoder_store.name in unknown.stderr
    assert command(home, "cache", "remove", "--unused-days", "1").stdout.strip() == "nothing to remove"
    gone = last_json(command(home, "cache", "remove", work.encoder_store.name[:12], "--json"))["removed"]
    assert [s["name"] for s in gone] == [work.encoder_store.name]
    assert not work.encoder_store.exists()
    assert work.decoder_stores[0].exists()
