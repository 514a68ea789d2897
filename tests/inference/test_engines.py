"""What holds for both engines, the choice between them, and their agreement."""

import gzip
import json
import math
from dataclasses import replace

import pytest
import torch

from raydistill.config.run import Decoding
from raydistill.core.errors import UserError
from raydistill.evaluation.ngram_counts import bleu_rows, corpus_bleu
from raydistill.inference.ctranslate2_engine import CTranslate2Engine
from raydistill.inference.decoding import BeamSearchParams, EngineOptions, Workload, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.inference.transformers_engine import TransformersEngine
from raydistill.models import loading
from tests.factories.engines import (
    GREEDY,
    REAL_TEACHER,
    SHARED,
    TEXTS,
    first_texts,
    max_int8_difference,
    open_ctranslate2,
)
from tests.factories.models import save_tiny


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_n_best_with_blank_texts_and_no_texts(tiny, engine_name):
    engine = open_engine(tiny["t5"], engine_name, EngineOptions(cache_dir=tiny["cache"], allow_fallback=False))
    beam = replace(GREEDY, beams=4)
    assert engine.generate([], beam, max_source_tokens=50) == []
    results = engine.generate(
        ["", TEXTS[0], " "],
        beam,
        max_source_tokens=50,
        n_best=3,
    )
    assert [[h.text for h in results[i]] for i in (0, 2)] == [[""], [""]]
    scores = [h.score for h in results[1]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    with pytest.raises(ValueError, match="n_best 5 is more than the 4 beams"):
        engine.generate(TEXTS, beam, max_source_tokens=50, n_best=5)


@pytest.mark.parametrize("output_tokens", [2, 12])
def test_a_benchmark_call_of_transformers_decodes_the_tokens_of_its_workload(tiny, output_tokens, monkeypatch):
    engine = open_engine(tiny["marian"], "transformers")
    assert isinstance(engine, TransformersEngine)
    shapes = []
    generate = engine.model.generate

    def record_shape(**arguments):
        out = generate(**arguments)
        shapes.append((arguments["input_ids"].shape, out.sequences.shape))
        return out

    monkeypatch.setattr(engine.model, "generate", record_shape)
    engine.make_benchmark_call(Workload(10, output_tokens, batch=4, beams=2))()
    assert shapes == [((4, 10), (4, 1 + output_tokens))]  # the outputs begin with the decoder's start token


@pytest.mark.parametrize("output_tokens", [2, 12])
def test_a_benchmark_call_of_ctranslate2_decodes_the_tokens_of_its_workload(tiny, output_tokens):
    engine = open_ctranslate2(tiny, "marian")
    assert isinstance(engine, CTranslate2Engine)
    lengths = []

    class Recorder:
        def translate_batch(self, sources, *arguments, **options):
            results = translator.translate_batch(sources, *arguments, **options)
            lengths.extend((len(row), len(result.hypotheses[0])) for row, result in zip(sources, results, strict=True))

    translator = engine.converted.translator
    engine.converted = replace(engine.converted, translator=Recorder())
    engine.make_benchmark_call(Workload(10, output_tokens, batch=4, beams=2))()
    assert lengths == [(10, output_tokens)] * 4


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_sources_and_outputs_are_truncated_to_the_positions(tmp_path, engine_name):
    folder = save_tiny("bart", tmp_path / "m", max_positions=20)
    engine = open_engine(folder, engine_name, EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    results = engine.generate([" ".join(TEXTS)], replace(GREEDY, max_length=90), max_source_tokens=1024)
    assert results[0][0].text


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
@pytest.mark.parametrize("beams", [1, 3])
def test_min_and_max_length_count_start_and_end_token(tmp_path, engine_name, beams):
    """A BART that ends as early as possible: </s> and the forced <s> come first, so 4 of 6 tokens remain."""
    folder = save_tiny("bart", tmp_path / "m", logits_bias=True)
    model = loading.load_model(folder)
    bias = model.final_logits_bias
    assert isinstance(bias, torch.Tensor)
    bias[0, model.config.eos_token_id] = 50
    bias[0, 4:100] = 10  # bytes, one character each
    model.save_pretrained(folder)
    engine = open_engine(folder, engine_name, EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    beam = BeamSearchParams(beams, 1.0, 6, 30, 0, True, engine.generation_config.forced_bos_token_id)
    for [best] in engine.generate(TEXTS[:3], beam, max_source_tokens=50):
        assert len(best.text) == 4
    bias[0, model.config.eos_token_id] = -50  # a BART that never ends: the forced end token also counts towards the 8
    model.save_pretrained(folder)
    engine = open_engine(folder, engine_name, EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    for [best] in engine.generate(TEXTS[:3], replace(beam, max_length=8), max_source_tokens=50):
        assert len(best.text) == 5


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_decoder_with_more_layers_than_the_encoder(tmp_path, engine_name):
    folder = save_tiny("t5", tmp_path / "m", encoder_layers=1, decoder_layers=4)
    engine = open_engine(folder, engine_name, EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    assert len(engine.generate(TEXTS, replace(GREEDY, beams=2), max_source_tokens=50)) == len(TEXTS)


@pytest.mark.parametrize(
    ("family", "kw", "reason"),
    [
        ("marian", {"marian_padding_row": 0.5}, "padding row is not zero"),
        ("marian", {"padded_rows": 3}, "the padding token is not the last one"),
    ],
)
def test_unsupported_model_is_an_error_or_falls_back_with_a_message(tmp_path, family, kw, reason):
    folder, cache = save_tiny(family, tmp_path / "m", **kw), tmp_path / "cache"
    for _ in range(2):  # the second time from the cache
        with pytest.raises(UserError, match=reason):
            open_engine(folder, "ctranslate2", EngineOptions(cache_dir=cache, allow_fallback=False))
    log: list[str] = []
    engine = open_engine(folder, "auto", EngineOptions(cache_dir=cache, precision="int8"), log=log.append)
    assert (engine.name, engine.precision) == ("transformers", "fp32")
    assert "using transformers, since" in log[-1]


def test_unknown_or_unsupported_precision_is_an_error(tiny):
    with pytest.raises(UserError, match="precision 'int4' is none of"):
        open_engine(tiny["bart"], options=EngineOptions(precision="int4"))
    with pytest.raises(UserError, match="transformers has no int8"):
        open_engine(tiny["bart"], "transformers", EngineOptions(precision="int8"))


def test_pegasus_in_fp16_is_an_error(tiny):
    with pytest.raises(UserError, match="Pegasus overflows in fp16"):
        open_engine(tiny["pegasus"], options=EngineOptions(precision="fp16"))


@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
def test_engines_agree_on_a_trained_model(tmp_path):
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / "validation.jsonl.gz").read_bytes())
    texts = [json.loads(line)["document"] for line in rows.decode().splitlines()[:60]]
    ours = open_engine(REAL_TEACHER, "ctranslate2", EngineOptions(cache_dir=tmp_path, allow_fallback=False))
    reference = open_engine(REAL_TEACHER, "transformers")
    beam = resolve_decoding(Decoding(), ours.generation_config, None, 60)
    assert (beam.beams, beam.max_length) == (4, 64)
    for params in (beam, replace(beam, early_stopping=True), replace(beam, length_penalty=0.6)):
        results = ours.generate(texts, params, max_source_tokens=128)
        expected = reference.generate(texts, params, max_source_tokens=128)
        same = [a == b for a, b in zip(first_texts(results), first_texts(expected), strict=True)]
        assert sum(same) >= 0.95 * len(texts)
        scores = [(a[0].score, b[0].score) for a, b in zip(results, expected, strict=True)]
        close = [math.isclose(a, b, abs_tol=2e-3) for a, b in scores]
        assert sum(close) >= 0.95 * len(texts)


def test_ctranslate2_scores_are_higher_where_min_length_or_no_repeat_ngram_is_active(tiny):
    """CTranslate2 redistributes the probability of forbidden tokens, `generate()` does not.

    Greedy search finds the same texts; in beam search the order of hypotheses may differ.
    """
    ours, reference = open_ctranslate2(tiny, "t5"), open_engine(tiny["t5"], "transformers")

    def both(**changes):
        beam = replace(GREEDY, **changes)
        pairs = [engine.generate(TEXTS, beam, max_source_tokens=50) for engine in (ours, reference)]
        return [(a[0], b[0]) for a, b in zip(*pairs, strict=True)]

    for a, b in both():
        assert a.text == b.text
        assert a.score == pytest.approx(b.score, abs=1e-4)
    for limit in ({"no_repeat_ngram": 2}, {"min_length": 12}):
        for a, b in both(**limit):
            assert a.text == b.text
            assert a.score > b.score + 1e-4
    searched = both(beams=4, no_repeat_ngram=2)
    same = [(a, b) for a, b in searched if a.text == b.text]
    assert 0 < len(same) < len(searched)
    assert all(a.score > b.score + 1e-4 for a, b in same)


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
@pytest.mark.parametrize(
    ("beams", "precision", "identical", "score"),
    [
        (1, "fp32", 0.97, 0.1),
        (4, "fp32", 0.97, 0.1),
        (1, "int8", 0.0, max_int8_difference()),
        (4, "int8", 0.0, max_int8_difference()),
    ],
)
def test_parity_of_engines_on_a_thousand_rows(tmp_path, beams, precision, identical, score):
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / "test.jsonl.gz").read_bytes()).decode().splitlines()
    texts, references = zip(*((row["document"], row["summary"]) for row in map(json.loads, rows)), strict=True)
    ours = open_engine(
        REAL_TEACHER, "ctranslate2", EngineOptions(cache_dir=tmp_path, allow_fallback=False, precision=precision)
    )
    reference = open_engine(REAL_TEACHER, "transformers")
    beam = resolve_decoding(Decoding(beams=beams), ours.generation_config, None, 60)
    outputs = [first_texts(engine.generate(list(texts), beam, max_source_tokens=128)) for engine in (ours, reference)]
    assert sum(a == b for a, b in zip(*outputs, strict=True)) >= identical * len(texts)
    scores = [corpus_bleu(bleu_rows(texts_of_engine, list(references))) for texts_of_engine in outputs]
    assert abs(scores[0] - scores[1]) <= score


@pytest.mark.parametrize("name", ["transformers", "ctranslate2"])
def test_texts_have_line_breaks_instead_of_the_token_of_pegasus(tmp_path, name):
    folder = save_tiny("pegasus", tmp_path / "pegasus", line_breaks=True)
    engine = open_engine(folder, name, EngineOptions(cache_dir=tmp_path / "cache"))
    beam = replace(GREEDY, min_length=15, no_repeat_ngram=2)  # other tokens between the line breaks
    texts = first_texts(engine.generate(TEXTS, beam, max_source_tokens=50))
    assert all("\n" in text for text in texts)
    assert not any("<n>" in text for text in texts)
