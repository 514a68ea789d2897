"""Fingerprints of weights and of teachers."""

import hashlib
from typing import Any

import pytest
import torch

from raydistill.models import fingerprints, loading
from raydistill.models.hub import weight_files
from tests.factories.models import (
    FAMILIES,
    edit_config,
    save_tiny,
)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_and_its_folder_have_equal_fingerprints(tiny, family):
    model = loading.load_model(tiny[family])
    assert not model.training
    assert model.dtype == torch.float32
    assert fingerprints.weights_fingerprint(model) == fingerprints.weights_fingerprint(tiny[family])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert fingerprints.weights_fingerprint(model) != fingerprints.weights_fingerprint(tiny[family])


def test_fingerprint_is_sha256_of_names_types_shapes_and_bytes(tmp_path):
    from safetensors.torch import save_file

    b, a = torch.tensor([[1.0, 2.0]]), torch.tensor([3], dtype=torch.int64)
    save_file({"b": b, "a": a}, tmp_path / "model.safetensors")
    by_hand = b"a torch.int64 (1,)\n" + (3).to_bytes(8, "little")
    by_hand += b"b torch.float32 (1, 2)\n" + bytes.fromhex("0000803f00000040")
    assert fingerprints.weights_fingerprint(tmp_path) == hashlib.sha256(by_hand).hexdigest()[:16]


def test_fingerprint_depends_on_the_dtype(tiny):
    model = loading.load_model(tiny["bart"], torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert fingerprints.weights_fingerprint(model) != fingerprints.weights_fingerprint(tiny["bart"])


def test_teacher_key_covers_everything_that_changes_a_forward_pass(tmp_path):
    folder = save_tiny("bart", tmp_path / "t")
    key = fingerprints.teacher_key(folder)
    irrelevant: dict[str, Any] = {
        "transformers_version": "4.1",
        "num_beams": 7,
        "max_length": 9,
        "dtype": "bfloat16",
        "use_cache": False,
    }
    edit_config(folder, **irrelevant)
    assert fingerprints.teacher_key(folder) == key
    changes: dict[str, Any] = {"scale_embedding": True, "activation_function": "relu", "decoder_start_token_id": 0}
    keys = {key}
    for name, value in changes.items():
        edit_config(folder, **{name: value})
        keys.add(fingerprints.teacher_key(folder))
    assert len(keys) == 4
    t5 = save_tiny("t5", tmp_path / "t5")
    before = fingerprints.teacher_key(t5)
    edit_config(t5, layer_norm_epsilon=1e-3)
    assert fingerprints.teacher_key(t5) != before
    other = save_tiny("bart", tmp_path / "o", seed=1)
    assert fingerprints.teacher_key(other) != key


def test_fingerprint_reads_all_shards(tiny, tmp_path):
    model = loading.load_model(tiny["bart"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(weight_files(tmp_path)) > 1
    assert fingerprints.weights_fingerprint(tmp_path) == fingerprints.weights_fingerprint(model)
