"""Tokenizers of every family: truncation, languages, task prefixes, checks against the embedding."""

import shutil

import pytest
import torch

from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.models import families, loading, tokenization
from raydistill.models.saving import save_checkpoint
from raydistill.models.teacher import open_teacher
from raydistill.models.vocabulary import trim_tokenizer
from tests.factories.models import FAMILIES, LANGUAGES, edit_config, edit_json, save_tiny, sentences


@pytest.mark.parametrize("family", FAMILIES)
def test_truncated_targets_keep_their_end_tokens(tiny, family):
    tokenizer = tokenization.load_tokenizer(tiny[family])
    texts = sentences(4, seed=1)
    whole = tokenization.tokenize_targets(tokenizer, texts, 100)
    cut = tokenization.tokenize_targets(tokenizer, texts, 6)
    tail = 2 if family == "mbart" else 1  # mBART's targets end with </s> and the language
    for long, short in zip(whole, cut, strict=True):
        assert len(short) == 6 < len(long)
        assert short[:-tail] == long[: 6 - tail]
        assert short[-tail:] == long[-tail:]
        assert short[-tail] == tokenizer.eos_token_id
    assert tokenizer.batch_decode(whole, skip_special_tokens=True) == texts


@pytest.mark.parametrize("family", FAMILIES)
def test_tokenization_of_no_texts_and_of_an_empty_text(tiny, family):
    tokenizer = tokenization.load_tokenizer(tiny[family])
    for tokenize in (tokenization.tokenize_sources, tokenization.tokenize_targets):
        assert tokenize(tokenizer, [], 9) == []
        [ids] = tokenize(tokenizer, [""], 9)
        assert tokenizer.eos_token_id in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == ""


def test_mbart_languages_mark_source_and_target_and_start_the_decoder(tiny):
    tokenizer = tokenization.load_tokenizer(tiny["mbart"], ("de_DE", "fr_XX"))
    code = tokenizer.convert_tokens_to_ids
    assert tokenization.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")
    assert tokenization.tokenize_targets(tokenizer, ["a"], 9)[0][-1] == code("fr_XX")
    assert tokenization.tokenize_sources(tokenizer, ["a"], 9)[0][-1] == code("de_DE")  # and back again
    model = loading.load_model(tiny["mbart"])
    tokenization.set_target_language(model, tokenizer)
    assert model.config.decoder_start_token_id == code("fr_XX")
    assert model.generation_config.decoder_start_token_id == code("fr_XX")


@pytest.mark.parametrize(
    ("family", "languages", "tokens"),
    [
        ("mbart50", ("de_DE", "fr_XX"), ("de_DE", "fr_XX")),
        ("m2m100", ("de", "fr"), ("__de__", "__fr__")),
        ("nllb", ("deu_Latn", "fra_Latn"), ("deu_Latn", "fra_Latn")),
    ],
)
def test_languages_begin_source_and_target_and_are_forced(tiny, family, languages, tokens):
    tokenizer = tokenization.load_tokenizer(tiny[family], languages)
    source, target = map(tokenizer.convert_tokens_to_ids, tokens)
    assert tokenizer.unk_token_id not in (source, target)
    for _ in range(2):  # and back again
        [source_ids] = tokenization.tokenize_sources(tokenizer, ["the old man"], 9)
        [target_ids] = tokenization.tokenize_targets(tokenizer, ["the old man"], 9)
        assert (source_ids[0], source_ids[-1]) == (source, tokenizer.eos_token_id)
        assert (target_ids[0], target_ids[-1]) == (target, tokenizer.eos_token_id)
        assert source_ids[1:] == target_ids[1:]
    model = loading.load_model(tiny[family])
    tokenization.set_target_language(model, tokenizer)
    assert model.generation_config.forced_bos_token_id == target
    assert model.config.decoder_start_token_id == tokenizer.eos_token_id
    assert tokenization.load_target_generation_config(tiny[family], languages).forced_bos_token_id == target
    shifted = families.shift_right(model, torch.tensor([target_ids, [*target_ids[:-2], -100, -100]]))
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    assert shifted[0].tolist() == [end, *target_ids[:-1]]
    if family != "mbart50":  # the start token of mBART is the last token of the labels
        assert shifted[1].tolist() == [end, *target_ids[:-2], pad][: len(target_ids)]


@pytest.mark.parametrize("family", LANGUAGES)
def test_target_language_defaults_to_the_first_token_of_the_checkpoint(tiny, family):
    tokenizer = tokenization.load_tokenizer(tiny[family])
    assert (tokenizer.src_lang, tokenizer.tgt_lang) == LANGUAGES[family]


def test_unknown_language_is_named_in_the_error(tiny):
    with pytest.raises(UserError, match=r"unknown language 'xx_YY'; the tokenizer knows .*ro_RO"):
        tokenization.load_tokenizer(tiny["mbart"], ("en_XX", "xx_YY"))
    with pytest.raises(UserError, match=r"unknown language '__de__'; the tokenizer knows af, am, ar"):
        tokenization.load_tokenizer(tiny["m2m100"], ("en", "__de__"))


def test_published_multilingual_checkpoint_needs_languages(tiny, tmp_path):
    folder = tmp_path / "nllb"
    shutil.copytree(tiny["nllb"], folder)
    (folder / "generation_config.json").write_text('{"max_length": 200, "decoder_start_token_id": 2}')
    with pytest.raises(UserError, match=r"names no languages; set `languages: \[ace_Arab, ace_Latn\]`.*zul_Latn"):
        tokenization.load_tokenizer(folder)
    assert tokenization.load_tokenizer(folder, ("eng_Latn", "deu_Latn")).tgt_lang == "deu_Latn"


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_tokenizer_is_an_error(tiny, family, tmp_path):
    folder = tmp_path / family
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copy(tiny[family] / name, folder)
    with pytest.raises(UserError, match="tokenizer"):
        tokenization.load_tokenizer(folder)


def test_tokenizer_larger_than_the_embedding_is_an_error(bart):
    edit_config(bart, vocab_size=320)
    with pytest.raises(UserError, match="knows 11 tokens beyond the embedding's 320 rows"):
        tokenization.load_tokenizer(bart)


def test_embedding_padded_beyond_the_tokenizer_is_accepted(tmp_path):
    folder = save_tiny("t5", tmp_path, padded_rows=7)
    rows = loading.load_model(folder).config.vocab_size
    assert rows == len(tokenization.load_tokenizer(folder)) + 7


def test_mask_token_without_an_embedding_row_is_read_as_characters(bart):
    """facebook/bart-large-xsum and -cnn: 50264 rows, and <mask> is token 50264."""
    rows = loading.load_config(bart).vocab_size - 1
    edit_config(bart, vocab_size=rows)
    [ids] = tokenization.tokenize_sources(tokenization.load_tokenizer(bart), ["a <mask> b"], 50)
    assert max(ids) < rows


def test_t5_uses_the_prefix_of_its_task_and_students_inherit_it(tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    tasks = {"summarization": {"prefix": "summarize: "}, "translation_en_to_ro": {"prefix": "to Romanian: "}}
    edit_config(folder, task_specific_params=tasks)
    plain = tokenization.load_tokenizer(tiny["t5"])
    [expected] = tokenization.tokenize_sources(plain, ["summarize: the old man"], 99)
    summarize = tokenization.load_tokenizer(folder)
    assert tokenization.tokenize_sources(summarize, ["the old man"], 99) == [expected]
    assert tokenization.tokenize_targets(summarize, ["the old man"], 99) == tokenization.tokenize_targets(
        plain, ["the old man"], 99
    )
    translate = tokenization.load_tokenizer(folder, ("en", "ro"))
    assert tokenization.tokenize_sources(translate, ["a"], 99) == tokenization.tokenize_sources(
        plain, ["to Romanian: a"], 99
    )
    model = loading.load_model(folder)
    model.save_pretrained(tmp_path / "student")
    translate.save_pretrained(tmp_path / "student")
    student = tokenization.load_tokenizer(tmp_path / "student")
    assert tokenization.source_prefix(student) == "to Romanian: "  # whatever languages it is loaded with
    student = tokenization.load_tokenizer(tmp_path / "student", ("en", "de"))
    assert tokenization.source_prefix(student) == "to Romanian: "


@pytest.mark.parametrize("prefix", ["headline: ", ""])
def test_prefix_of_the_data_set_replaces_that_of_the_task_and_is_kept_by_students(prefix, tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    edit_config(folder, task_specific_params={"summarization": {"prefix": "summarize: "}})
    teacher = open_teacher(str(folder), Dataset(name="mine", source_prefix=prefix))
    plain = tokenization.load_tokenizer(tiny["t5"])
    expected = tokenization.tokenize_sources(plain, [f"{prefix}the old man"], 99)
    save_checkpoint(teacher.model, teacher.tokenizer, tmp_path / "student")
    trimmed = trim_tokenizer(teacher.tokenizer, range(len(teacher.tokenizer)))
    for tokenizer in (teacher.tokenizer, trimmed, tokenization.load_tokenizer(tmp_path / "student")):
        assert tokenization.tokenize_sources(tokenizer, ["the old man"], 99) == expected
    other = open_teacher(str(folder), Dataset(name="mine"))
    assert tokenization.source_prefix(other.tokenizer) == "summarize: "


def test_prefix_that_is_no_text_is_a_user_error(tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    edit_json(folder / "tokenizer_config.json", source_prefix=["summarize: "])
    with pytest.raises(UserError, match=r"t5: source_prefix in tokenizer_config.json is not a text"):
        tokenization.load_tokenizer(folder)


def test_madlad_reads_the_target_language_from_a_token_before_the_source(tiny, tmp_path):
    folder = tmp_path / "madlad"
    shutil.copytree(tiny["madlad400"], folder)
    edit_json(folder / "tokenizer_config.json", source_prefix=None)  # as published
    german = tokenization.load_tokenizer(folder, ("en", "de"))
    [ids] = tokenization.tokenize_sources(german, ["the old man"], 99)
    assert german.convert_tokens_to_ids("<2de>") == ids[0]
    assert ids[1:] == german("the old man").input_ids
    chinese = tokenization.load_tokenizer(folder, source_prefix="<2zh_Hant> ")
    [ids] = tokenization.tokenize_sources(chinese, ["the old man"], 99)
    assert ids[0] == chinese.convert_tokens_to_ids("<2zh_Hant>")
    chinese.save_pretrained(folder)
    assert tokenization.source_prefix(tokenization.load_tokenizer(folder)) == "<2zh_Hant> "


def test_madlad_without_a_target_language_or_with_an_unknown_one_is_refused(tiny, tmp_path):
    folder = tmp_path / "madlad"
    shutil.copytree(tiny["madlad400"], folder)
    edit_json(folder / "tokenizer_config.json", source_prefix=None)
    with pytest.raises(
        UserError, match=r"set `languages` of the data set, as \[en, de\], or `source_prefix: '<2de> '`"
    ):
        tokenization.load_tokenizer(folder)
    with pytest.raises(UserError, match=r"there is no token <2zh_Hans>; did you mean 'zh_Hant'"):
        tokenization.load_tokenizer(folder, ("en", "zh_Hans"))
    assert tokenization.source_prefix(tokenization.load_tokenizer(folder, source_prefix="")) == ""


@pytest.mark.parametrize(
    ("teacher", "dataset", "expected"),
    [
        ("/a/folder", Dataset(name="mine"), None),
        ("/a/folder", Dataset(name="mine", languages=["en_XX", "de_DE"]), ("en_XX", "de_DE")),
        ("/a/folder", Dataset(name="wmt16_en_ro"), ("en_XX", "ro_RO")),
        ("mbart", Dataset(name="mine"), ("en_XX", "ro_RO")),
        ("nllb", Dataset(name="mine"), None),  # 200 languages
        ("nllb", Dataset(name="wmt16_en_ro"), ("eng_Latn", "ron_Latn")),
        ("madlad400", Dataset(name="wmt16_en_ro"), ("en", "ro")),
        ("madlad400", Dataset(name="mine"), None),  # more than 400 languages
        ("t5", Dataset(name="wmt16_en_ro"), ("en", "ro")),
        ("t5", Dataset(name="mine"), None),  # its first preset summarizes
        ("t5", Dataset(name="mine", languages=["en", "de"]), ("en", "de")),
    ],
)
def test_languages_of_the_data_set_precede_those_of_the_preset(teacher, dataset, expected):
    assert tokenization.resolve_languages(teacher, dataset) == expected


def test_teacher_by_path_uses_the_languages_of_the_data_set(tiny):
    teacher = open_teacher(str(tiny["mbart"]), Dataset(name="mine", languages=("de_DE", "fr_XX")))
    code = teacher.tokenizer.convert_tokens_to_ids
    assert tokenization.tokenize_sources(teacher.tokenizer, ["a"], 9)[0][-1] == code("de_DE")
    assert teacher.model.generation_config.decoder_start_token_id == code("fr_XX")


def test_t5_without_a_task_for_the_languages_lists_its_tasks(tiny, tmp_path):
    folder = tmp_path / "t5"
    shutil.copytree(tiny["t5"], folder)
    edit_config(folder, task_specific_params={"translation_en_to_ro": {"prefix": "to Romanian: "}})
    with pytest.raises(UserError, match=r"no task translation_en_to_de; this T5 knows translation_en_to_ro"):
        open_teacher(str(folder), Dataset(name="mine", languages=("en", "de")))


def test_pegasus_reads_and_writes_line_breaks_of_targets_as_its_token(tmp_path, tiny):
    """google-research/pegasus replaces "\\n" by "<n>"; PegasusTokenizer alone reads a line break as a space."""
    lines = "The old man.\nMy brother sees the harbour.\n\nNo one."
    tokenizer = tokenization.load_tokenizer(save_tiny("pegasus", tmp_path / "pegasus", line_breaks=True))
    [ids] = tokenization.tokenize_targets(tokenizer, [lines], 100)
    assert ids.count(tokenizer.convert_tokens_to_ids("<n>")) == 3
    assert tokenizer.unk_token_id not in ids
    assert tokenization.decode_text(tokenizer, ids) == lines
    assert "<n>" in tokenizer.decode(ids)
    # Vocabularies without the token, and sources, are read as by the tokenizer alone
    plain = tokenization.load_tokenizer(tiny["pegasus"])
    assert tokenization.tokenize_targets(plain, [lines], 100) == plain([lines]).input_ids
    assert tokenization.tokenize_sources(tokenizer, [lines], 100) == tokenizer([lines]).input_ids


def test_other_families_join_lines_only_on_request(tiny):
    tokenizer = tokenization.load_tokenizer(tiny["bart"])
    two_lines, one_line = ["The old man.\nNo one."], ["The old man. No one."]
    joined = tokenization.tokenize_targets(tokenizer, two_lines, 100, join_lines=True)
    assert joined == tokenization.tokenize_targets(tokenizer, one_line, 100)
    [kept] = tokenization.tokenize_targets(tokenizer, two_lines, 100)
    assert tokenization.decode_text(tokenizer, kept) == two_lines[0]


def test_line_break_token_is_known_to_a_trimmed_tokenizer_that_keeps_it(tmp_path):
    tokenizer = tokenization.load_tokenizer(save_tiny("pegasus", tmp_path / "pegasus", line_breaks=True))
    token = tokenizer.convert_tokens_to_ids("<n>")
    all_ids = range(len(tokenizer))
    assert tokenization.line_break(trim_tokenizer(tokenizer, all_ids)) == "<n>"
    assert tokenization.line_break(trim_tokenizer(tokenizer, [i for i in all_ids if i != token])) is None
