"""The benchmark of the cache's precisions: channels of large values, and its table."""

import torch
from transformers import BartConfig, BartForConditionalGeneration

from benchmarks.cache_precision import OUTLIERS, Divergence, as_markdown, enlarge_channels
from raydistill.teacher_cache.storage_dtypes import BLOCK


def test_channels_are_enlarged_without_changing_the_function():
    torch.manual_seed(0)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    model = BartForConditionalGeneration(BartConfig(vocab_size=30, dropout=0.0, **sizes, **heads))
    model.eval().requires_grad_(False)
    ids = torch.randint(5, 30, (2, 6))
    before = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    enlarge_channels(model, {3: 50.0})
    after = model(input_ids=ids, decoder_input_ids=ids, output_hidden_states=True)
    assert torch.allclose(after.logits, before.logits, atol=1e-5)
    for name in ("encoder_last_hidden_state", "decoder_hidden_states"):
        states = [out[name][-1] if name.startswith("decoder") else out[name] for out in (before, after)]
        ratio = states[1] / states[0]
        assert torch.allclose(ratio[..., 3], torch.tensor(50.0), rtol=1e-3)
        assert torch.allclose(ratio[..., :3], torch.tensor(1.0), rtol=1e-3)


def test_blocks_with_and_without_large_channels_are_measured():
    blocks = {channel // BLOCK for channel in OUTLIERS}
    assert 0 < len(blocks) < 1024 // BLOCK
    assert min(OUTLIERS.values()) >= 20
    assert max(OUTLIERS.values()) <= 100


def test_table_names_the_reference_of_each_divergence():
    results = [
        Divergence("bf16", "fp32", 200, 1e-6, 2e-6, 1.0),
        Divergence("int8", "bf16", 103, 8.4e-5, 3e-4, 0.9975),
    ]
    row = as_markdown(results).splitlines()[-1]
    assert [cell.strip() for cell in row.strip("|").split("|")] == [
        *("int8", "bf16", "0.515", "8.4e-05", "0.0003", "99.75 %"),
    ]
