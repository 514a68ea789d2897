"""Storage dtypes of states: bytes, rounding errors, and the teacher's distribution from int8 states."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as stn

from raydistill.teacher_cache.storage_dtypes import from_numpy, from_storage, to_numpy, to_storage, vector_bytes

ARRAYS = stn.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([1, 16, 127, 128, 129, 300])),
    elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False),
)


def round_trip(states, dtype="int8"):
    """The states as they are read from a file of the dtype, in float32."""
    return from_storage(from_numpy(to_numpy(to_storage(states, dtype))), torch.float32)


def float64_scales(states):
    """max|x| / 127 of every block of 128 numbers, for each number of the block, in float64 numpy."""
    values = states.double().numpy()
    scales = np.empty_like(values)
    for start in range(0, values.shape[-1], 128):
        block = values[..., start : start + 128]
        scales[..., start : start + 128] = np.abs(block).max(-1, keepdims=True) / 127
    return scales


def normal_states(tokens, width, seed=0):
    """States of independent normal numbers."""
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("width", [128, 512, 768, 1024, 2048])
def test_int8_takes_at_most_0_52_of_the_bytes_of_bf16(width):
    assert vector_bytes("fp32", width) == 4 * width
    assert vector_bytes("bf16", width) == 2 * width
    assert vector_bytes("int8", width) == width + 4 * width // 128
    assert vector_bytes("int8", width) <= 0.52 * vector_bytes("bf16", width)
    stored = to_numpy(to_storage(torch.randn(3, width), "int8"))
    assert stored.nbytes == 3 * vector_bytes("int8", width)


@given(ARRAYS)
def test_int8_error_is_at_most_half_a_scale(values):
    states = torch.from_numpy(values)
    error = np.abs(round_trip(states).double().numpy() - states.double().numpy())
    # The product q s and the stored scale are rounded to float32.
    assert (error <= 0.5 * float64_scales(states) + 1e-6 * np.abs(values) + 1e-30).all()


@pytest.mark.parametrize("width", [16, 128, 200, 1024])
def test_int8_error_of_normal_states_is_that_of_rounding_to_the_nearest_integer(width):
    """The error of rounding is uniform in [-s/2, s/2]: its mean square is s**2 / 12, and its mean is 0."""
    states = normal_states(2000, width)
    error, scales = (round_trip(states) - states).double().numpy(), float64_scales(states)
    assert np.mean((error / scales) ** 2) == pytest.approx(1 / 12, rel=0.1)
    assert abs(np.mean(error / scales)) < 0.01


def test_a_large_channel_makes_only_its_own_block_coarse():
    states = normal_states(50, 512)
    large = states.clone()
    large[:, 130] *= 1000
    others = torch.ones(512, dtype=torch.bool)
    others[128:256] = False
    assert torch.equal(round_trip(large)[:, others], round_trip(states)[:, others])
    assert not torch.equal(round_trip(large)[:, 128:256], round_trip(states)[:, 128:256])


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp32"])
def test_zeros_padding_and_undefined_values_stay_what_they_are(dtype):
    assert not round_trip(torch.zeros(2, 300), dtype).any()
    stored = to_storage(torch.ones(2, 300), dtype)
    assert not from_storage(torch.zeros_like(stored), torch.float32).any()
    states = torch.ones(3, 300)
    states[0, 5], states[1, 280] = torch.nan, torch.inf
    read = round_trip(states, dtype)
    assert not read[0, 5].isfinite()
    assert not read[1, 280].isfinite()
    assert torch.equal(read[2], states[2])


@pytest.mark.parametrize("dtype", ["int8", "bf16", "fp32"])
def test_states_are_read_in_the_dtype_that_is_asked_for(dtype):
    states = normal_states(4, 256).reshape(2, 2, 256)
    exact = round_trip(states, dtype)
    read = from_storage(to_storage(states, dtype), torch.bfloat16)
    assert read.dtype == torch.bfloat16
    assert read.shape == states.shape
    assert torch.equal(read, exact.bfloat16())


def mean_divergence(states, read, weight):
    """Mean KL divergence in nats a token between the distributions of exact and of read states."""
    log_p, log_q = (torch.log_softmax(s.double() @ weight.double().T, -1) for s in (states, read))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def output_weight(states):
    """The weight of an output layer over 4,000 words whose logits have a standard deviation of 3."""
    weight = normal_states(4000, states.shape[-1], seed=1)
    return weight * (3 / (states @ weight.T).std())


@pytest.mark.parametrize("width", [128, 1024])
def test_distributions_of_int8_states_differ_by_at_most_2e_4_nats_a_token(width):
    """About half the variance of a logit's error: 9 / 2 times s**2 / 12 for states of variance 1."""
    states = normal_states(256, width)
    divergence = mean_divergence(states, round_trip(states), output_weight(states))
    expected = 9 / 2 * float((float64_scales(states) ** 2).mean()) / 12
    assert divergence == pytest.approx(expected, rel=0.25)
    assert divergence < 2e-4


def test_blocks_keep_the_distribution_where_one_channel_is_large():
    """At a scale a token all 8 blocks of the vector would be as coarse as the block of the large channel."""
    states = normal_states(128, 1024)
    states[:, 7] *= 20
    one_scale = states.abs().amax(-1, keepdim=True) / 127
    weight = output_weight(states)
    divergence = mean_divergence(states, round_trip(states), weight)
    assert divergence < 0.25 * mean_divergence(states, (states / one_scale).round() * one_scale, weight)
