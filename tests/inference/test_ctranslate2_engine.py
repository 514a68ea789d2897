"""The CTranslate2 engine: failures at run time, unsupported settings, and validation on calibration rows."""

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from raydistill.core import artifact
from raydistill.core.errors import UserError
from raydistill.inference import ctranslate2_conversion, ctranslate2_engine
from raydistill.inference.ctranslate2_engine import CTranslate2Engine, describe_serving
from raydistill.inference.decoding import CalibrationRows, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.models import loading, tokenization
from raydistill.models.saving import save_checkpoint
from tests.factories.engines import GREEDY, TEXTS, first_texts, has_avx512, open_ctranslate2
from tests.factories.models import LANGUAGES, save_tiny


def greedy_texts(engine):
    """Outputs that begin with the language that the engine is set to."""
    greedy = replace(GREEDY, forced_bos_token_id=engine.generation_config.forced_bos_token_id)
    return first_texts(engine.generate(TEXTS, greedy, max_source_tokens=50))


@pytest.mark.parametrize(
    ("family", "german"), [("mbart", "de_DE"), ("mbart50", "de_DE"), ("m2m100", "de"), ("nllb", "deu_Latn")]
)
def test_languages_share_one_conversion(tiny, family, german):
    english, romanian = LANGUAGES[family]
    to_romanian = open_ctranslate2(tiny, family, languages=(english, romanian))
    to_german = open_ctranslate2(tiny, family, languages=(english, german))
    assert isinstance(to_romanian, CTranslate2Engine)
    assert isinstance(to_german, CTranslate2Engine)
    assert to_romanian.folder == to_german.folder
    texts = greedy_texts(to_german)
    reference = open_engine(tiny[family], "transformers", EngineOptions(languages=(english, german)))
    assert texts == greedy_texts(reference)
    assert texts != greedy_texts(to_romanian)


@pytest.mark.parametrize("fails", ["opening", "first call"])
def test_runtime_failure_of_ctranslate2_is_reported_with_its_message(tiny, monkeypatch, fails):
    """Simulates a failure inside CTranslate2 such as a missing libcublas, which cannot happen on a CPU."""
    ctranslate2_conversion.ensure_converted(
        tiny["bart"], tokenization.load_tokenizer(tiny["bart"]), tiny["cache"], 1, None
    )
    message = "Library libcublas.so.12 is not found or cannot be loaded"
    reason = f"CTranslate2 failed on cpu: {message}; install it with `pip install nvidia-cublas-cu12`"

    def broken(*args, **kw):
        raise RuntimeError(message)

    if fails == "opening":
        monkeypatch.setattr(ctranslate2_engine, "open_translator", broken)
    else:
        monkeypatch.setattr(CTranslate2Engine, "_translate", broken)
    calibration = CalibrationRows(tuple(TEXTS[:2]), GREEDY, 50)
    log: list[str] = []
    engine = open_engine(
        tiny["bart"], options=EngineOptions(cache_dir=tiny["cache"]), calibration=calibration, log=log.append
    )
    assert engine.name == "transformers"
    assert log == [f"{tiny['bart']}: using transformers, since {reason}"]
    with pytest.raises(UserError, match=f"CTranslate2 cannot be used: {reason}"):
        open_ctranslate2(tiny, "bart", calibration=calibration)


def test_unsupported_generation_config_is_an_error(tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "repetition_penalty": 1.3}))
    with pytest.raises(UserError, match="sets repetition_penalty"):
        open_engine(folder, "ctranslate2", EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False))


def test_conversion_that_is_wrong_on_calibration_rows_is_an_error(tmp_path):
    """The weights of a validated conversion are replaced by another model's."""
    cache = tmp_path / "cache"
    folder, other = (save_tiny("bart", tmp_path / f"m{seed}", seed=seed) for seed in (0, 1))
    calibration = CalibrationRows(tuple(TEXTS[:3]), GREEDY, 50)
    correct = open_engine(
        folder, "ctranslate2", EngineOptions(cache_dir=cache, allow_fallback=False), calibration=calibration
    )
    assert isinstance(correct, CTranslate2Engine)
    wrong = open_engine(other, "ctranslate2", EngineOptions(cache_dir=cache, allow_fallback=False))
    assert isinstance(wrong, CTranslate2Engine)
    shutil.copy(wrong.folder / "model.bin", correct.folder / "model.bin")
    for path in correct.folder.glob("rows-*"):
        path.unlink()
    with pytest.raises(UserError, match="log-probabilities of its converted model are off"):
        open_engine(
            folder, "ctranslate2", EngineOptions(cache_dir=cache, allow_fallback=False), calibration=calibration
        )
    assert open_engine(folder, options=EngineOptions(cache_dir=cache), calibration=calibration).name == "transformers"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"schema": 2, "max_logprob_diff": 0.5}', "log-probabilities of its converted model are off by up to 0.5"),
        ('{"schema": 2, "max_logprob_diff": null}', "log-probabilities of its converted model are off by up to nan"),
        ('{"schema": 2}', r"rows-.*\.json: damaged: max_logprob_diff: Field required"),
        ('{"sche', r"rows-.*\.json: damaged"),
    ],
)
def test_stored_calibration_result_is_used_and_a_damaged_one_is_an_error(content, message, tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    options = EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False)
    calibration = CalibrationRows(tuple(TEXTS[:3]), GREEDY, 50)
    engine = open_engine(folder, options=options, calibration=calibration)
    assert isinstance(engine, CTranslate2Engine)
    [path] = engine.folder.glob("rows-*.json")
    assert json.loads(path.read_text())["max_logprob_diff"] < 0.1
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        open_engine(folder, options=options, calibration=calibration)


def test_a_process_that_waits_for_a_validation_on_calibration_rows_says_so(tiny):
    options = EngineOptions(cache_dir=tiny["cache"])
    engine = open_engine(tiny["bart"], options=options)
    messages, waiting = [], threading.Event()

    def log(message):
        messages.append(message)
        waiting.set()

    calibration = CalibrationRows(tuple(TEXTS[:1]), GREEDY, 49)
    with ThreadPoolExecutor(1) as pool:
        with artifact.lock(engine.folder):
            opened = pool.submit(open_engine, tiny["bart"], options=options, calibration=calibration, log=log)
            assert waiting.wait(60)
        assert opened.result().name == "ctranslate2"
    assert messages[0].startswith(f"{engine.folder}: in use by process")


@pytest.mark.skipif(not has_avx512(), reason="without AVX512, int8 products of this random model saturate")
def test_int8_engine_of_a_correct_conversion_passes_calibration(tmp_path):
    folder = save_tiny("bart", tmp_path / "m")
    options = EngineOptions(precision="int8", cache_dir=tmp_path / "cache", allow_fallback=False)
    calibration = CalibrationRows(tuple(TEXTS[:3]), GREEDY, 50)
    assert open_engine(folder, options=options, calibration=calibration).name == "ctranslate2"


def test_calibration_with_outputs_up_to_the_last_position(tmp_path):
    """Outputs that fill all positions are truncated by one token, because the start token needs a position."""
    folder = save_tiny("bart", tmp_path / "model", max_positions=16)
    calibration = CalibrationRows(tuple(TEXTS), replace(GREEDY, max_length=17), 16)
    assert (
        open_engine(folder, options=EngineOptions(cache_dir=tmp_path / "cache"), calibration=calibration).name
        == "ctranslate2"
    )


def test_minimum_length_may_equal_the_maximum_with_a_forced_end_token(tiny):
    """As for a `max_length` below the teacher's own minimum. BART forces the last of `max_length` tokens."""
    beam = replace(GREEDY, min_length=6, max_length=6, forced_bos_token_id=0)
    options = EngineOptions(cache_dir=tiny["cache"], allow_fallback=False)
    engines = [open_engine(tiny["bart"], name, options) for name in ("transformers", "ctranslate2")]
    assert engines[1].generation_config.forced_eos_token_id is not None
    first, second = (first_texts(engine.generate(TEXTS, beam, max_source_tokens=50)) for engine in engines)
    assert first == second


@pytest.mark.parametrize("engine_name", ["ctranslate2", "transformers"])
def test_requested_prefix_comes_before_every_source(engine_name, tiny):
    options = EngineOptions(cache_dir=tiny["cache"], source_prefix="the city council ", allow_fallback=False)
    engine = open_engine(tiny["t5"], engine_name, options)
    plain = open_engine(tiny["t5"], engine_name, EngineOptions(cache_dir=tiny["cache"], allow_fallback=False))
    written = [row[0].text for row in engine.generate(TEXTS, GREEDY, max_source_tokens=50)]
    prefixed = [f"the city council {text}" for text in TEXTS]
    assert written == [row[0].text for row in plain.generate(prefixed, GREEDY, max_source_tokens=50)]
    assert written != [row[0].text for row in plain.generate(TEXTS, GREEDY, max_source_tokens=50)]


def test_serving_description_has_the_prefix_that_a_student_keeps(tiny, tmp_path):
    tokenizer = tokenization.load_tokenizer(tiny["t5"], source_prefix="summarize: ")
    save_checkpoint(loading.load_model(tiny["t5"]), tokenizer, tmp_path / "student")
    options = EngineOptions(precision="fp32", cache_dir=tmp_path / "cache", allow_fallback=False)
    engine = open_engine(tmp_path / "student", "ctranslate2", options)
    assert isinstance(engine, CTranslate2Engine)
    assert describe_serving(engine.folder, tmp_path / "student", options).source_prefix == "summarize: "
