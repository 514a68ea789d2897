import hashlib
import json
import shutil
import time
from pathlib import Path

import pytest
import torch
from transformers import BartConfig, T5Config

from raydistill.config.errors import UserError
from raydistill.model import teachers
from tests.tiny import FAMILIES, lay_out_model, save_tiny, sentences


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("tiny")
    return {family: save_tiny(family, place / family, logits_bias=family != "t5") for family in FAMILIES}


@pytest.fixture
def bart(tiny, tmp_path) -> Path:
    """A copy to damage."""
    shutil.copytree(tiny["bart"], tmp_path / "bart")
    return tmp_path / "bart"


def edit_config(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_loads_and_a_model_and_its_folder_have_one_fingerprint(tiny, family):
    model = teachers.load_model(tiny[family])
    assert not model.training
    assert model.dtype == torch.float32
    assert teachers.fingerprint(model) == teachers.fingerprint(tiny[family])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert teachers.fingerprint(model) != teachers.fingerprint(tiny[family])


def test_fingerprint_is_sha256_of_names_types_shapes_and_bytes(tmp_path):
    from safetensors.torch import save_file

    b, a = torch.tensor([[1.0, 2.0]]), torch.tensor([3], dtype=torch.int64)
    save_file({"b": b, "a": a}, tmp_path / "model.safetensors")
    by_hand = b"a torch.int64 (1,)\n" + (3).to_bytes(8, "little")
    by_hand += b"b torch.float32 (1, 2)\n" + bytes.fromhex("0000803f00000040")
    assert teachers.fingerprint(tmp_path) == hashlib.sha256(by_hand).hexdigest()[:16]


def test_bf16_can_be_loaded_and_fingerprinted(tiny):
    model = teachers.load_model(tiny["bart"], torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert teachers.fingerprint(model) != teachers.fingerprint(tiny["bart"])


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_targets_keep_their_end(tiny, family):
    tokenizer = teachers.load_tokenizer(tiny[family])
    texts = sentences(4, seed=1)
    whole = teachers.tokenize_targets(tokenizer, texts, 100)
    cut = teachers.tokenize_targets(tokenizer, texts, 6)
    tail = 2 if family == "mbart" else 1  # mBART's targets end with </s> and the language
    for long, short in zip(whole, cut, strict=True):
        assert len(short) == 6 < len(long)
        assert short[:-tail] == long[: 6 - tail]
        assert short[-tail:] == long[-tail:]
        assert short[-tail] == tokenizer.eos_token_id
    assert tokenizer.batch_decode(whole, skip_special_tokens=True) == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_no_texts_and_an_empty_text_are_fine(tiny, family):
    tokenizer = teachers.load_tokenizer(tiny[family])
    for tokenize in (teachers.tokenize_sources, teachers.tokenize_targets):
        assert tokenize(tokenizer, [], 9) == []
        [ids] = tokenize(tokenizer, [""], 9)
        assert tokenizer.eos_token_id in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_mbart_languages_mark_source_and_target_and_start_the_decoder(tiny):
    tokenizer = teachers.load_tokenizer(tiny["mbart"], ("de_DE", "fr_XX"))
    code = tokenizer.convert_tokens_to_ids
    assert teachers.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")
    assert teachers.tokenize_targets(tokenizer, ["a"], 9)[0][-1] == code("fr_XX")
    assert teachers.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")  # and back again
    model = teachers.load_model(tiny["mbart"])
    teachers.set_languages(model, tokenizer)
    assert model.config.decoder_start_token_id == code("fr_XX")
    assert model.generation_config.decoder_start_token_id == code("fr_XX")


def test_mbart_without_languages_takes_the_target_that_the_checkpoint_starts_with(tiny):
    tokenizer = teachers.load_tokenizer(tiny["mbart"])
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "ro_RO")


def test_an_unknown_language_is_named(tiny):
    with pytest.raises(UserError, match=r"unknown language 'xx_YY'; it knows .*ro_RO"):
        teachers.load_tokenizer(tiny["mbart"], ("en_XX", "xx_YY"))


def test_a_truncated_weight_file_is_named(bart):
    weights = bart / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or truncated"):
        teachers.load_model(bart)
    with pytest.raises(UserError, match="damaged or truncated"):
        teachers.fingerprint(bart)


def test_pickled_weights_are_refused_with_the_way_to_convert_them(bart):
    (bart / "model.safetensors").rename(bart / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"only pickled weights \(pytorch_model\.bin\).*save_pretrained"):
        teachers.load_model(bart)


def test_a_missing_shard_is_named(bart):
    (bart / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (bart / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        teachers.load_model(bart)


def test_shards_are_read(tiny, tmp_path):
    model = teachers.load_model(tiny["bart"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(teachers.weight_files(tmp_path)) > 1
    assert teachers.fingerprint(tmp_path) == teachers.fingerprint(model)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"decoder_layers": 4}, r"26 are missing, such as model\.decoder\.layers\.3"),
        ({"d_model": 20}, r"have another shape, such as .*16.*20"),
        ({"model_type": "gpt2"}, "'gpt2'; supported are .*bart, pegasus, mbart, marian, t5"),
    ],
)
def test_weights_that_do_not_fit_are_never_made_up(bart, changes, message):
    edit_config(bart, **changes)
    with pytest.raises(UserError, match=message):
        teachers.load_model(bart)


def test_a_config_that_is_no_json_is_named(bart):
    (bart / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        teachers.load_config(bart)
    (bart / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        teachers.load_config(bart)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_not_replaced_by_an_empty_one(tiny, family, tmp_path):
    folder = tmp_path / family
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny[family] / name, folder)
    with pytest.raises(UserError, match="tokenizer"):
        teachers.load_tokenizer(folder)


def test_a_tokenizer_larger_than_the_table_is_refused(bart):
    edit_config(bart, vocab_size=320)
    with pytest.raises(UserError, match="knows 11 tokens beyond the embedding's 320 rows"):
        teachers.load_tokenizer(bart)


def test_a_table_padded_beyond_the_tokenizer_is_fine(tmp_path):
    folder = save_tiny("t5", tmp_path, padded_rows=7)
    rows = teachers.load_model(folder).config.vocab_size
    assert rows == len(teachers.load_tokenizer(folder)) + 7


def test_barts_mask_beyond_the_table_is_read_as_characters(bart):
    """facebook/bart-large-xsum and -cnn: 50264 rows, and <mask> is token 50264."""
    rows = teachers.load_config(bart).vocab_size - 1
    edit_config(bart, vocab_size=rows)
    [ids] = teachers.tokenize_sources(teachers.load_tokenizer(bart), ["a <mask> b"], 50)
    assert max(ids) < rows


def test_max_positions():
    assert teachers.max_positions(BartConfig(max_position_embeddings=77)) == 77
    assert teachers.max_positions(T5Config()) is None


def test_locate(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    assert teachers.locate("bart", "cnn_dailymail") == "facebook/bart-large-cnn"
    assert teachers.locate("some/where", "xsum") == "some/where"
    with pytest.raises(UserError, match=r"python -m raydistill\.train demo"):
        teachers.locate("demo", "demo")
    best = tmp_path / "runs" / "demo-teacher" / "best"
    best.mkdir(parents=True)
    assert teachers.locate("demo", "demo") == str(best)


@pytest.mark.parametrize("where", ["nowhere", "/no/such/folder", "../nowhere"])
def test_no_such_folder(where):
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        teachers.load_config(where)


def test_a_file_is_no_checkpoint(bart):
    with pytest.raises(UserError, match="is a file"):
        teachers.load_config(bart / "config.json")


@pytest.fixture
def offline(tmp_path, monkeypatch) -> Path:
    """An empty hub cache of our own, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "hub"


def test_offline_a_model_that_is_not_cached_fails_at_once(offline):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"HF_HUB_OFFLINE is set and it is not in the local cache"):
        teachers.load_model("facebook/bart-large-xsum")
    assert time.monotonic() - start < 2


def test_offline_a_cached_model_loads_by_its_hub_name(offline, tiny):
    lay_out_model(offline, "someone/tiny-bart", tiny["bart"])
    model = teachers.load_model("someone/tiny-bart")
    assert teachers.fingerprint(model) == teachers.fingerprint(tiny["bart"])
    assert len(teachers.load_tokenizer("someone/tiny-bart")) == model.config.vocab_size
