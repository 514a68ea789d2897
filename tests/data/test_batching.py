"""Batches of an epoch, their shards over workers, and buckets by length."""

import math

from hypothesis import given
from hypothesis import strategies as st

from raydistill.data.batching import Examples, bucket_by_length, epoch_batches, shard_batch, split_by_tokens


@given(
    st.lists(st.integers(1, 50), max_size=300),
    st.integers(1, 9),
    st.integers(0, 5),
    st.integers(0, 5),
)
def test_epoch_covers_every_example_once_and_depends_on_seed_and_epoch(lengths, batch_size, seed, epoch):
    batches = epoch_batches(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert len(batches) == math.ceil(len(lengths) / batch_size)
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert batches == epoch_batches(lengths, batch_size, seed, epoch)


def test_order_changes_with_seed_and_epoch_and_batches_hold_similar_lengths():
    lengths = [i % 40 + 1 for i in range(400)]
    orders = {str(epoch_batches(lengths, 8, seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}
    assert len(orders) == 4
    assert max(max(lengths[i] for i in b) - min(lengths[i] for i in b) for b in epoch_batches(lengths, 8, 0, 0)) <= 2


@given(st.lists(st.integers(), unique=True, max_size=60), st.integers(1, 5), st.integers(1, 5))
def test_shards_partition_a_batch_over_workers_and_micro_batches(batch, world_size, accumulation):
    shards = [shard_batch(batch, rank, world_size, accumulation) for rank in range(world_size)]
    assert sorted(i for shard in shards for micro_batch in shard for i in micro_batch) == sorted(batch)
    assert all(len(shard) <= accumulation and all(shard) for shard in shards)
    sizes = [sum(map(len, shard)) for shard in shards]
    assert max(sizes) - min(sizes) <= 1


@given(st.lists(st.integers(1, 50), max_size=100), st.integers(1, 200))
def test_buckets_hold_each_row_once_within_their_padded_tokens(lengths, tokens):
    buckets = list(bucket_by_length(lengths, tokens))
    assert sorted(i for batch in buckets for i in batch) == list(range(len(lengths)))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= tokens for b in buckets)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), max_size=40), st.integers(1, 200))
def test_micro_batches_keep_the_order_within_their_token_limit(lengths, tokens):
    examples = Examples([[1] * s for s, _ in lengths], [[1] * t for _, t in lengths], list(range(len(lengths))))
    micro_batches = split_by_tokens(range(len(lengths)), examples, tokens)
    assert [i for micro_batch in micro_batches for i in micro_batch] == list(range(len(lengths)))
    for micro_batch in micro_batches:
        cost = len(micro_batch) * (max(lengths[i][0] for i in micro_batch) + max(lengths[i][1] for i in micro_batch))
        assert len(micro_batch) == 1 or cost <= tokens
