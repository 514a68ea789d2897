"""Shortlists: what they hold, their file, both engines with a shortlist, and coverage."""

import gzip
import json
import os
import random
from dataclasses import replace

import ctranslate2
import numpy as np
import pytest

from raydistill.core.errors import UserError
from raydistill.evaluation.ngram_counts import bleu_rows, corpus_bleu
from raydistill.inference.ctranslate2_engine import CTranslate2Engine
from raydistill.inference.decoding import CalibrationRows, EngineOptions, Workload
from raydistill.inference.engines import open_engine
from raydistill.inference.shortlist import (
    Shortlist,
    fixed_shortlist,
    kept_tokens,
    link_model,
    measure_coverage,
    read_map,
    source_shortlist,
    write_map,
)
from raydistill.inference.word_alignment import translation_probabilities
from raydistill.models import loading, tokenization
from tests.factories.engines import (
    GREEDY,
    REAL_TEACHER,
    SHARED,
    TEXTS,
    first_texts,
    has_avx512,
    max_int8_difference,
    open_ctranslate2,
)
from tests.factories.models import FAMILIES, save_tiny, sentences

TOKENS = ["</s>", "a", "b", "c", "d", "e"]
SOURCES = [[1, 2], [1, 3], [4, 3]]
TARGETS = [[2, 5, 0], [2, 3, 0], [4, 3, 0]]


def test_fixed_shortlist_holds_the_most_used_targets_and_the_kept_tokens():
    shortlist = fixed_shortlist([[5, 5, 5, 2], [2, 3], [4]], 2, kept={0, 7})
    assert shortlist.always.tolist() == [0, 2, 5, 7]
    assert shortlist.allowed([[1], [3]]).tolist() == [0, 2, 5, 7]


def test_equally_frequent_tokens_are_listed_by_id():
    assert fixed_shortlist([[9, 4, 6]], 2, kept=()).always.tolist() == [4, 6]


def test_source_shortlist_lists_translations_and_the_source_token_itself():
    translations = translation_probabilities(SOURCES, TARGETS)
    shortlist = source_shortlist(SOURCES, TARGETS, translations, num_candidates=1, num_most_used=1, kept={0})
    assert shortlist.always.tolist() == [0]  # the end token is the most used target
    # 1 is translated by 2, 2 by 5 and 4 by 4; a source token that is copied is allowed too
    assert {token: ids.tolist() for token, ids in shortlist.by_source.items()} == {1: [1, 2], 2: [2, 5], 3: [3], 4: [4]}


def test_a_batch_is_allowed_the_union_of_its_rows():
    shortlist = Shortlist(np.array([0]), {1: np.array([2]), 3: np.array([4, 5])})
    assert shortlist.allowed([[1, 9], [1]]).tolist() == [0, 2]
    assert shortlist.allowed([[1], [3]]).tolist() == [0, 2, 4, 5]
    assert shortlist.allowed([]).tolist() == [0]


@pytest.mark.parametrize("family", FAMILIES)
def test_special_tokens_and_bytes_are_kept(tiny, family):
    tokenizer = tokenization.load_tokenizer(tiny[family])
    config = loading.load_config(tiny[family])
    kept = kept_tokens(tokenizer, config)
    assert {config.eos_token_id, config.pad_token_id, config.decoder_start_token_id, tokenizer.unk_token_id} <= kept
    vocabulary = tokenizer.get_vocab()
    expected = {"bart": ["Ġ", "a", "z", "Ã", "<s>"], "mbart": ["ro_RO", "de_DE"], "t5": ["<extra_id_0>"]}
    assert {vocabulary[token] for token in expected.get(family, [])} <= kept
    assert len(kept) < len(vocabulary)


def test_byte_tokens_of_sentencepiece_are_kept(tiny):
    tokenizer = tokenization.load_tokenizer(tiny["marian"])
    config = loading.load_config(tiny["marian"])
    first = len(tokenizer)
    tokenizer.add_tokens(["<0x00>", "<0xFF>", "<0xGG>"])
    config.vocab_size = first + 3
    assert {first, first + 1} == kept_tokens(tokenizer, config) - kept_tokens(
        tokenization.load_tokenizer(tiny["marian"]), loading.load_config(tiny["marian"])
    )


# The file


def test_map_is_written_in_the_format_of_ctranslate2_and_read_back(tmp_path):
    path = tmp_path / "vmap.txt"
    write_map(path, Shortlist(np.array([0, 1]), {2: np.array([3, 5]), 4: np.array([4])}), TOKENS)
    assert path.read_text() == "\t</s> a\nb\tc e\nd\td\n"
    read = read_map(path, TOKENS, required={0})
    assert read.key == [[0, 1], [2, 3, 5], [4, 4]]
    assert os.listdir(tmp_path) == ["vmap.txt"]


@pytest.mark.parametrize("token", ["two words", "a\tb", "a\n", "a\r"])
def test_a_token_that_the_format_cannot_express_is_an_error(tmp_path, token):
    with pytest.raises(UserError, match="contains a space or a line break"):
        write_map(tmp_path / "vmap.txt", Shortlist(np.array([0, 1])), ["</s>", token])
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("\t</s>\na b\tc\n", "line 2 is not a source token"),
        ("</s> a\n", "line 1 is not a source token"),
        ("\t</s> z\n", "line 1: the model's vocabulary lacks 'z'"),
        ("\t</s>\nz\ta\n", "line 2: the model's vocabulary lacks 'z'"),
        ("a\tb\n", "no line with the tokens that are always allowed"),
        ("", "no line with the tokens that are always allowed"),
        ("\ta b\n", "the tokens that are always allowed lack '</s>'"),
        ("\t\udcff\n", "can't decode byte 0xff"),
    ],
)
def test_a_damaged_or_foreign_map_is_an_error(tmp_path, content, reason):
    path = tmp_path / "vmap.txt"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=reason):
        read_map(path, TOKENS, required={0})


def test_a_missing_map_is_an_error(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_map(tmp_path / "vmap.txt", TOKENS)


# The engines


def random_shortlist(checkpoint, seed=0, by_source=True):
    """A shortlist with few tokens, different for each source token, so that a random model notices every token."""
    tokenizer, config = tokenization.load_tokenizer(checkpoint), loading.load_config(checkpoint)
    kept = kept_tokens(tokenizer, config)
    ordinary = sorted(set(range(config.vocab_size)) - kept)
    rng = random.Random(seed)
    lists = {token: np.array(sorted(rng.sample(ordinary, 4))) for token in ordinary} if by_source else {}
    return Shortlist(np.array(sorted({*kept, *rng.sample(ordinary, 8)})), lists)


def open_pair(tiny, family, path, shortlist, **options):
    """Both engines with a shortlist, and the tokens by id."""
    tokens = tokenization.tokens_by_id(tokenization.load_tokenizer(tiny[family]))
    write_map(path, shortlist, tokens)
    ours = open_ctranslate2(tiny, family, shortlist=path, **options)
    return ours, open_engine(tiny[family], "transformers", EngineOptions(shortlist=path, **options))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("beams", [1, 3])
def test_engines_agree_with_a_shortlist(tiny, tmp_path, family, beams):
    """One row at a time, because the list of a batch is the union over its rows; CTranslate2 forms its own batches."""
    ours, reference = open_pair(tiny, family, tmp_path / "vmap.txt", random_shortlist(tiny[family]))
    beam = replace(GREEDY, beams=beams, max_length=12, forced_bos_token_id=ours.generation_config.forced_bos_token_id)
    pairs = []
    for text in TEXTS[:5]:
        results = [engine.generate([text], beam, max_source_tokens=50) for engine in (ours, reference)]
        pairs += [(a[0], b[0]) for a, b in zip(*results, strict=True)]
    assert [a.text for a, _ in pairs] == [b.text for _, b in pairs]
    # CTranslate2 does not count an end token that `generate()` forces at the maximum length.
    forces_end = ours.generation_config.forced_eos_token_id is not None  # not in T5, M2M100 and NLLB-200
    uncounted = [forces_end and b.num_tokens == 11 for _, b in pairs]
    scores = [a.score * (11 - n) / 11 if n else a.score for (a, _), n in zip(pairs, uncounted, strict=True)]
    assert scores == pytest.approx([b.score for _, b in pairs], abs=1e-3)
    unlimited = open_ctranslate2(tiny, family).generate(TEXTS[:5], beam, max_source_tokens=50)
    assert not np.allclose([h[0].score for h in unlimited], [a.score for a, _ in pairs], atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_do_not_depend_on_the_previous_batch(tiny, tmp_path, family):
    """CTranslate2 4.8.5 keeps positions of the previous batch's list; mBART then started with another token."""
    path = tmp_path / "vmap.txt"
    write_map(
        path, random_shortlist(tiny[family]), tokenization.tokens_by_id(tokenization.load_tokenizer(tiny[family]))
    )
    engine = open_ctranslate2(tiny, family, shortlist=path)
    for text in TEXTS[:4]:
        alone = open_ctranslate2(tiny, family, shortlist=path)
        expected = alone.generate([text], GREEDY, max_source_tokens=50)
        assert engine.generate([text], GREEDY, max_source_tokens=50) == expected


@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
@pytest.mark.parametrize(("precision", "identical", "score"), [("fp32", 0.95, 2e-3), ("int8", 0.6, 0.05)])
def test_parity_on_a_trained_model(tmp_path, precision, identical, score):
    """Bounds: the share of equal texts, and the mean difference of the scores (log-probability per token)."""
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / "validation.jsonl.gz").read_bytes()).decode()
    sources, targets = zip(
        *((row["document"], row["summary"]) for row in map(json.loads, rows.splitlines())), strict=True
    )
    tokenizer = tokenization.load_tokenizer(REAL_TEACHER)
    kept = kept_tokens(tokenizer, loading.load_config(REAL_TEACHER))
    shortlist = fixed_shortlist(tokenization.tokenize_targets(tokenizer, list(targets), 64), 1500, kept)
    write_map(tmp_path / "vmap.txt", shortlist, tokenization.tokens_by_id(tokenizer))
    options = EngineOptions(cache_dir=tmp_path, allow_fallback=False, shortlist=tmp_path / "vmap.txt")
    ours = open_engine(REAL_TEACHER, "ctranslate2", replace(options, precision=precision))
    reference = open_engine(REAL_TEACHER, "transformers", options)
    beam = replace(GREEDY, beams=4, max_length=40)
    a, b = (engine.generate(list(sources[:60]), beam, max_source_tokens=64) for engine in (ours, reference))
    same = [x == y for x, y in zip(first_texts(a), first_texts(b), strict=True)]
    assert sum(same) >= identical * len(same)
    differences = [abs(x[0].score - y[0].score) for x, y in zip(a, b, strict=True)]
    assert sum(differences) / len(differences) <= score
    unlimited = open_engine(REAL_TEACHER, "ctranslate2", EngineOptions(cache_dir=tmp_path))
    assert first_texts(unlimited.generate(list(sources[:60]), beam, max_source_tokens=64)) != first_texts(a)


def read_multi30k(split, count=None):
    """Sources and targets of a split."""
    rows = gzip.decompress((SHARED / "data" / "multi30k_en_de" / f"{split}.jsonl.gz").read_bytes()).decode()
    records = [json.loads(line) for line in rows.splitlines()[:count]]
    return [row["document"] for row in records], [row["summary"] for row in records]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
@pytest.mark.parametrize(
    ("precision", "identical", "bleu"), [("fp32", 0.97, 0.1), ("int8", 0.5, max_int8_difference())]
)
@pytest.mark.parametrize("kind", ["fixed", "source"])
def test_parity_of_shortlists_on_real_rows(tmp_path, kind, precision, identical, bleu):
    """With the list of each row: CTranslate2 in fp32 and in int8 against transformers in fp32.

    Bounds: the share of equal texts, and the difference of BLEU. A `source` list is compared row by row, because the
    engines form different batches.
    """
    tokenizer, config = tokenization.load_tokenizer(REAL_TEACHER), loading.load_config(REAL_TEACHER)
    train = read_multi30k("train", 5000)
    sources = tokenization.tokenize_sources(tokenizer, train[0], 64)
    targets = tokenization.tokenize_targets(tokenizer, train[1], 64)
    kept = kept_tokens(tokenizer, config)
    if kind == "fixed":
        shortlist = fixed_shortlist(targets, 2000, kept)
    else:
        shortlist = source_shortlist(sources, targets, translation_probabilities(sources, targets), 20, 500, kept)
    write_map(tmp_path / "vmap.txt", shortlist, tokenization.tokens_by_id(tokenizer))
    options = EngineOptions(cache_dir=tmp_path, allow_fallback=False, shortlist=tmp_path / "vmap.txt")
    texts, references = read_multi30k("test", 1000 if kind == "fixed" else 300)
    calls = [texts] if kind == "fixed" else [[text] for text in texts]
    beam = replace(GREEDY, beams=4, max_length=60)
    engines = (
        open_engine(REAL_TEACHER, "ctranslate2", replace(options, precision=precision)),
        open_engine(REAL_TEACHER, "transformers", options),
    )
    outputs = [
        [text for call in calls for text in first_texts(engine.generate(call, beam, max_source_tokens=64))]
        for engine in engines
    ]
    same = sum(a == b for a, b in zip(*outputs, strict=True)) / len(texts)
    ours, reference = (corpus_bleu(bleu_rows(outputs_of_engine, references)) for outputs_of_engine in outputs)
    print(f"{kind} {precision}: {same:.3f} equal, BLEU {ours:.2f} and {reference:.2f}")
    assert same >= identical
    assert abs(ours - reference) <= bleu


@pytest.mark.slow
@pytest.mark.skipif(not REAL_TEACHER.is_dir(), reason="the shared teacher is not available")
def test_log_probabilities_in_int8_on_trained_weights(tmp_path):
    """Differences from fp32 per token, of the references of the test split.

    With AVX2, whose products of int8 saturate, a mean of 0.064 was measured.
    """
    texts, references = read_multi30k("test")
    log_probs = {}
    for precision in ("fp32", "int8"):
        engine = open_engine(REAL_TEACHER, "ctranslate2", EngineOptions(cache_dir=tmp_path, precision=precision))
        assert isinstance(engine, CTranslate2Engine)
        tokens = engine.converted.tokens
        rows = (
            [[tokens[i] for i in row] for row in tokenize(engine.tokenizer, part, 64)]
            for tokenize, part in (
                (tokenization.tokenize_sources, texts),
                (tokenization.tokenize_targets, references),
            )
        )
        sources, targets = rows
        results = engine.converted.translator.score_batch(sources, [row[:-1] for row in targets], max_batch_size=32)
        log_probs[precision] = np.concatenate([result.log_probs for result in results])
    difference = log_probs["int8"] - log_probs["fp32"]
    figures = np.abs(difference).mean(), np.quantile(np.abs(difference), 0.99), abs(difference.mean())
    print("mean, 99 %, mean change:", *figures)
    factor = 1 if has_avx512() else 2
    assert figures[0] <= 0.05 * factor
    assert figures[1] <= 0.3 * factor
    assert figures[2] <= 0.01 * factor


@pytest.mark.parametrize("limits", [{"no_repeat_ngram": 2}, {"min_length": 12}])
def test_limits_of_the_search_hold_with_a_shortlist(tiny, tmp_path, limits):
    shortlist = random_shortlist(tiny["mbart"])
    ours, reference = open_pair(tiny, "mbart", tmp_path / "vmap.txt", shortlist)
    beam = replace(GREEDY, **limits)
    for text in TEXTS[:4]:
        [a], [b] = (engine.generate([text], beam, max_source_tokens=50)[0] for engine in (ours, reference))
        assert a.text == b.text
        assert a.num_tokens >= limits.get("min_length", 0) - 1


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_outputs_hold_listed_tokens_only(tiny, tmp_path, engine_name):
    """With one text per batch and a list of single letters."""
    tokenizer, config = tokenization.load_tokenizer(tiny["t5"]), loading.load_config(tiny["t5"])
    vocabulary = tokenizer.get_vocab()
    letters = [vocabulary[letter] for letter in "abcdefgh" if letter in vocabulary]
    shortlist = Shortlist(np.array(sorted({*kept_tokens(tokenizer, config), *letters})))
    write_map(tmp_path / "vmap.txt", shortlist, tokenization.tokens_by_id(tokenizer))
    options = EngineOptions(cache_dir=tiny["cache"], allow_fallback=False, shortlist=tmp_path / "vmap.txt")
    engine = open_engine(tiny["t5"], engine_name, options)
    texts = first_texts(engine.generate(TEXTS, replace(GREEDY, beams=2), max_source_tokens=50))
    assert len(letters) > 3
    assert set("".join(texts)) <= set("abcdefgh ")
    assert any(texts)


def test_any_ctranslate2_program_reads_the_linked_folder(tiny, tmp_path):
    shortlist = random_shortlist(tiny["bart"], by_source=False)
    ours, _ = open_pair(tiny, "bart", tmp_path / "vmap.txt", shortlist)
    assert isinstance(ours, CTranslate2Engine)
    folder = link_model(ours.folder, tmp_path / "vmap.txt", tmp_path / "linked")
    assert (folder / "model.bin").is_symlink()
    translator = ctranslate2.Translator(str(folder))
    rows = [[ours.converted.tokens[i] for i in row] for row in tokenization.tokenize_sources(ours.tokenizer, TEXTS, 50)]
    results = translator.translate_batch(rows, use_vmap=True, beam_size=1, max_decoding_length=15)
    written = {token for result in results for token in result.hypotheses[0]}
    assert written <= {ours.converted.tokens[i] for i in shortlist.always}
    unlimited = translator.translate_batch(rows, beam_size=1, max_decoding_length=15)
    assert not {token for result in unlimited for token in result.hypotheses[0]} <= written


def test_calibration_is_cached_per_shortlist(tiny, tmp_path):
    calibration = CalibrationRows(tuple(TEXTS[:2]), GREEDY, 50)
    cache = tmp_path / "cache"
    folder = save_tiny("bart", tmp_path / "m")
    tokens = tokenization.tokens_by_id(tokenization.load_tokenizer(folder))
    for number in range(2):
        write_map(tmp_path / f"{number}.txt", random_shortlist(folder, seed=number, by_source=False), tokens)
    for shortlist in (None, tmp_path / "0.txt", tmp_path / "1.txt", tmp_path / "1.txt"):
        engine = open_engine(
            folder, options=EngineOptions(cache_dir=cache, shortlist=shortlist), calibration=calibration
        )
        assert isinstance(engine, CTranslate2Engine)
    assert len(list(engine.folder.glob("rows-*.json"))) == 3


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_benchmark_of_a_source_shortlist_needs_real_rows(tiny, tmp_path, engine_name):
    tokens = tokenization.tokens_by_id(tokenization.load_tokenizer(tiny["t5"]))
    write_map(tmp_path / "vmap.txt", random_shortlist(tiny["t5"]), tokens)
    write_map(tmp_path / "fixed.txt", random_shortlist(tiny["t5"], by_source=False), tokens)
    options = EngineOptions(cache_dir=tiny["cache"], allow_fallback=False, shortlist=tmp_path / "vmap.txt")
    engine = open_engine(tiny["t5"], engine_name, options)
    workload = Workload(source_tokens=9, output_tokens=4, batch=5, beams=2)
    with pytest.raises(ValueError, match="real texts"):
        engine.make_benchmark_call(workload)
    engine.make_benchmark_call(workload, TEXTS)()
    fixed = open_engine(tiny["t5"], engine_name, replace(options, shortlist=tmp_path / "fixed.txt"))
    fixed.make_benchmark_call(workload)()


def test_rows_of_a_benchmark_have_the_lengths_of_the_workload(tiny):
    from raydistill.inference.decoding import benchmark_inputs

    tokenizer, config = tokenization.load_tokenizer(tiny["marian"]), loading.load_config(tiny["marian"])
    rows = benchmark_inputs(tokenizer, config, Workload(7, 4, 3, 1), TEXTS[:1], None)
    [row] = tokenization.tokenize_sources(tokenizer, TEXTS[:1], 7)
    assert [len(row) for row in rows] == [7, 7, 7]
    assert rows[0][:-1] == row[:-1]
    assert {row[-1] for row in rows} == {config.eos_token_id}


# Coverage


def test_coverage_by_hand():
    """Row 1 may write 0 and 2, row 2 also 3: the tokens 5 (twice) and 4 are outside."""
    shortlist = Shortlist(np.array([0]), {1: np.array([2]), 3: np.array([3])})
    coverage = measure_coverage(shortlist, [[1], [1, 3], [9]], [[2, 5, 0], [2, 3, 0], [4, 5, 0]])
    assert (coverage.rows, coverage.tokens, coverage.rows_outside, coverage.tokens_outside) == (3, 9, 2, 3)
    assert coverage.share_of_rows_outside == pytest.approx(2 / 3)
    assert coverage.share_of_tokens_outside == pytest.approx(1 / 3)
    assert coverage.mean_allowed == pytest.approx((2 + 3 + 1) / 3)


def test_coverage_of_batches_uses_the_union_of_their_rows():
    shortlist = Shortlist(np.array([0]), {1: np.array([2]), 3: np.array([5])})
    alone = measure_coverage(shortlist, [[1], [3]], [[5], [2]])
    together = measure_coverage(shortlist, [[1], [3]], [[5], [2]], batch_size=2)
    assert (alone.tokens_outside, together.tokens_outside) == (2, 0)


def test_coverage_of_no_rows_is_zero():
    coverage = measure_coverage(Shortlist(np.array([0])), [], [])
    assert (coverage.share_of_rows_outside, coverage.share_of_tokens_outside, coverage.mean_allowed) == (0, 0, 0)


def test_a_longer_list_covers_more():
    texts = sentences(300)
    rows = [[ord(character) for character in text] for text in texts]
    shares = [
        measure_coverage(fixed_shortlist(rows[:200], size, ()), rows[200:], rows[200:]).share_of_tokens_outside
        for size in (1, 5, 20, 100)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.5
    assert shares[-1] == 0
