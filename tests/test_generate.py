import gzip
import json
import math
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig

from raydistill.config.run import Decoding
from raydistill.core.errors import UserError
from raydistill.evaluation.metrics import bleu, bleu_rows
from raydistill.inference import ctranslate2_conversion, ctranslate2_engine, transformers_engine
from raydistill.inference.ctranslate2_engine import CTranslate2Engine
from raydistill.inference.decoding import Beam, Sample, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.inference.transformers_engine import TransformersEngine
from raydistill.models import loading
from tests.tiny import FAMILIES, save_tiny, sentences

SHARED = Path(os.environ.get("RAYDISTILL_SHARED", Path(__file__).parents[2] / "shared"))
REAL = SHARED / "teachers" / "multi30k-marian-6-6"
GREEDY = Beam(1, 1.0, 0, 20, 0, True, None)
TEXTS = sentences(9, seed=4)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tiny")
    made = {family: save_tiny(family, place / family, logits_bias=family != "t5") for family in FAMILIES}
    return {**made, "t5 1.1": save_tiny("t5", place / "t5-1.1", t5_gated=True), "cache": place / "cache"}


def ctranslate2(tiny, family, **kw):
    return open_engine(tiny[family], "ctranslate2", cache=tiny["cache"], allow_fallback=False, **kw)


def disagreement(folder, model, tokenizer) -> float:
    return ctranslate2_conversion._of_random_targets(folder, model, tokenizer, 1)


def texts_of(found) -> list[str]:
    return [hypotheses[0].text for hypotheses in found]


# Decoding


def test_decoding_asked_then_checkpoint_then_preset_then_defaults():
    own = GenerationConfig(num_beams=6, length_penalty=2.0, early_stopping=True, forced_bos_token_id=3)
    preset = Decoding(beams=8, min_length=11, length_penalty=0.6)
    beam = resolve_decoding(Decoding(beams=2), own, preset, 60)
    assert beam == Beam(2, 2.0, 11, 61, 0, True, 3)
    assert resolve_decoding(Decoding(), own, preset, 60).beams == 6
    assert resolve_decoding(Decoding(), GenerationConfig(), preset, 60).beams == 8
    assert resolve_decoding(Decoding(), None, None, 60) == Beam(4, 1.0, 0, 61, 0, False, None)


def test_decoding_counts_new_tokens_with_the_start_token():
    assert resolve_decoding(Decoding(), GenerationConfig(max_new_tokens=9), None, 60).max_length == 10


def test_decoding_refuses_a_least_length_above_the_greatest():
    with pytest.raises(UserError, match="min_length 30 is above max_length 20"):
        resolve_decoding(Decoding(min_length=30, max_length=20), None, None, 60)
    own = GenerationConfig(min_length=56)  # not the user's doing: bart-large-cnn with a short max_length
    assert resolve_decoding(Decoding(max_length=20), own, None, 60).min_length == 20


# transformers


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing_and_the_order_is_kept(tiny, family):
    engine = open_engine(tiny[family], "transformers")
    together = engine.generate(TEXTS, GREEDY, max_source_tokens=50, batch_size=9)
    alone = [engine.generate([t], GREEDY, max_source_tokens=50)[0] for t in TEXTS]
    in_threes = engine.generate(TEXTS, GREEDY, max_source_tokens=50, batch_size=3)
    assert texts_of(together) == texts_of(alone) == texts_of(in_threes)
    assert len(set(texts_of(together))) > 1
    for a, b in zip(together, alone, strict=True):
        assert a[0].score == pytest.approx(b[0].score, abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_reference_engine_is_plain_generate(tiny, family):
    """Which holds the source's keys and values for each beam, and reorders them."""
    engine = open_engine(tiny[family], "transformers")
    assert isinstance(engine, TransformersEngine)
    beam = replace(GREEDY, beams=4, max_length=12)
    found = engine.generate(TEXTS, beam, max_source_tokens=50, n_best=3)
    settings = engine._settings(beam)
    settings.num_return_sequences = 3
    rows = loading.tokenize_sources(engine.tokenizer, TEXTS, 50)
    batch = engine.tokenizer.pad({"input_ids": rows}, return_tensors="pt")
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())  # its own is too short for this t5
    plain = engine.model.generate(**batch, generation_config=settings, past_key_values=cache)
    texts = engine.tokenizer.batch_decode(plain.sequences, skip_special_tokens=True)
    assert [one.text for hypotheses in found for one in hypotheses] == [text.strip() for text in texts]
    scores = [one.score for hypotheses in found for one in hypotheses]
    assert scores == pytest.approx(plain.sequences_scores.tolist(), abs=1e-4)


@pytest.mark.parametrize(("attention", "held"), [("sdpa", 2), ("eager", 8)])
def test_the_source_is_held_once_per_row_where_torch_attends(tiny, attention, held):
    model = loading.load_model(tiny["bart"])
    model.set_attn_implementation(attention)
    engine = TransformersEngine(model, loading.load_tokenizer(tiny["bart"]))
    beam = replace(GREEDY, beams=4, max_length=12)
    out = engine._run(loading.tokenize_sources(engine.tokenizer, TEXTS[:2], 50), engine._settings(beam))
    source = out.past_key_values.cross_attention_cache.layers[0].keys
    assert len(source) == held
    assert model.config._attn_implementation == attention
    reference = open_engine(tiny["bart"], "transformers").generate(TEXTS, beam, max_source_tokens=50)
    assert texts_of(engine.generate(TEXTS, beam, max_source_tokens=50)) == texts_of(reference)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("penalty", [0.5, 1.0])
def test_score_is_the_log_probability_over_length_to_the_penalty(tiny, beams, penalty):
    """Worked out by feeding the text back; t5 forces no token at the end."""
    engine = open_engine(tiny["t5"], "transformers")
    assert isinstance(engine, TransformersEngine)
    beam = replace(GREEDY, beams=beams, length_penalty=penalty, max_length=8)
    out = engine._run(loading.tokenize_sources(engine.tokenizer, TEXTS[:1], 50), engine._settings(beam))
    sequence = out.sequences
    sources = torch.tensor(loading.tokenize_sources(engine.tokenizer, TEXTS[:1], 50))
    with torch.no_grad():
        logits = engine.model(input_ids=sources, decoder_input_ids=sequence[:, :-1]).logits
    chosen = logits.log_softmax(-1).gather(-1, sequence[:, 1:, None]).sum().item()
    [[best]] = engine.generate(TEXTS[:1], beam, max_source_tokens=50)
    assert best.score == pytest.approx(chosen / (sequence.shape[1] - 1) ** penalty, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
def test_few_rows_at_once_where_scores_would_fill_the_memory_change_nothing(tiny, monkeypatch, beams):
    engine = open_engine(tiny["bart"], "transformers")
    assert isinstance(engine, TransformersEngine)
    calls = []
    run = engine._run
    monkeypatch.setattr(engine, "_run", lambda rows, settings: calls.append(len(rows)) or run(rows, settings))
    beam = replace(GREEDY, beams=beams)
    row = 4 * (3 if beams == 3 else 2) * beam.max_length * engine.model.config.vocab_size  # bytes
    found = []
    for kept in (2**30, 2 * row, row - 1):
        monkeypatch.setattr(transformers_engine, "KEPT_BYTES", {"cpu": kept})
        found.append(engine.generate(TEXTS, beam, max_source_tokens=50, n_best=beams))
    assert calls == [9, 2, 2, 2, 2, 1, *[1] * 9]
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert [h.text for h in one] == [h.text for h in two]
            assert [h.score for h in one] == pytest.approx([h.score for h in two], abs=1e-4)


def test_a_model_in_training_is_left_in_training_and_generates_without_dropout(tiny):
    model = loading.load_model(tiny["bart"])
    engine = TransformersEngine(model, loading.load_tokenizer(tiny["bart"]))
    wanted = engine.generate(TEXTS, GREEDY, max_source_tokens=50)
    model.train()
    assert engine.generate(TEXTS, GREEDY, max_source_tokens=50) == wanted
    assert model.training


def test_bf16_is_generated_with_when_asked(tiny):
    engine = open_engine(tiny["bart"], "transformers", precision="bf16")
    assert engine.precision == "bf16"
    assert len(engine.generate(TEXTS, GREEDY, max_source_tokens=50)) == len(TEXTS)


# both


@pytest.mark.parametrize("kind", ["ctranslate2", "transformers"])
def test_n_best_blank_texts_and_no_texts(tiny, kind):
    engine = open_engine(tiny["t5"], kind, cache=tiny["cache"], allow_fallback=False)
    beam = replace(GREEDY, beams=4)
    assert engine.generate([], beam, max_source_tokens=50) == []
    seen: list[tuple[int, int]] = []
    found = engine.generate(
        ["", TEXTS[0], " "],
        beam,
        max_source_tokens=50,
        n_best=3,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert [[h.text for h in found[i]] for i in (0, 2)] == [[""], [""]]
    scores = [h.score for h in found[1]]
    assert len(scores) == 3
    assert scores == sorted(scores, reverse=True)
    assert seen == [(1, 1)]
    with pytest.raises(ValueError, match="n_best 5 is more than the 4 beams"):
        engine.generate(TEXTS, beam, max_source_tokens=50, n_best=5)


@pytest.mark.parametrize("kind", ["ctranslate2", "transformers"])
def test_texts_and_outputs_beyond_the_positions_are_cut(tmp_path, kind):
    folder = save_tiny("bart", tmp_path / "m", max_positions=20)
    engine = open_engine(folder, kind, cache=tmp_path / "cache", allow_fallback=False)
    found = engine.generate([" ".join(TEXTS)], replace(GREEDY, max_length=90), max_source_tokens=1024)
    assert found[0][0].text


@pytest.mark.parametrize("kind", ["ctranslate2", "transformers"])
@pytest.mark.parametrize("beams", [1, 3])
def test_lengths_are_counted_with_start_and_end(tmp_path, kind, beams):
    """A BART that ends as soon as it may: </s> and the forced <s> come first, so 4 of 6 are left over."""
    folder = save_tiny("bart", tmp_path / "m", logits_bias=True)
    model = loading.load_model(folder)
    bias = model.final_logits_bias
    assert isinstance(bias, torch.Tensor)
    bias[0, model.config.eos_token_id] = 50
    bias[0, 4:100] = 10  # bytes, one character each
    model.save_pretrained(folder)
    engine = open_engine(folder, kind, cache=tmp_path / "cache", allow_fallback=False)
    beam = Beam(beams, 1.0, 6, 30, 0, True, engine.generation.forced_bos_token_id)
    for [best] in engine.generate(TEXTS[:3], beam, max_source_tokens=50):
        assert len(best.text) == 4
    bias[0, model.config.eos_token_id] = -50  # and one that never ends: of 8, the end is one too
    model.save_pretrained(folder)
    engine = open_engine(folder, kind, cache=tmp_path / "cache", allow_fallback=False)
    for [best] in engine.generate(TEXTS[:3], replace(beam, max_length=8), max_source_tokens=50):
        assert len(best.text) == 5


@pytest.mark.parametrize("kind", ["ctranslate2", "transformers"])
def test_a_decoder_deeper_than_the_encoder(tmp_path, kind):
    folder = save_tiny("t5", tmp_path / "m", encoder_layers=1, decoder_layers=4)
    engine = open_engine(folder, kind, cache=tmp_path / "cache", allow_fallback=False)
    assert len(engine.generate(TEXTS, replace(GREEDY, beams=2), max_source_tokens=50)) == len(TEXTS)


# CTranslate2


@pytest.mark.parametrize("family", [*FAMILIES, "t5 1.1"])
def test_a_conversion_has_the_log_probabilities_of_transformers(tiny, family):
    model, tokenizer = loading.load_model(tiny[family]), loading.load_tokenizer(tiny[family])
    engine = ctranslate2(tiny, family)
    folder = ctranslate2_conversion.converted(tiny[family], tokenizer, tiny["cache"], 1, None)
    assert disagreement(folder, model, tokenizer) < 0.005
    greedy = replace(GREEDY, forced_first=engine.generation.forced_bos_token_id)
    wanted = open_engine(tiny[family], "transformers").generate(TEXTS, greedy, max_source_tokens=50)
    assert texts_of(engine.generate(TEXTS, greedy, max_source_tokens=50)) == texts_of(wanted)


def test_disagreement_sees_another_model(tiny, tmp_path):
    other = loading.load_model(save_tiny("bart", tmp_path, seed=1))
    tokenizer = loading.load_tokenizer(tiny["bart"])
    folder = ctranslate2_conversion.converted(tiny["bart"], tokenizer, tiny["cache"], 1, None)
    assert disagreement(folder, other, tokenizer) > 1
    own = loading.load_model(tiny["bart"])
    bias = own.final_logits_bias
    assert isinstance(bias, torch.Tensor)
    bias.zero_()
    assert disagreement(folder, own, tokenizer) > ctranslate2_conversion.TOLERANCE


def test_another_mbart_language_needs_no_conversion_of_its_own(tiny):
    romanian = ctranslate2(tiny, "mbart", languages=("en_XX", "ro_RO"))
    german = ctranslate2(tiny, "mbart", languages=("en_XX", "de_DE"))
    reference = open_engine(tiny["mbart"], "transformers", languages=("en_XX", "de_DE"))
    found = texts_of(german.generate(TEXTS, GREEDY, max_source_tokens=50))
    assert found == texts_of(reference.generate(TEXTS, GREEDY, max_source_tokens=50))
    assert found != texts_of(romanian.generate(TEXTS, GREEDY, max_source_tokens=50))


def test_a_checkpoint_is_not_touched_and_is_converted_once(tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    said: list[str] = []
    for _ in range(2):
        open_engine(folder, cache=tmp_path / "cache", say=said.append)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert len(said) == 1
    assert "converting" in said[0]
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_several_at_once_convert_once(tmp_path, monkeypatch):
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    tokenizer = loading.load_tokenizer(folder)
    made = []
    real = ctranslate2_conversion._convert_into
    monkeypatch.setattr(ctranslate2_conversion, "_convert_into", lambda *args: made.append(args) or real(*args))
    with ThreadPoolExecutor(4) as pool:
        places = list(pool.map(lambda _: ctranslate2_conversion.converted(folder, tokenizer, cache, 1, None), range(4)))
    assert len(set(places)) == len(made) == 1
    assert [path.name for path in cache.glob("[!.]*")] == [places[0].name]
    assert not list(cache.glob(".making-*"))


def test_a_failure_that_may_pass_is_not_remembered(tmp_path, monkeypatch):
    """Faults at the converter's boundary: too little memory, a full disk."""
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    tokenizer = loading.load_tokenizer(folder)

    def failing(error):
        def convert(*args):
            raise error

        return convert

    passing = (
        (RuntimeError("out of memory"), ctranslate2_conversion.RefusedError, "failed this time: out of memory"),
        (OSError(28, "No space left on device"), UserError, "No space left on device.*free some disk"),
    )
    for error, raised, words in passing:
        monkeypatch.setattr(ctranslate2_conversion, "convert", failing(error))
        with pytest.raises(raised, match=words):
            ctranslate2_conversion.converted(folder, tokenizer, cache, 1, None)
        assert not list(cache.glob("[!.]*"))
        assert not list(cache.glob(".making-*"))
    monkeypatch.undo()
    assert ctranslate2_conversion.converted(folder, tokenizer, cache, 1, None).is_dir()


def test_a_truncated_conversion_is_made_again(tmp_path):
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    engine = open_engine(folder, cache=cache, allow_fallback=False)
    wanted = engine.generate(TEXTS, GREEDY, max_source_tokens=50)
    for damage in ("model.bin", ctranslate2_conversion.PROOF):
        [path] = cache.glob(f"*/{damage}")
        path.write_bytes(path.read_bytes()[:50])
        engine = open_engine(folder, cache=cache, allow_fallback=False)
        assert engine.generate(TEXTS, GREEDY, max_source_tokens=50) == wanted


def test_changed_weights_are_converted_anew(tmp_path):
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        open_engine(save_tiny("bart", tmp_path / "m", seed=seed), cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2


@pytest.mark.parametrize(
    ("family", "kw", "reason"),
    [
        ("marian", {"marian_padding_row": 0.5}, "padding row is not zero"),
        ("t5", {"padded_rows": 3}, r"padded to \d+ rows beyond the tokenizer's"),
    ],
)
def test_what_ctranslate2_would_get_wrong_is_refused_and_falls_back_aloud(tmp_path, family, kw, reason):
    folder, cache = save_tiny(family, tmp_path / "m", **kw), tmp_path / "cache"
    for _ in range(2):  # the refusal is kept too
        with pytest.raises(UserError, match=reason):
            open_engine(folder, "ctranslate2", cache=cache, allow_fallback=False)
    said: list[str] = []
    engine = open_engine(folder, "auto", cache=cache, precision="int8", say=said.append)
    assert (engine.name, engine.precision) == ("transformers", "fp32")
    assert "using transformers, since" in said[-1]


@pytest.mark.parametrize("fails", ["opening", "first call"])
def test_a_ctranslate2_that_fails_when_it_is_opened_or_called_is_refused_with_its_words(tiny, monkeypatch, fails):
    """As without libcublas, or on a full GPU: a fault at the library's boundary, which no CPU can bring about."""
    ctranslate2_conversion.converted(tiny["bart"], loading.load_tokenizer(tiny["bart"]), tiny["cache"], 1, None)
    words = "Library libcublas.so.12 is not found or cannot be loaded"
    told = f"it failed on cpu: {words}; `pip install nvidia-cublas-cu12` brings it"

    def broken(*args, **kw):
        raise RuntimeError(words)

    if fails == "opening":
        monkeypatch.setattr(ctranslate2_engine, "open_translator", broken)
    else:
        monkeypatch.setattr(CTranslate2Engine, "_translate", broken)
    sample = Sample(tuple(TEXTS[:2]), GREEDY, 50)
    said: list[str] = []
    engine = open_engine(tiny["bart"], cache=tiny["cache"], sample=sample, say=said.append)
    assert engine.name == "transformers"
    assert said == [f"{tiny['bart']}: using transformers, since {told}"]
    with pytest.raises(UserError, match=f"CTranslate2 cannot be used: {told}"):
        ctranslate2(tiny, "bart", sample=sample)


def test_a_generation_config_that_ctranslate2_does_not_know_is_refused(tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.3}))
    with pytest.raises(UserError, match="sets repetition_penalty"):
        open_engine(folder, "ctranslate2", cache=tmp_path / "cache", allow_fallback=False)


def test_an_unknown_precision_is_the_users_to_mend(tiny):
    with pytest.raises(UserError, match="precision 'int4' is none of"):
        open_engine(tiny["bart"], precision="int4")
    with pytest.raises(UserError, match="transformers has no int8"):
        open_engine(tiny["bart"], "transformers", precision="int8")


@pytest.mark.skipif(not REAL.is_dir(), reason="the shared teacher is not here")
def test_engines_agree_on_a_trained_model(tmp_path):
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / "validation.jsonl.gz").read_bytes())
    texts = [json.loads(line)["document"] for line in rows.decode().splitlines()[:60]]
    ours = open_engine(REAL, "ctranslate2", cache=tmp_path, allow_fallback=False)
    reference = open_engine(REAL, "transformers")
    beam = resolve_decoding(Decoding(), ours.generation, None, 60)
    assert (beam.beams, beam.max_length) == (4, 64)
    for asked in (beam, replace(beam, early_stopping=True), replace(beam, length_penalty=0.6)):
        found = ours.generate(texts, asked, max_source_tokens=128)
        wanted = reference.generate(texts, asked, max_source_tokens=128)
        same = [a == b for a, b in zip(texts_of(found), texts_of(wanted), strict=True)]
        assert sum(same) >= 0.95 * len(texts)
        scores = [(a[0].score, b[0].score) for a, b in zip(found, wanted, strict=True)]
        close = [math.isclose(a, b, abs_tol=2e-3) for a, b in scores]
        assert sum(close) >= 0.95 * len(texts)


def test_where_a_length_or_repeat_limit_binds_ctranslate2_scores_what_is_left_higher(tiny):
    """The engines' one difference: forbidden words' probability is spread over the others, or lost.

    Greedy search is not changed by it; in beam search hypotheses may change places.
    """
    ours, reference = ctranslate2(tiny, "t5"), open_engine(tiny["t5"], "transformers")

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


def test_a_conversion_that_is_wrong_on_real_rows_is_refused(tmp_path):
    """As if it had gone wrong after its proof: another model's weights under this model's name."""
    cache = tmp_path / "cache"
    folder, other = (save_tiny("bart", tmp_path / f"m{seed}", seed=seed) for seed in (0, 1))
    sample = Sample(tuple(TEXTS[:3]), GREEDY, 50)
    proved = open_engine(folder, "ctranslate2", cache=cache, allow_fallback=False, sample=sample)
    assert isinstance(proved, CTranslate2Engine)
    eight = open_engine(folder, precision="int8", cache=cache, allow_fallback=False, sample=sample)
    assert eight.name == "ctranslate2"
    wrong = open_engine(other, "ctranslate2", cache=cache, allow_fallback=False)
    assert isinstance(wrong, CTranslate2Engine)
    shutil.copy(wrong.folder / "model.bin", proved.folder / "model.bin")
    for kept in proved.folder.glob("rows-*"):
        kept.unlink()
    with pytest.raises(UserError, match="on real rows its log-probabilities are off"):
        open_engine(folder, "ctranslate2", cache=cache, allow_fallback=False, sample=sample)
    assert open_engine(folder, cache=cache, sample=sample).name == "transformers"


def test_a_teacher_that_writes_up_to_its_last_position_proves_itself_too(tmp_path):
    """Its own words, read back, fill all positions; the token that decoding begins with needs one of them."""
    folder = save_tiny("bart", tmp_path / "model", max_positions=16)
    sample = Sample(tuple(TEXTS), replace(GREEDY, max_length=17), 16)
    assert open_engine(folder, cache=tmp_path / "cache", sample=sample).name == "ctranslate2"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_dir(), reason="the shared teacher is not here")
@pytest.mark.parametrize(
    ("beams", "precision", "identical", "score"),
    [(1, "fp32", 0.97, 0.1), (4, "fp32", 0.97, 0.1), (1, "int8", 0.0, 0.3), (4, "int8", 0.0, 0.3)],
)
def test_parity_on_a_thousand_rows(tmp_path, beams, precision, identical, score):
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / "test.jsonl.gz").read_bytes()).decode().splitlines()
    texts, wanted = zip(*((row["document"], row["summary"]) for row in map(json.loads, rows)), strict=True)
    ours = open_engine(REAL, "ctranslate2", cache=tmp_path, allow_fallback=False, precision=precision)
    reference = open_engine(REAL, "transformers")
    beam = resolve_decoding(Decoding(beams=beams), ours.generation, None, 60)
    found = [texts_of(engine.generate(list(texts), beam, max_source_tokens=128)) for engine in (ours, reference)]
    assert sum(a == b for a, b in zip(*found, strict=True)) >= identical * len(texts)
    scores = [bleu(bleu_rows(outputs, list(wanted))) for outputs in found]
    assert abs(scores[0] - scores[1]) <= score
