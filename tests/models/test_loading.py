import hashlib
import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BartConfig, T5Config

from raydistill.config.presets import TEACHERS
from raydistill.config.run import Dataset, Run
from raydistill.core.errors import UserError
from raydistill.core.files import CHECKPOINT_METADATA
from raydistill.evaluate import training_languages
from raydistill.models import loading
from raydistill.models.hub import hub_commit, weight_files
from raydistill.models.teacher import open_teacher
from tests.factories.models import FAMILIES, lay_out_model, save_tiny, sentences
from tests.factories.workspace import command, corpus_rows, last_json


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
    model = loading.load_model(tiny[family])
    assert not model.training
    assert model.dtype == torch.float32
    assert loading.weights_fingerprint(model) == loading.weights_fingerprint(tiny[family])
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1
    assert loading.weights_fingerprint(model) != loading.weights_fingerprint(tiny[family])


def test_fingerprint_is_sha256_of_names_types_shapes_and_bytes(tmp_path):
    from safetensors.torch import save_file

    b, a = torch.tensor([[1.0, 2.0]]), torch.tensor([3], dtype=torch.int64)
    save_file({"b": b, "a": a}, tmp_path / "model.safetensors")
    by_hand = b"a torch.int64 (1,)\n" + (3).to_bytes(8, "little")
    by_hand += b"b torch.float32 (1, 2)\n" + bytes.fromhex("0000803f00000040")
    assert loading.weights_fingerprint(tmp_path) == hashlib.sha256(by_hand).hexdigest()[:16]


def test_bf16_can_be_loaded_and_fingerprinted(tiny):
    model = loading.load_model(tiny["bart"], torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert loading.weights_fingerprint(model) != loading.weights_fingerprint(tiny["bart"])


def test_a_teachers_key_covers_what_its_forward_pass_hangs_on(tmp_path):
    place = save_tiny("bart", tmp_path / "t")
    key = loading.teacher_key(place)
    beside = {"transformers_version": "4.1", "num_beams": 7, "max_length": 9, "dtype": "bfloat16", "use_cache": False}
    edit_config(place, **beside)
    assert loading.teacher_key(place) == key
    changes: dict[str, Any] = {"scale_embedding": True, "activation_function": "relu", "decoder_start_token_id": 0}
    keys = {key}
    for name, value in changes.items():
        edit_config(place, **{name: value})
        keys.add(loading.teacher_key(place))
    assert len(keys) == 4
    t5 = save_tiny("t5", tmp_path / "t5")
    before = loading.teacher_key(t5)
    edit_config(t5, layer_norm_epsilon=1e-3)
    assert loading.teacher_key(t5) != before
    other = save_tiny("bart", tmp_path / "o", seed=1)
    assert loading.teacher_key(other) != key


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_targets_keep_their_end(tiny, family):
    tokenizer = loading.load_tokenizer(tiny[family])
    texts = sentences(4, seed=1)
    whole = loading.tokenize_targets(tokenizer, texts, 100)
    cut = loading.tokenize_targets(tokenizer, texts, 6)
    tail = 2 if family == "mbart" else 1  # mBART's targets end with </s> and the language
    for long, short in zip(whole, cut, strict=True):
        assert len(short) == 6 < len(long)
        assert short[:-tail] == long[: 6 - tail]
        assert short[-tail:] == long[-tail:]
        assert short[-tail] == tokenizer.eos_token_id
    assert tokenizer.batch_decode(whole, skip_special_tokens=True) == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_no_texts_and_an_empty_text_are_fine(tiny, family):
    tokenizer = loading.load_tokenizer(tiny[family])
    for tokenize in (loading.tokenize_sources, loading.tokenize_targets):
        assert tokenize(tokenizer, [], 9) == []
        [ids] = tokenize(tokenizer, [""], 9)
        assert tokenizer.eos_token_id in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_mbart_languages_mark_source_and_target_and_start_the_decoder(tiny):
    tokenizer = loading.load_tokenizer(tiny["mbart"], ("de_DE", "fr_XX"))
    code = tokenizer.convert_tokens_to_ids
    assert loading.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")
    assert loading.tokenize_targets(tokenizer, ["a"], 9)[0][-1] == code("fr_XX")
    assert loading.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")  # and back again
    model = loading.load_model(tiny["mbart"])
    loading.set_target_language(model, tokenizer)
    assert model.config.decoder_start_token_id == code("fr_XX")
    assert model.generation_config.decoder_start_token_id == code("fr_XX")


def test_mbart_without_languages_takes_the_target_that_the_checkpoint_starts_with(tiny):
    tokenizer = loading.load_tokenizer(tiny["mbart"])
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "ro_RO")


def test_an_unknown_language_is_named(tiny):
    with pytest.raises(UserError, match=r"unknown language 'xx_YY'; it knows .*ro_RO"):
        loading.load_tokenizer(tiny["mbart"], ("en_XX", "xx_YY"))


def test_a_truncated_weight_file_is_named(bart):
    weights = bart / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model\.safetensors: damaged or truncated"):
        loading.load_model(bart)
    with pytest.raises(UserError, match="damaged or truncated"):
        loading.weights_fingerprint(bart)


def pickle_instead(folder: Path, state: dict) -> Path:
    """Put a pickled `state` in place of a checkpoint's safetensors."""
    (folder / "model.safetensors").unlink()
    torch.save(state, folder / "pytorch_model.bin")
    return folder / "pytorch_model.bin"


@pytest.mark.parametrize("family", FAMILIES)
def test_pickled_weights_are_converted_once_and_are_the_same_model(family, tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    folder = tmp_path / family
    shutil.copytree(tiny[family], folder)
    pickled = pickle_instead(folder, loading.load_model(tiny[family]).state_dict())
    assert loading.weights_fingerprint(loading.load_model(folder)) == loading.weights_fingerprint(tiny[family])
    [made] = (tmp_path / "home" / "cache" / "safetensors").glob("*/model.safetensors")
    before = made.stat().st_mtime_ns
    assert loading.weights_fingerprint(folder) == loading.weights_fingerprint(tiny[family])
    assert len(loading.load_tokenizer(folder)) == len(loading.load_tokenizer(tiny[family]))
    assert made.stat().st_mtime_ns == before
    assert sorted(p.name for p in folder.iterdir() if p != pickled) == sorted(
        p.name for p in tiny[family].iterdir() if p.name != "model.safetensors"
    )


class Malicious:
    """What an attacker puts into a pickle: opened carelessly, it makes the file `marker`."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("kind", ["code", "object", "truncated", "incomplete"])
def test_any_other_pickle_is_refused_and_none_of_it_is_run(kind, bart, tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path / "home"))
    state = dict(loading.load_model(bart).state_dict())
    marker = tmp_path / "was_run"
    if kind == "code":
        pickle_instead(bart, {**state, "lm_head.bias": Malicious(marker)})
        torch.load(bart / "pytorch_model.bin", weights_only=False)
        assert marker.exists(), "opened carelessly, this pickle does run code"
        marker.unlink()
    elif kind == "object":
        pickle_instead(bart, {**state, "step": 3})
    elif kind == "truncated":
        pickled = pickle_instead(bart, state)
        pickled.write_bytes(pickled.read_bytes()[:-1000])
    else:
        del state["model.encoder.layers.0.fc1.weight"]
        pickle_instead(bart, state)
    message = r"1 are missing, such as .*fc1" if kind == "incomplete" else r"pytorch_model\.bin: refused"
    with pytest.raises(UserError, match=message):
        loading.load_model(bart)
    assert not marker.exists()
    assert not list((tmp_path / "home").rglob("*.safetensors"))


def test_a_missing_shard_is_named(bart):
    (bart / "model.safetensors").unlink()
    index = {"weight_map": {"x": "model-00001-of-00002.safetensors"}}
    (bart / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"model-00001-of-00002\.safetensors is missing"):
        loading.load_model(bart)


def test_shards_are_read(tiny, tmp_path):
    model = loading.load_model(tiny["bart"])
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    assert len(weight_files(tmp_path)) > 1
    assert loading.weights_fingerprint(tmp_path) == loading.weights_fingerprint(model)


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
        loading.load_model(bart)


def test_a_config_that_is_no_json_is_named(bart):
    (bart / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: not valid JSON"):
        loading.load_config(bart)
    (bart / "config.json").unlink()
    with pytest.raises(UserError, match=r"has no config\.json"):
        loading.load_config(bart)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_missing_tokenizer_is_not_replaced_by_an_empty_one(tiny, family, tmp_path):
    folder = tmp_path / family
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny[family] / name, folder)
    with pytest.raises(UserError, match="tokenizer"):
        loading.load_tokenizer(folder)


def test_a_tokenizer_larger_than_the_table_is_refused(bart):
    edit_config(bart, vocab_size=320)
    with pytest.raises(UserError, match="knows 11 tokens beyond the embedding's 320 rows"):
        loading.load_tokenizer(bart)


def test_a_table_padded_beyond_the_tokenizer_is_fine(tmp_path):
    folder = save_tiny("t5", tmp_path, padded_rows=7)
    rows = loading.load_model(folder).config.vocab_size
    assert rows == len(loading.load_tokenizer(folder)) + 7


def test_barts_mask_beyond_the_table_is_read_as_characters(bart):
    """facebook/bart-large-xsum and -cnn: 50264 rows, and <mask> is token 50264."""
    rows = loading.load_config(bart).vocab_size - 1
    edit_config(bart, vocab_size=rows)
    [ids] = loading.tokenize_sources(loading.load_tokenizer(bart), ["a <mask> b"], 50)
    assert max(ids) < rows


def test_max_positions():
    assert loading.max_positions(BartConfig(max_position_embeddings=77)) == 77
    assert loading.max_positions(T5Config()) is None


def test_locate(tmp_path, monkeypatch):
    monkeypatch.setenv("RAYDISTILL_HOME", str(tmp_path))
    pinned = "facebook/bart-large-cnn@37f520fa929c961707657b28798b30c003dd100b"
    assert loading.locate_checkpoint("bart", "cnn_dailymail") == pinned
    assert loading.locate_checkpoint("bart", "xsum") == "facebook/bart-large-xsum@main"
    assert loading.locate_checkpoint("some/where", "xsum") == "some/where"
    with pytest.raises(UserError, match=r"python -m raydistill\.train demo"):
        loading.locate_checkpoint("demo", "demo")
    best = tmp_path / "runs" / "demo-teacher" / "best"
    best.mkdir(parents=True)
    assert loading.locate_checkpoint("demo", "demo") == str(best)


@pytest.mark.parametrize("where", ["nowhere", "/no/such/folder", "../nowhere"])
def test_no_such_folder(where):
    with pytest.raises(UserError, match="no such folder, and not a hub name"):
        loading.load_config(where)


def test_a_file_is_no_checkpoint(bart):
    with pytest.raises(UserError, match="is a file"):
        loading.load_config(bart / "config.json")


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
        loading.load_model("facebook/bart-large-xsum")
    assert time.monotonic() - start < 2


def test_offline_a_cached_model_loads_by_its_hub_name(offline, tiny):
    lay_out_model(offline, "someone/tiny-bart", tiny["bart"])
    model = loading.load_model("someone/tiny-bart")
    assert loading.weights_fingerprint(model) == loading.weights_fingerprint(tiny["bart"])
    assert len(loading.load_tokenizer("someone/tiny-bart")) == model.config.vocab_size


def test_offline_a_branch_is_told_by_the_commit_it_stands_for(offline, tiny):
    sha = lay_out_model(offline, "someone/tiny-bart", tiny["bart"])
    assert hub_commit("someone/tiny-bart@main") == hub_commit("someone/tiny-bart") == sha
    assert hub_commit(tiny["bart"]) is None


@pytest.mark.parametrize("family", FAMILIES)
def test_offline_each_named_teacher_loads_from_the_hubs_cache(family, offline, tiny):
    for dataset, preset in TEACHERS[family].items():
        lay_out_model(offline, preset.hub, tiny[family], preset.revision)
        where = loading.locate_checkpoint(family, dataset)
        assert loading.weights_fingerprint(loading.load_model(where)) == loading.weights_fingerprint(tiny[family])
        tokenizer = loading.load_tokenizer(where, preset.languages)
        if family == "mbart":
            assert (tokenizer.src_lang, tokenizer.tgt_lang) == ("en_XX", "ro_RO")


def test_a_preset_decodes_as_the_reference_says():
    """Typed from ../shared/reference/README.md, apart from the code."""
    table = {
        ("bart", "xsum"): (6, 1.0, 11, 62, None, 1024),
        ("bart", "cnn_dailymail"): (4, 2.0, 56, 142, 3, 1024),
        ("pegasus", "xsum"): (8, 0.6, None, 64, None, 512),
        ("pegasus", "cnn_dailymail"): (8, 0.8, None, 128, None, 1024),
        ("mbart", "wmt16_en_ro"): (5, 1.0, None, 128, None, 128),
        ("marian", "wmt16_en_ro"): (4, 1.0, None, 128, None, 128),
    }
    for (family, dataset), wanted in table.items():
        preset = TEACHERS[family][dataset]
        d = preset.decoding
        found = (d.beams, d.length_penalty, d.min_length, d.max_length, d.no_repeat_ngram, preset.max_source_tokens)
        assert found == wanted, (family, dataset)


def test_t5_reads_its_tasks_prefix_and_hands_it_on(tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    tasks = {"summarization": {"prefix": "summarize: "}, "translation_en_to_ro": {"prefix": "to Romanian: "}}
    edit_config(folder, task_specific_params=tasks)
    plain = loading.load_tokenizer(tiny["t5"])
    [wanted] = loading.tokenize_sources(plain, ["summarize: the old man"], 99)
    summarize = loading.load_tokenizer(folder)
    assert loading.tokenize_sources(summarize, ["the old man"], 99) == [wanted]
    assert loading.tokenize_targets(summarize, ["the old man"], 99) == loading.tokenize_targets(
        plain, ["the old man"], 99
    )
    translate = loading.load_tokenizer(folder, ("en", "ro"))
    assert loading.tokenize_sources(translate, ["a"], 99) == loading.tokenize_sources(plain, ["to Romanian: a"], 99)
    model = loading.load_model(folder)
    model.save_pretrained(tmp_path / "student")
    translate.save_pretrained(tmp_path / "student")
    student = loading.load_tokenizer(tmp_path / "student")
    assert loading.tokenize_sources(student, ["the old man"], 99) == [wanted]


@pytest.mark.parametrize(
    ("teacher", "dataset", "wanted"),
    [
        ("/a/folder", Dataset(name="mine"), None),
        ("/a/folder", Dataset(name="mine", languages=["en_XX", "de_DE"]), ("en_XX", "de_DE")),
        ("/a/folder", Dataset(name="wmt16_en_ro"), ("en_XX", "ro_RO")),
        ("mbart", Dataset(name="mine"), ("en_XX", "ro_RO")),
        ("t5", Dataset(name="wmt16_en_ro"), ("en", "ro")),
        ("t5", Dataset(name="mine"), None),  # its first preset summarizes
        ("t5", Dataset(name="mine", languages=["en", "de"]), ("en", "de")),
    ],
)
def test_the_data_sets_languages_go_before_the_presets(teacher, dataset, wanted):
    assert loading.resolve_languages(teacher, dataset) == wanted


def test_a_teacher_by_path_reads_and_writes_the_data_sets_languages(tiny):
    teacher = open_teacher(str(tiny["mbart"]), Dataset(name="mine", languages=("de_DE", "fr_XX")))
    code = teacher.tokenizer.convert_tokens_to_ids
    assert loading.tokenize_sources(teacher.tokenizer, ["a"], 9)[0][-1] == code("de_DE")
    assert teacher.model.generation_config.decoder_start_token_id == code("fr_XX")


def test_a_t5_without_a_task_for_the_languages_says_which_it_has(tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    edit_config(folder, task_specific_params={"translation_en_to_ro": {"prefix": "to Romanian: "}})
    with pytest.raises(UserError, match=r"no task translation_en_to_de; this T5 knows translation_en_to_ro"):
        open_teacher(str(folder), Dataset(name="mine", languages=("en", "de")))


def test_a_student_is_scored_with_the_languages_it_was_trained_with(tmp_path):
    run = Run(name="r", teacher="t", dataset={"name": "mine", "languages": ["en", "ro"]}, student={"size": "2-1"})
    (tmp_path / CHECKPOINT_METADATA).write_text(json.dumps({"config": run.model_dump(mode="json")}))
    assert training_languages(str(tmp_path), Dataset(name="other")) == ("en", "ro")
    assert training_languages("t5", Dataset(name="wmt16_en_ro")) == ("en", "ro")


def test_pegasus_is_never_computed_in_fp16(tiny):
    from raydistill.inference.engines import open_engine

    with pytest.raises(UserError, match="Pegasus overflows in fp16"):
        open_engine(tiny["pegasus"], precision="fp16")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_pseudolabel_with_a_named_teacher_from_the_hubs_cache_as_a_user_runs_it(weights, tiny, tmp_path):
    """Google's Pegasus has only a `.bin`."""
    preset = TEACHERS["pegasus"]["xsum"]
    folder = tmp_path / "pegasus"
    shutil.copytree(tiny["pegasus"], folder)
    if weights == "pytorch_model.bin":
        pickle_instead(folder, loading.load_model(folder).state_dict())
    lay_out_model(tmp_path / "hub", preset.hub, folder, preset.revision)
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in corpus_rows(12)))
    arguments = ("pseudolabel", "--teacher", "pegasus", "--dataset", file, "--beams", 2, "--json")
    done = last_json(command(tmp_path / "outputs", *arguments, HF_HUB_CACHE=str(tmp_path / "hub")))
    assert done["rows"] == 12
    assert done["teacher"]["commit"] == preset.revision
    assert done["teacher"]["where"] == f"{preset.hub}@{preset.revision}"
    assert done["teacher"]["fingerprint"] == loading.weights_fingerprint(tiny["pegasus"])
    assert (done["decoding"]["beams"], done["decoding"]["length_penalty"]) == (2, 0.6)
