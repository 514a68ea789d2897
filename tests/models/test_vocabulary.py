"""Trimmed vocabularies: texts are split as before, kept tokens have the teacher's logits, any text can be read."""

import functools
from collections import Counter

import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, PreTrainedTokenizerFast

from raydistill.config.run import Decoding, Student
from raydistill.core.errors import UserError
from raydistill.inference.decoding import EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine
from raydistill.models import families
from raydistill.models.loading import load_model
from raydistill.models.saving import save_checkpoint
from raydistill.models.shrinking import plan_layers, shrink
from raydistill.models.tokenization import language_tokens, load_tokenizer, tokenize_sources, tokenize_targets
from raydistill.models.vocabulary import count_tokens, merge_symbols, select_tokens, trim_model, trim_tokenizer
from tests.factories.engines import first_texts
from tests.factories.models import FAMILIES, LANGUAGES, save_tiny, sentences

# Texts with few words: many tokens of the tiny vocabularies do not occur.
TEXTS = ["The old man sees a red bicycle today.", "A young woman sees the old man.", "The red bicycle."]
ANY_TEXTS = ["Ünïcode 😀 text", "Привет, мир", "漢字とかな", "\n\t ", "½ €", "\u200b\x00"]
KINDS = [*FAMILIES, "marian bpe"]


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """The folder of a tiny teacher of each kind."""
    folder = tmp_path_factory.mktemp("teachers")
    tiny = {family: save_tiny(family, folder / family, logits_bias=True) for family in FAMILIES}
    return {**tiny, "marian bpe": save_tiny("marian", folder / "marian-bpe", sentencepiece_type="bpe")}


def load(folder):
    return load_model(folder), load_tokenizer(folder)


def token_rows(tokenizer, texts):
    return tokenize_sources(tokenizer, texts, 1000) + tokenize_targets(tokenizer, texts, 1000)


def trim(folder, size="used", texts=TEXTS):
    """Model, tokenizer and ids of the kept tokens."""
    model, tokenizer = load(folder)
    token_ids = select_tokens(tokenizer, model.config, count_tokens(token_rows(tokenizer, texts)), size)
    return trim_model(model, token_ids), trim_tokenizer(tokenizer, token_ids), token_ids


@functools.cache
def trim_to_used(folder):
    """`trim` to the tokens of `TEXTS`, once per teacher; tests only read the result."""
    return trim(folder)


def logits(model, source, target):
    source, target = torch.tensor([source]), torch.tensor([target])
    with torch.inference_mode():
        return model(
            input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target, use_cache=False
        ).logits[0]


def greedy_texts(engine, texts):
    beam = resolve_decoding(Decoding(beams=1, max_length=20), engine.generation_config, None, 19)
    return first_texts(engine.generate(texts, beam, max_source_tokens=50))


@pytest.mark.parametrize("kind", KINDS)
def test_full_vocabulary_gives_the_same_tokenizer_and_model(teachers, kind):
    model, tokenizer = load(teachers[kind])
    trimmed, trimmed_tokenizer, token_ids = trim(teachers[kind], size=10**6)
    assert token_ids == tuple(range(len(tokenizer)))
    assert trimmed_tokenizer.get_vocab() == tokenizer.get_vocab()
    rows = token_rows(tokenizer, [*sentences(20, seed=9), *ANY_TEXTS])
    assert token_rows(trimmed_tokenizer, [*sentences(20, seed=9), *ANY_TEXTS]) == rows
    for name, tensor in model.state_dict().items():
        assert torch.equal(trimmed.state_dict()[name], tensor), name
    assert trimmed.config.to_dict() == model.config.to_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_used_texts_keep_their_tokens_and_kept_tokens_their_logits(teachers, kind):
    model, tokenizer = load(teachers[kind])
    trimmed, trimmed_tokenizer, token_ids = trim_to_used(teachers[kind])
    tokens, kept = {i: t for t, i in tokenizer.get_vocab().items()}, list(token_ids)
    assert len(kept) < len(tokenizer) - 20
    assert len(trimmed_tokenizer) == trimmed.config.vocab_size == len(kept)
    rows = zip(token_rows(tokenizer, TEXTS), token_rows(trimmed_tokenizer, TEXTS), strict=True)
    for row, own in rows:
        assert trimmed_tokenizer.convert_ids_to_tokens(own) == [tokens[i] for i in row]
        expected = logits(model, row, row)[:, kept]
        assert torch.allclose(logits(trimmed, own, own), expected, atol=1e-5)
        assert trimmed_tokenizer.decode(own) == tokenizer.decode(row)


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_and_single_characters_are_kept(teachers, kind):
    tokenizer = load_tokenizer(teachers[kind])
    _, trimmed, _ = trim_to_used(teachers[kind])
    vocabulary = tokenizer.get_vocab()
    assert set(trimmed.all_special_tokens) == set(tokenizer.all_special_tokens)
    assert {token for token in vocabulary if len(token) == 1} <= set(trimmed.get_vocab())
    if kind in LANGUAGES:
        assert (trimmed.src_lang, trimmed.tgt_lang) == LANGUAGES[kind]
        languages = language_tokens(tokenizer)
        assert len(languages) == {"mbart": 25, "mbart50": 52, "m2m100": 100, "nllb": 202}[kind]
        assert set(languages.values()) <= set(trimmed.get_vocab())
    if kind in ("t5", "flan-t5"):
        assert {f"<extra_id_{i}>" for i in range(100)} <= set(trimmed.get_vocab())


@pytest.mark.parametrize("kind", KINDS)
def test_any_text_is_read_as_the_teacher_reads_it(teachers, kind):
    """Texts with unknown words are split into smaller tokens, and unknown characters are unknown to both."""
    tokenizer = load_tokenizer(teachers[kind])
    _, trimmed, _ = trim_to_used(teachers[kind])
    for text in [*ANY_TEXTS, *sentences(30, seed=5)]:
        own, full = trimmed(text).input_ids, tokenizer(text).input_ids
        assert trimmed.decode(own) == tokenizer.decode(full)
        unknown = tokenizer.unk_token_id
        assert own.count(trimmed.unk_token_id) == full.count(unknown)
        if kind == "bart":
            assert trimmed.decode(own, skip_special_tokens=True) == text


@pytest.mark.parametrize("kind", KINDS)
def test_token_ids_of_both_configs_are_renumbered(teachers, kind):
    model, tokenizer = load(teachers[kind])
    model.generation_config.bad_words_ids = (
        [[tokenizer.pad_token_id], [tokenizer.get_vocab()["▁"]]] if (kind == "pegasus") else None
    )
    token_ids = trim_to_used(teachers[kind])[2]
    trimmed = trim_model(model, token_ids)
    for own, full in ((trimmed.config, model.config), (trimmed.generation_config, model.generation_config)):
        for key, value in full.to_dict().items():
            if key.endswith("_token_id") and value is not None:
                assert token_ids[getattr(own, key)] == value, key
    if kind == "pegasus":
        words = trimmed.generation_config.bad_words_ids
        assert [[token_ids[i] for i in word] for word in words] == model.generation_config.bad_words_ids
    assert families.count_parameters(trimmed.config) == sum(p.numel() for p in trimmed.parameters())


@pytest.mark.parametrize("kind", KINDS)
def test_number_keeps_the_most_frequent_tokens(teachers, kind):
    model, tokenizer = load(teachers[kind])
    counts = count_tokens(token_rows(tokenizer, TEXTS))
    used = select_tokens(tokenizer, model.config, counts, "used")
    required = set(select_tokens(tokenizer, model.config, Counter(), "used"))
    assert required < set(used)
    for size in (len(required), len(required) + 3, len(used), len(used) + 5):
        kept = select_tokens(tokenizer, model.config, counts, size)
        assert len(kept) == size
        assert required <= set(kept)
        trimmed = trim_tokenizer(tokenizer, kept)
        for text in TEXTS:
            assert trimmed.decode(trimmed(text).input_ids) == tokenizer.decode(tokenizer(text).input_ids)
    if kind not in (
        "bart",
        "m2m100",
        "nllb",
    ):  # of byte pair encoding, merges on the way to a token come with the token
        kept = set(select_tokens(tokenizer, model.config, counts, len(required) + 3)) - required
        assert min(counts[i] for i in kept) >= max(counts[i] for i in set(used) - required - kept)
    with pytest.raises(UserError, match=f"{len(required) - 1} is too small: .* give at least {len(required)}"):
        select_tokens(tokenizer, model.config, counts, len(required) - 1)


@pytest.mark.parametrize("kind", KINDS)
def test_checkpoint_loads_with_the_auto_classes(teachers, kind, tmp_path):
    teacher, tokenizer = load(teachers[kind])
    token_ids = trim_to_used(teachers[kind])[2]
    student = shrink(trim_model(teacher, token_ids), plan_layers((2, 3), Student(size="1-2")))
    trimmed = trim_tokenizer(tokenizer, token_ids)
    save_checkpoint(student, trimmed, tmp_path / "student")
    model = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "student")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "student")
    assert families.num_layers(model.config) == (1, 2)
    assert loaded.get_vocab() == trimmed.get_vocab()
    assert token_rows(load_tokenizer(tmp_path / "student"), TEXTS) == token_rows(trimmed, TEXTS)
    assert [loaded(text).input_ids for text in ANY_TEXTS] == [trimmed(text).input_ids for text in ANY_TEXTS]
    row = trimmed(TEXTS[0]).input_ids
    assert torch.equal(logits(model, row, row), logits(student, row, row))
    files = {path.name for path in (tmp_path / "student").iterdir()}
    if kind != "m2m100":  # it reads a trimmed SentencePiece model
        assert not files & {"spiece.model", "sentencepiece.bpe.model", "merges.txt"}  # these have all tokens


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_equal_the_teachers_and_those_of_ctranslate2(teachers, kind, tmp_path):
    """All tokens of the teacher's outputs are kept, so that greedy decoding picks the same tokens."""
    texts = [text for text in TEXTS for _ in range(2)]
    outputs = greedy_texts(open_engine(teachers[kind], "transformers"), texts)
    model, tokenizer, _ = trim(teachers[kind], texts=[*texts, *outputs])
    save_checkpoint(model, tokenizer, tmp_path / "student")
    options = EngineOptions(cache_dir=tmp_path / "cache", allow_fallback=False)
    for name in ("transformers", "ctranslate2"):
        assert greedy_texts(open_engine(tmp_path / "student", name, options), texts) == outputs, name


def test_rows_without_a_token_are_removed_and_tokens_without_a_row_stay(tmp_path):
    """T5 pads its embedding; the <mask> of published BART models has no row. Both convert to CTranslate2."""
    padded, _, token_ids = trim(save_tiny("t5", tmp_path / "t5", padded_rows=28))
    assert padded.config.vocab_size == len(token_ids)
    teacher, tokenizer = load(save_tiny("bart", tmp_path / "bart"))
    teacher = trim_model(teacher, range(len(tokenizer) - 1))
    save_checkpoint(teacher, tokenizer, tmp_path / "without-mask")
    model, trimmed, token_ids = trim(tmp_path / "without-mask")
    assert len(trimmed) == len(token_ids) == model.config.vocab_size + 1
    assert trimmed.mask_token_id == model.config.vocab_size
    save_checkpoint(model, trimmed, tmp_path / "student")
    assert max(load_tokenizer(tmp_path / "student")("a <mask> b").input_ids) < model.config.vocab_size


def test_separate_vocabularies_are_refused(tmp_path):
    model, tokenizer = load(save_tiny("marian", tmp_path))
    model.config.share_encoder_decoder_embeddings = False
    with pytest.raises(UserError, match="vocabularies of their own"):
        trim_model(model, range(len(tokenizer)))
    tokenizer.separate_vocabs = True
    with pytest.raises(UserError, match="two vocabularies cannot be trimmed"):
        select_tokens(tokenizer, model.config, Counter(), "used")


def test_byte_fallback_keeps_all_bytes(tmp_path):
    from tokenizers import Tokenizer, decoders, models

    pieces = [("<unk>", 0.0), *[(f"<0x{byte:02X}>", -9.0) for byte in range(256)], ("ab", -1.0), ("cd", -2.0)]
    backend = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    config = load_model(save_tiny("t5", tmp_path)).config
    config.pad_token_id = config.eos_token_id = config.decoder_start_token_id = None
    kept = select_tokens(tokenizer, config, Counter(tokenizer("ab").input_ids), "used")
    trimmed = trim_tokenizer(tokenizer, kept)
    assert len(kept) == len(tokenizer) - 1
    assert trimmed.decode(trimmed("abcd 😀").input_ids) == "abcd 😀"


def test_merges_on_the_way_to_a_token():
    """By hand: "hug" is h+ug, since u+g is merged before h+u; "hugs" is hug+s."""
    ranks = {("u", "g"): 0, ("h", "ug"): 1, ("hug", "s"): 2, ("h", "u"): 3, ("hu", "g"): 4}
    assert merge_symbols("hugs", lambda a, b: ranks.get((a, b))) == {"h", "u", "g", "s", "ug", "hug", "hugs"}
    assert merge_symbols("hub", lambda a, b: ranks.get((a, b))) == {"h", "u", "b", "hu"}
