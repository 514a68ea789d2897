"""Conversion to CTranslate2: equality of log-probabilities, and the cache of conversions."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from raydistill.core.errors import UserError
from raydistill.inference import ctranslate2_conversion
from raydistill.inference.decoding import EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.models import loading, tokenization
from tests.factories.engines import GREEDY, TEXTS, first_texts, open_ctranslate2
from tests.factories.kills import check_synced_before_publication, record_syncs_and_renames
from tests.factories.models import FAMILIES, save_tiny


def probe_logprob_diff(folder, model, tokenizer) -> float:
    return ctranslate2_conversion._probe_logprob_diff(folder, model, tokenizer, 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_converted_model_has_the_log_probabilities_of_transformers(tiny, family):
    model, tokenizer = loading.load_model(tiny[family]), tokenization.load_tokenizer(tiny[family])
    engine = open_ctranslate2(tiny, family)
    folder = ctranslate2_conversion.ensure_converted(tiny[family], tokenizer, tiny["cache"], 1, None)
    assert probe_logprob_diff(folder, model, tokenizer) < 0.005
    greedy = replace(GREEDY, forced_bos_token_id=engine.generation_config.forced_bos_token_id)
    expected = open_engine(tiny[family], "transformers").generate(TEXTS, greedy, max_source_tokens=50)
    assert first_texts(engine.generate(TEXTS, greedy, max_source_tokens=50)) == first_texts(expected)


@pytest.mark.parametrize("family", ["t5", "mt5", "m2m100", "nllb"])
def test_rows_without_a_token_are_converted(family, tmp_path):
    """Published models of these families have more rows in their embedding than tokens, and a random model uses all."""
    folder = save_tiny(family, tmp_path / "m", padded_rows=8)
    tokenizer, config = tokenization.load_tokenizer(folder), loading.load_config(folder)
    assert tokenization.embedding_tokens(tokenizer, config)[-9:-1] == [
        tokenization.tokens_by_id(tokenizer)[-1],
        *[f"<unused_{i}>" for i in range(config.vocab_size - 8, config.vocab_size - 1)],
    ]
    engine = open_engine(folder, "ctranslate2", EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))
    converted = ctranslate2_conversion.ensure_converted(folder, tokenizer, tmp_path / "cache", 1, None)
    assert probe_logprob_diff(converted, loading.load_model(folder), tokenizer) < 0.005
    greedy = replace(GREEDY, forced_bos_token_id=engine.generation_config.forced_bos_token_id)
    expected = open_engine(folder, "transformers").generate(TEXTS, greedy, max_source_tokens=50)
    assert first_texts(engine.generate(TEXTS, greedy, max_source_tokens=50)) == first_texts(expected)


def test_max_logprob_diff_detects_another_model(tiny, tmp_path):
    other = loading.load_model(save_tiny("bart", tmp_path, seed=1))
    tokenizer = tokenization.load_tokenizer(tiny["bart"])
    folder = ctranslate2_conversion.ensure_converted(tiny["bart"], tokenizer, tiny["cache"], 1, None)
    assert probe_logprob_diff(folder, other, tokenizer) > 1
    own = loading.load_model(tiny["bart"])
    bias = own.final_logits_bias
    assert isinstance(bias, torch.Tensor)
    bias.zero_()
    assert probe_logprob_diff(folder, own, tokenizer) > ctranslate2_conversion.LOGPROB_TOLERANCE


def test_conversion_happens_once_and_leaves_the_checkpoint_unchanged(tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    messages: list[str] = []
    for _ in range(2):
        open_engine(folder, options=EngineOptions(cache_dir=tmp_path / "cache"), log=messages.append)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert len(messages) == 1
    assert "converting" in messages[0]
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 1


def test_concurrent_callers_convert_once(tmp_path, monkeypatch):
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    tokenizer = tokenization.load_tokenizer(folder)
    conversions = []
    convert_into = ctranslate2_conversion._convert_into
    monkeypatch.setattr(
        ctranslate2_conversion, "_convert_into", lambda *args: conversions.append(args) or convert_into(*args)
    )
    with ThreadPoolExecutor(4) as pool:
        folders = list(
            pool.map(lambda _: ctranslate2_conversion.ensure_converted(folder, tokenizer, cache, 1, None), range(4))
        )
    assert len(set(folders)) == len(conversions) == 1
    assert [path.name for path in cache.glob("[!.]*")] == [folders[0].name]
    assert not list(cache.glob(".*.tmp"))


def test_temporary_failures_are_not_cached(tmp_path, monkeypatch):
    """Simulated failures of the converter: not enough memory, a full disk."""
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    tokenizer = tokenization.load_tokenizer(folder)

    def failing(error):
        def convert(*args):
            raise error

        return convert

    failures = (
        (
            RuntimeError("out of memory"),
            ctranslate2_conversion.CTranslate2Unavailable,
            "failed this time: out of memory",
        ),
        (OSError(28, "No space left on device"), UserError, "No space left on device.*free some disk"),
    )
    for error, error_type, message in failures:
        monkeypatch.setattr(ctranslate2_conversion, "convert_to_ctranslate2", failing(error))
        with pytest.raises(error_type, match=message):
            ctranslate2_conversion.ensure_converted(folder, tokenizer, cache, 1, None)
        assert not list(cache.glob("[!.]*"))
        assert not list(cache.glob(".*.tmp"))
    monkeypatch.undo()
    assert ctranslate2_conversion.ensure_converted(folder, tokenizer, cache, 1, None).is_dir()


@pytest.mark.parametrize("content", ["{", "{}", "[]"])
def test_a_foreign_config_of_a_converted_model_is_an_error_that_names_the_file(content, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(UserError, match=f"{path}: damaged: "):
        ctranslate2_conversion.target_prefix(tmp_path, ["a"], None)


def test_truncated_conversion_is_replaced(tmp_path):
    folder, cache = save_tiny("bart", tmp_path / "m"), tmp_path / "cache"
    engine = open_engine(folder, options=EngineOptions(cache_dir=cache, allow_fallback=False))
    expected = engine.generate(TEXTS, GREEDY, max_source_tokens=50)
    for damage in ("model.bin", "manifest.json"):
        [path] = cache.glob(f"*/{damage}")
        path.write_bytes(path.read_bytes()[:50])
        engine = open_engine(folder, options=EngineOptions(cache_dir=cache, allow_fallback=False))
        assert engine.generate(TEXTS, GREEDY, max_source_tokens=50) == expected


def test_conversion_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    folder = save_tiny("bart", tmp_path / "m")
    tokenizer = tokenization.load_tokenizer(folder)
    events = record_syncs_and_renames(monkeypatch)
    converted = ctranslate2_conversion.ensure_converted(folder, tokenizer, tmp_path / "cache", 1, None)
    check_synced_before_publication(events, converted)


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_model_whose_log_probabilities_are_not_finite_is_not_converted(weight, tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    model = loading.load_model(folder)
    with torch.no_grad():
        model.get_encoder().layers[0].fc1.weight.fill_(weight)
    model.save_pretrained(folder)
    for _ in range(2):
        with pytest.raises(UserError, match="log-probabilities are off by up to nan"):
            open_engine(folder, options=EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))


def test_changed_weights_get_a_new_conversion(tmp_path):
    for seed in (0, 1):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        open_engine(save_tiny("bart", tmp_path / "m", seed=seed), options=EngineOptions(cache_dir=tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("[!.]*"))) == 2
