"""The transformers engine: equality with plain `generate()`, scores, memory limits, model state."""

from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache

from raydistill.inference import transformers_engine
from raydistill.inference.decoding import EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.inference.transformers_engine import TransformersEngine
from raydistill.models import loading, tokenization
from tests.factories.engines import GREEDY, TEXTS, first_texts
from tests.factories.models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_do_not_depend_on_batch_size_and_keep_the_order(tiny, family):
    engine = open_engine(tiny[family], "transformers")
    together = engine.generate(TEXTS, GREEDY, max_source_tokens=50, batch_size=9)
    alone = [engine.generate([t], GREEDY, max_source_tokens=50)[0] for t in TEXTS]
    in_threes = engine.generate(TEXTS, GREEDY, max_source_tokens=50, batch_size=3)
    assert first_texts(together) == first_texts(alone) == first_texts(in_threes)
    assert len(set(first_texts(together))) > 1
    for a, b in zip(together, alone, strict=True):
        assert a[0].score == pytest.approx(b[0].score, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_engine_equals_plain_generate(tiny, family):
    """Plain `generate()` reorders the source's keys and values at every token."""
    engine = open_engine(tiny[family], "transformers")
    assert isinstance(engine, TransformersEngine)
    beam = replace(GREEDY, beams=4, max_length=12)
    results = engine.generate(TEXTS, beam, max_source_tokens=50, n_best=3)
    settings = engine._generation_config(beam)
    settings.num_return_sequences = 3
    rows = tokenization.tokenize_sources(engine.tokenizer, TEXTS, 50)
    batch = engine.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # the default cache has too few layers for this T5
    plain = engine.model.generate(**batch, generation_config=settings, past_key_values=cache)
    texts = engine.tokenizer.batch_decode(plain.sequences, skip_special_tokens=True)
    assert [h.text for hypotheses in results for h in hypotheses] == [text.strip() for text in texts]
    scores = [h.score for hypotheses in results for h in hypotheses]
    assert scores == pytest.approx(plain.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementation_is_restored_and_does_not_change_the_texts(tiny, attention):
    model = loading.load_model(tiny["bart"])
    model.set_attn_implementation(attention)
    engine = TransformersEngine(model, tokenization.load_tokenizer(tiny["bart"]))
    beam = replace(GREEDY, beams=4, max_length=12)
    reference = open_engine(tiny["bart"], "transformers").generate(TEXTS, beam, max_source_tokens=50)
    assert first_texts(engine.generate(TEXTS, beam, max_source_tokens=50)) == first_texts(reference)
    assert model.config._attn_implementation == attention


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_score_is_log_probability_divided_by_length_to_the_penalty(tiny, beams, penalty):
    """The expected score comes from a teacher-forced pass over the output; T5 forces no token at the end."""
    engine = open_engine(tiny["t5"], "transformers")
    assert isinstance(engine, TransformersEngine)
    beam = replace(GREEDY, beams=beams, length_penalty=penalty, max_length=8)
    out = engine._call_generate(
        tokenization.tokenize_sources(engine.tokenizer, TEXTS[:1], 50), engine._generation_config(beam)
    )
    sequence = out.sequences
    sources = torch.tensor(tokenization.tokenize_sources(engine.tokenizer, TEXTS[:1], 50))
    with torch.no_grad():
        logits = engine.model(input_ids=sources, decoder_input_ids=sequence[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(-1, sequence[:, 1:, None]).sum().item()
    [[best]] = engine.generate(TEXTS[:1], beam, max_source_tokens=50)
    assert best.score == pytest.approx(chosen / (sequence.shape[1] - 1) ** penalty, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_memory_limit_of_scores_splits_batches_without_changing_outputs(tiny, monkeypatch, beams):
    engine = open_engine(tiny["bart"], "transformers")
    assert isinstance(engine, TransformersEngine)
    calls = []
    run = engine._call_generate
    monkeypatch.setattr(engine, "_call_generate", lambda rows, settings: calls.append(len(rows)) or run(rows, settings))
    beam = replace(GREEDY, beams=beams)
    bytes_per_row = 4 * (3 if beams == 3 else 2) * beam.max_length * engine.model.config.vocab_size
    results = []
    for max_bytes in (2**30, 2 * bytes_per_row, bytes_per_row - 1):
        monkeypatch.setattr(transformers_engine, "MAX_SCORE_BYTES", {"cpu": max_bytes})
        results.append(engine.generate(TEXTS, beam, max_source_tokens=50, n_best=beams))
    assert calls == [9, 2, 2, 2, 2, 1, *[1] * 9]
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert [h.text for h in a] == [h.text for h in b]
            assert [h.score for h in a] == pytest.approx([h.score for h in b], abs=1e-4)


def test_generate_disables_dropout_and_restores_train_mode(tiny):
    model = loading.load_model(tiny["bart"])
    engine = TransformersEngine(model, tokenization.load_tokenizer(tiny["bart"]))
    expected = engine.generate(TEXTS, GREEDY, max_source_tokens=50)
    model.train()
    assert engine.generate(TEXTS, GREEDY, max_source_tokens=50) == expected
    assert model.training


def test_engine_generates_in_bf16(tiny):
    engine = open_engine(tiny["bart"], "transformers", EngineOptions(precision="bf16"))
    assert engine.precision == "bf16"
    assert len(engine.generate(TEXTS, GREEDY, max_source_tokens=50)) == len(TEXTS)
