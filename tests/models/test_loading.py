"""Loading of configurations and weights: errors name the file, missing weights are never initialized randomly."""

import pytest

from raydistill.config.presets import TEACHERS
from raydistill.config.run import Decoding
from raydistill.core.errors import UserError
from raydistill.inference.decoding import resolve_decoding
from raydistill.models import loading
from tests.factories.models import FAMILIES, edit_config, save_tiny


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 4}, r"26 are missing, such as model\.decoder\.layers\.3"),
        ({"d_model": 20}, r"have another shape, such as .*16.*20"),
        ({"model_type": []}, r"model_type is \[\]; supported are"),
        ({"model_type": "gpt2"}, "'gpt2'; supported are .*bart, pegasus, mbart, marian, m2m_100, t5, mt5"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_an_error(bart, changes, message):
    edit_config(bart, **changes)
    with pytest.raises(UserError, match=message):
        loading.load_model(bart)


@pytest.mark.parametrize("key", ["d_model", "encoder_ffn_dim", "decoder_layers", "vocab_size"])
def test_config_without_a_size_is_an_error(bart, key):
    edit_config(bart, **{key: None})
    with pytest.raises(UserError, match=r"config\.json"):
        loading.load_model(bart)


def test_damaged_or_missing_config_is_named_in_the_error(bart):
    (bart / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        loading.load_config(bart)
    (bart / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        loading.load_config(bart)


def test_locate_checkpoint_of_named_teachers_paths_and_the_demo(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    pinned = "facebook/bart-large-cnn@37f520fa929c961707657b28798b30c003dd100b"
    assert loading.locate_checkpoint("bart", "cnn_dailymail") == pinned
    assert loading.locate_checkpoint("bart", "xsum") == "facebook/bart-large-xsum@main"
    assert loading.locate_checkpoint("some/where", "xsum") == "some/where"
    with pytest.raises(UserError, match=r"raydistill train demo"):
        loading.locate_checkpoint("demo", "demo")
    best = tmp_path / "runs" / "demo-teacher" / "best"
    best.mkdir(parents=True)
    assert loading.locate_checkpoint("demo", "demo") == str(best)


def test_presets_have_the_reference_decoding_parameters():
    """The values of ../shared/reference/README.md; the config of bart-large-xsum on the hub repeats no trigram."""
    table = {
        ("bart", "xsum"): (6, 1.0, 11, 62, 3, 1024),
        ("bart", "cnn_dailymail"): (4, 2.0, 56, 142, 3, 1024),
        ("pegasus", "xsum"): (8, 0.6, None, 64, None, 512),
        ("pegasus", "cnn_dailymail"): (8, 0.8, None, 128, None, 1024),
        ("mbart", "wmt16_en_ro"): (5, 1.0, None, 128, None, 128),
        ("marian", "wmt16_en_ro"): (4, 1.0, None, 128, None, 128),
    }
    for (family, dataset), expected in table.items():
        preset = TEACHERS[family][dataset]
        d = preset.decoding
        actual = (d.beams, d.length_penalty, d.min_length, d.max_length, d.no_repeat_ngram, preset.max_source_tokens)
        assert actual == expected, (family, dataset)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_of_an_older_checkpoint_is_read_from_its_config_json(family, tmp_path):
    """Scores of a teacher use the model's own generation config; labels and CTranslate2 read the files."""
    checkpoint = save_tiny(family, tmp_path / "m")
    (checkpoint / "generation_config.json").unlink()
    legacy = {"num_beams": 6, "length_penalty": 2.0, "min_length": 5, "max_length": 42, "no_repeat_ngram_size": 3}
    edit_config(checkpoint, **legacy, early_stopping=True)
    read, loaded = loading.load_generation_config(checkpoint), loading.load_model(checkpoint).generation_config
    assert {name: getattr(read, name) for name in legacy} == legacy
    decodings = [resolve_decoding(Decoding(), config, None, 64) for config in (read, loaded)]
    assert decodings[0] == decodings[1]
    for name in ("decoder_start_token_id", "eos_token_id", "pad_token_id", "bad_words_ids", "repetition_penalty"):
        assert getattr(read, name) == getattr(loaded, name), name
