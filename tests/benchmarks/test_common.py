"""What the benchmarks share: the key of an architecture."""

from typing import Any

import pytest
from transformers import BartConfig, T5Config

from benchmarks.common import architecture_key


def test_architecture_key_ignores_dropout_and_depends_on_sizes() -> None:
    assert architecture_key(BartConfig()) == architecture_key(BartConfig(dropout=0.3))
    changes: list[dict[str, Any]] = [
        {"decoder_layers": 2},
        {"d_model": 16},
        {"decoder_ffn_dim": 64},
        {"vocab_size": 99},
    ]
    for change in changes:
        assert architecture_key(BartConfig()) != architecture_key(BartConfig(**change))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            BartConfig(),
            "bart 12-12 d_model=1024 encoder_ffn_dim=4096 decoder_ffn_dim=4096 encoder_attention_heads=16 "
            "decoder_attention_heads=16 activation_function=gelu vocab_size=50265",
        ),
        (T5Config(), "t5 6-6 d_model=512 d_kv=64 d_ff=2048 num_heads=8 feed_forward_proj=relu vocab_size=32128"),
    ],
    ids=["bart", "t5"],
)
def test_architecture_key_has_the_settings_of_the_family(config: BartConfig | T5Config, expected: str) -> None:
    assert architecture_key(config) == expected
