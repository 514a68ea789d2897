"""Building a cache: states equal the states of each row alone, and a killed build loses no finished part."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from raydistill.inference.decoding import torch_threads
from raydistill.teacher_cache.builder import build_cache
from raydistill.teacher_cache.layout import CacheDtypes
from raydistill.teacher_cache.reader import open_decoder_states, open_encoder_states
from raydistill.teacher_cache.storage_dtypes import from_storage
from tests.factories.models import save_tiny
from tests.factories.teacher_cache import cache_examples, cache_layout, compute_states, is_close


def test_states_equal_those_of_each_row_alone_without_padding(teacher, tmp_path):
    examples = cache_examples()
    layout = cache_layout(tmp_path, examples)
    build_cache(layout, teacher)
    assert len(layout.parts) > 2
    encoder_states, decoder_states = open_encoder_states(layout), open_decoder_states(layout)
    for i, row in enumerate(examples.source_indices):
        expected_encoder, expected_layers = compute_states(teacher, examples, i)
        assert is_close(encoder_states.read_flat([row]), expected_encoder)
        for layer in (0, 2):
            assert is_close(decoder_states[layer].read_flat([i]), expected_layers[layer])
    assert sum(part.nbytes for part in encoder_states.parts) == sum(map(len, examples.sources)) * 16 * 4
    assert sum(p.stat().st_size for p in tmp_path.rglob("*.bin")) == sum(layout.array_sizes.values())
    padded = encoder_states.read_padded([1, 5])
    assert torch.equal(padded[0, : len(examples.sources[1])], encoder_states.read_flat([1]))
    assert not padded[0, len(examples.sources[1]) :].any()
    assert not list(tmp_path.rglob("*.tmp"))


def test_bf16_states_are_the_rounded_fp32_states(teacher, tmp_path):
    fp32 = cache_layout(tmp_path, cache_examples())
    bf16 = cache_layout(tmp_path, cache_examples(), dtypes=CacheDtypes("bf16", "fp32"))
    for layout in (fp32, bf16):
        build_cache(layout, teacher)
    expected = open_encoder_states(fp32).read_flat([3, 0]).bfloat16()
    assert torch.equal(open_encoder_states(bf16).read_flat([3, 0]), expected)


@pytest.mark.parametrize("storage", ["int8", "bf16", "fp32"])
def test_a_part_that_is_built_again_has_the_same_bytes(storage, teacher, tmp_path):
    """Whether the decoder runs on encoder states of the store or on those that it has just computed."""
    layout = cache_layout(tmp_path, cache_examples(), dtypes=CacheDtypes(storage, "fp32"))
    with torch_threads(1):
        build_cache(layout, teacher)
        parts = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.bin"))}
        assert sum(map(len, parts.values())) == sum(layout.array_sizes.values())
        for path in parts:
            if path.parent.name != "states":
                path.unlink()
                (path.parent / "manifest.json").unlink(missing_ok=True)
        build_cache(layout, teacher)
    assert {path: path.read_bytes() for path in parts} == parts


def test_int8_states_are_the_fp32_states_within_half_a_scale(teacher, tmp_path):
    layouts = [cache_layout(tmp_path, cache_examples(), dtypes=CacheDtypes(s, "fp32")) for s in ("fp32", "int8")]
    for layout in layouts:
        build_cache(layout, teacher)
    exact, stored = (open_encoder_states(layout).read_flat([3, 0]) for layout in layouts)
    scales = exact.abs().amax(-1, keepdim=True) / 127
    assert stored.dtype == torch.int8
    assert stored.shape == (len(exact), 16 + 4)
    assert ((from_storage(stored, torch.float32) - exact).abs() <= 0.50001 * scales).all()


def test_missing_layers_are_added_without_changing_existing_parts(teacher, tmp_path):
    examples = cache_examples()
    build_cache(cache_layout(tmp_path, examples, [2]), teacher)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.bin")}
    encoder = teacher.get_encoder()
    real_forward = encoder.forward
    encoder.forward = None  # encoder states are read from the store
    try:
        layout = cache_layout(tmp_path, examples, [0, 2])
        build_cache(layout, teacher)
    finally:
        encoder.forward = real_forward
    assert {p: p.stat().st_mtime_ns for p in before} == before
    _, layers = compute_states(teacher, examples, 4)
    assert is_close(open_decoder_states(layout)[0].read_flat([4]), layers[0])


# Builds a cache, and waits in the second part, with a temporary file as a killed writer leaves one.
BUILD_UNTIL_SECOND_PART = """
import sys
import time
from pathlib import Path

import pytest
import torch

from raydistill.models.loading import load_model
from raydistill.teacher_cache import store
from raydistill.teacher_cache.builder import build_cache
from tests.factories.teacher_cache import cache_examples, cache_layout

torch.set_num_threads(1)
store.PART_TOKENS = 30
write_part = store.write_part


def write_and_wait(array, number, vectors):
    write_part(array, number, vectors)
    if array.name == "layer-02":
        print(number, flush=True)
        if number == 1:
            (array / ".part-000009.bin.1.tmp").write_bytes(b"half")
            time.sleep(60)


store.write_part = write_and_wait
build_cache(cache_layout(Path(sys.argv[1]), cache_examples()), load_model(sys.argv[2]))
"""


def test_killed_build_keeps_finished_parts_and_resumes_with_the_missing_ones(teacher, tmp_path):
    checkpoint = save_tiny("bart", tmp_path / "teacher", dropout=0.1)
    root = tmp_path / "cache"
    process = subprocess.Popen(
        [sys.executable, "-c", BUILD_UNTIL_SECOND_PART, str(root), str(checkpoint)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    try:
        assert [process.stdout.readline().strip() for _ in range(2)] == [b"0", b"1"]
    finally:
        process.kill()
        process.wait()
    layout = cache_layout(root, cache_examples())
    assert layout.is_incomplete()
    assert layout.missing_parts() == list(range(2, len(layout.parts)))
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*.bin")}
    assert len(before) == 6
    assert layout.missing_bytes() == sum(layout.array_sizes.values()) - sum(p.stat().st_size for p in before)
    # As many threads as the killed process had: sums over several threads differ in the last digit.
    with torch_threads(1):
        build_cache(layout, teacher)
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not list(root.rglob("*.tmp"))
    uninterrupted = cache_layout(tmp_path / "uninterrupted", cache_examples())
    with torch_threads(1):
        build_cache(uninterrupted, teacher)
    rows = list(range(9))
    expected = open_encoder_states(uninterrupted).read_flat(rows)
    assert torch.equal(open_encoder_states(layout).read_flat(rows), expected)
    expected = open_decoder_states(uninterrupted)[2].read_flat(rows)
    assert torch.equal(open_decoder_states(layout)[2].read_flat(rows), expected)
