"""The common interface to all families."""

import pytest
import torch
import transformers
from transformers import BartConfig, BartForConditionalGeneration, T5Config

from raydistill.config.run import Student
from raydistill.models import families, loading
from raydistill.models.shrinking import plan_layers, shrink
from tests.factories.models import FAMILIES, save_tiny


def test_max_positions():
    assert families.max_positions(BartConfig(max_position_embeddings=77)) == 77
    assert families.max_positions(T5Config()) is None


def bart_config(**changes) -> transformers.BartConfig:
    sizes = dict(
        vocab_size=100,
        d_model=8,
        encoder_layers=2,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        max_position_embeddings=30,
    )
    return transformers.BartConfig(**{**sizes, **changes})


def test_count_parameters_equals_a_count_by_hand():
    attention = 4 * (8 * 8 + 8)
    norm = 16
    ffn = 8 * 32 + 32 + 32 * 8 + 8
    encoder = attention + norm + ffn + norm
    decoder = 2 * (attention + norm) + ffn + norm
    positions = (30 + 2) * 8
    expected = 100 * 8 + 2 * encoder + decoder + 2 * (positions + norm)
    assert families.count_parameters(bart_config()) == expected
    assert families.weights_mb(bart_config()) == pytest.approx(4 * expected / 1e6)
    assert families.weights_mb(bart_config(), "bf16") == pytest.approx(2 * expected / 1e6)


def test_count_parameters_of_flan_t5_base():
    """The number that the hub reports for google/flan-t5-base, whose LM head has weights of its own."""
    config = T5Config(
        d_model=768, d_kv=64, d_ff=2048, num_layers=12, num_heads=12, feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )  # fmt: skip
    assert families.count_parameters(config) == 247_577_856


@pytest.mark.parametrize("family", ["flan-t5", "mt5"])
def test_lm_head_with_weights_of_its_own_is_kept(family, tmp_path):
    folder = save_tiny(family, tmp_path / "teacher")
    teacher = loading.load_model(folder)
    student = shrink(teacher, plan_layers((2, 3), Student(size="1-1")))
    student.save_pretrained(tmp_path / "student")
    for model in (teacher, student, loading.load_model(tmp_path / "student")):
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        assert torch.equal(head, teacher.get_output_embeddings().weight)
        assert not torch.equal(head, embedding)
    with torch.no_grad():  # a head that equals the embedding is trained on its own, too
        teacher.get_output_embeddings().weight.copy_(teacher.get_input_embeddings().weight)
    teacher.save_pretrained(tmp_path / "equal")
    loaded = loading.load_model(tmp_path / "equal")
    head, embedding = loaded.get_output_embeddings().weight, loaded.get_input_embeddings().weight
    assert head is not embedding
    assert torch.equal(head, embedding)


@pytest.mark.parametrize("family", FAMILIES)
def test_count_parameters_equals_the_loaded_model(family, tmp_path):
    folder = save_tiny(family, tmp_path)
    model = loading.load_model(folder)
    assert families.count_parameters(loading.load_config(folder)) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_decode_and_lm_head_equal_the_models_forward_pass(family, tmp_path):
    model = loading.load_model(str(save_tiny(family, tmp_path / "t", logits_bias=True)))
    ids = torch.randint(5, 40, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    targets = torch.randint(5, 40, (2, 6))
    with torch.no_grad():
        out = model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=targets, output_hidden_states=True, use_cache=False
        )
        states = families.decode(model, targets, families.encode(model, ids, mask).last_hidden_state, mask, layers=True)
        assert len(states.layers) == 3
        assert torch.equal(states.layers[-1], states.last_hidden_state)
        for layer in range(3):
            assert torch.allclose(states.layers[layer], out.decoder_hidden_states[layer + 1], atol=1e-6)
        assert torch.allclose(families.lm_head(model, states.last_hidden_state), out.logits, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "millions"), [("12-1", 222), ("12-3", 255), ("6-6", 230), ("9-6", 268), ("12-6", 306), ("12-12", 406)]
)
def test_parameter_counts_of_bart_large_students_equal_the_paper(size, millions):
    """The paper's Table 6, with the architecture of facebook/bart-large-xsum on the meta device."""
    config = BartConfig(
        vocab_size=50264, d_model=1024, encoder_layers=12, decoder_layers=12, encoder_attention_heads=16,
        decoder_attention_heads=16, encoder_ffn_dim=4096, decoder_ffn_dim=4096, max_position_embeddings=1024,
    )  # fmt: skip
    with torch.device("meta"):
        layers = plan_layers((12, 12), Student(size=size))
        model = BartForConditionalGeneration(families.with_num_layers(config, *layers.size))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions
