"""Loads and checks tokenizers, sets languages, resolves length limits, and turns texts into token ids."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedTokenizerBase

from raydistill.config.presets import DATASETS, TeacherPreset, teacher_preset
from raydistill.config.run import Dataset
from raydistill.core.errors import UserError
from raydistill.core.suggestions import closest_name
from raydistill.models.families import max_positions
from raydistill.models.hub import first_error_line, resolve_checkpoint
from raydistill.models.loading import load_config, load_generation_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model", "sentencepiece.bpe.model")
MARIAN_FILES = ("source.spm", "target.spm", "vocab.json")
LINE_BREAK_TOKENS = {"pegasus": "<n>"}  # by model type; google-research/pegasus replaces "\n" by this token
BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")  # of SentencePiece, for characters that no token contains
LANGUAGE_CODE = re.compile(r"[a-z]{2}_[A-Z]{2}|[a-z]{3}_[A-Z][a-z]{3}")  # of mBART and of NLLB-200
TARGET_LANGUAGE = re.compile(r"<2[A-Za-z_]+>")  # token of MADLAD-400 before a source, such as <2de>
SOURCE_PREFIX = "source_prefix"  # key of tokenizer_config.json with the text before every source
Languages = tuple[str, str]  # source, target


def load_tokenizer(
    checkpoint: str | Path, languages: Languages | None = None, source_prefix: str | None = None
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a checkpoint, checked against its embedding table.

    `languages` are (source, target): codes such as ("en_XX", "ro_RO") for mBART, ("eng_Latn", "ron_Latn") for
    NLLB-200, ("en", "ro") for M2M100 and T5; other families ignore them. Without languages, the target language of
    mBART, NLLB-200 and M2M100 is the one that the checkpoint's configurations start with, and T5's task is
    summarization. `source_prefix` is the text before every source; default: see `_own_source_prefix`.

    Two settings are added to the tokenizer: `source_prefix`, and `line_break`, Pegasus' token for a line break or None.

    Raises:
        UserError: Files are missing or unreadable, the vocabulary exceeds the embedding, or a language is unknown or
            missing.
    """
    config = load_config(checkpoint)
    folder = resolve_checkpoint(checkpoint, weights=False)
    # If the tokenizer's files are missing, from_pretrained silently returns an empty tokenizer.
    if config.model_type == "marian":
        if missing := [name for name in MARIAN_FILES if not (folder / name).is_file()]:
            raise UserError(
                f"{checkpoint}: the tokenizer's {', '.join(missing)} is missing; copy it into the checkpoint"
            )
    elif not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise UserError(
            f"{checkpoint}: has no tokenizer files (one of {', '.join(TOKENIZER_FILES)}); save the tokenizer into it"
        )
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*sacremoses.*")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"{checkpoint}: the tokenizer cannot be loaded: {first_error_line(error)}") from None
    check_vocabulary(config, tokenizer, checkpoint)
    if source_prefix is None:
        source_prefix = _own_source_prefix(tokenizer, config, languages, checkpoint)
    set_source_prefix(tokenizer, source_prefix)
    set_line_break(tokenizer, LINE_BREAK_TOKENS.get(config.model_type))
    if language_tokens(tokenizer):
        _set_languages(tokenizer, config, folder, languages, checkpoint)
    return tokenizer


def check_vocabulary(config: PretrainedConfig, tokenizer: PreTrainedTokenizerBase, checkpoint: str | Path) -> None:
    """Check that every token id has a row in the embedding table; the table may have more rows than tokens.

    The <mask> of published BART models has no row. The tokenizer is then changed to read "<mask>" in a text as
    ordinary characters.

    Raises:
        UserError: Another token has no row.
    """
    num_rows = config.vocab_size
    beyond = [token for token, i in tokenizer.get_vocab().items() if i >= num_rows]
    if not beyond:
        return
    if beyond != [tokenizer.mask_token]:
        raise UserError(
            f"{checkpoint}: the tokenizer knows {len(beyond)} tokens beyond the embedding's {num_rows} rows, such as "
            f"{beyond[0]!r}; tokenizer and model do not belong together"
        )
    tokenizer.split_special_tokens = True


# Line breaks


def set_line_break(tokenizer: Any, token: str | None) -> None:
    """Set the token that stands for a line break of targets, if the vocabulary has this token.

    The tokenizer itself replaces a line break by a space.
    """
    tokenizer.line_break = token if token is not None and token in tokenizer.get_vocab() else None


def line_break(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the token that stands for a line break of targets, None if there is no such token."""
    return getattr(tokenizer, "line_break", None)


def decode_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    """Return the text of token ids, without special tokens and surrounding whitespace, with its line breaks."""
    text = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    return text.replace(line_break(tokenizer) or "\n", "\n").strip()


# Languages and tasks


def resolve_languages(teacher: str | None, dataset: Dataset) -> Languages | None:
    """Return source and target language: the data set's, else the named teacher's, else the named data set's.

    The languages of a named multilingual teacher hold for named data sets only.
    """
    if dataset.languages or teacher is None:
        return dataset.languages
    if preset := teacher_preset(teacher, dataset.name):
        return None if preset.multilingual and dataset.name not in DATASETS else preset.languages
    return DATASETS[dataset.name].languages if dataset.name in DATASETS else None


def source_prefix(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text before every source, such as "summarize: "; "" for none."""
    return str(getattr(tokenizer, SOURCE_PREFIX, ""))


def set_source_prefix(tokenizer: Any, prefix: str) -> None:
    """Set the text before every source. `save_pretrained` writes the text, "" too, so that students keep it."""
    tokenizer.source_prefix = tokenizer.init_kwargs[SOURCE_PREFIX] = prefix


def _own_source_prefix(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    languages: Languages | None,
    checkpoint: str | Path,
) -> str:
    """Return a checkpoint's own text before every source; "" for families other than T5.

    Students keep the text in tokenizer_config.json. The published T5 models were trained on many tasks and list their
    prefixes in `task_specific_params`. MADLAD-400 has a token for each target language.

    Raises:
        UserError: The config lists tasks, but none for the languages; the target language of MADLAD-400 is missing or
            unknown; or the text in tokenizer_config.json is damaged.
    """
    stored = tokenizer.init_kwargs.get(SOURCE_PREFIX)
    if stored is not None:
        if not isinstance(stored, str):
            raise UserError(f"{checkpoint}: {SOURCE_PREFIX} in tokenizer_config.json is not a text")
        return stored
    if config.model_type != "t5":
        return ""
    if tasks := getattr(config, "task_specific_params", None):
        task = f"translation_{languages[0][:2]}_to_{languages[1][:2]}" if languages else "summarization"
        if languages and task not in tasks:
            known = ", ".join(sorted(tasks))
            raise UserError(f"languages {', '.join(languages)}: no task {task}; this T5 knows {known}")
        return str(tasks.get(task, {}).get("prefix", ""))
    return _target_language_prefix(tokenizer, languages, checkpoint)


def _target_language_prefix(
    tokenizer: PreTrainedTokenizerBase, languages: Languages | None, checkpoint: str | Path
) -> str:
    """Return MADLAD-400's token of the target language with a space, as "<2de> "; "" for a T5 without such tokens.

    Raises:
        UserError: The languages are missing, or there is no token of the target language.
    """
    tokens = {token for token in tokenizer.get_vocab() if TARGET_LANGUAGE.fullmatch(token)}
    if not tokens:
        return ""
    example = min(tokens, key=lambda token: (len(token), token))
    if languages is None:
        raise UserError(
            f"{checkpoint}: the checkpoint reads the target language from a token before each source, such as "
            f"{example}; set `languages` of the data set, as [en, {example[2:-1]}], or `source_prefix: '{example} '` "
            f"(options --languages and --source-prefix)"
        )
    token = f"<2{languages[1]}>"
    if token not in tokens:
        similar = closest_name(token, sorted(tokens), cutoff=0.5)
        hint = f"did you mean {similar[2:-1]!r}?" if similar else f"the tokenizer has {len(tokens)} languages"
        raise UserError(f"{checkpoint}: unknown language {languages[1]!r}, there is no token {token}; {hint}")
    return f"{token} "


def set_target_language(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase) -> None:
    """Make a multilingual model generate the tokenizer's target language, in place; others are not changed."""
    set_config_target_language(model.config, model.generation_config, tokenizer)


def set_config_target_language(
    config: PretrainedConfig, generation_config: GenerationConfig, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Set the target language of a multilingual model in both configurations, in place.

    mBART-25 starts the decoder with the token of the language. mBART-50, M2M100 and NLLB-200 force it as the first
    token of an output.
    """
    tokens = language_tokens(tokenizer)
    if not tokens or tokenizer.tgt_lang is None:
        return
    token_id: Any = tokenizer.convert_tokens_to_ids(tokens[tokenizer.tgt_lang])
    if _starts_with_language(tokenizer):
        config.decoder_start_token_id = generation_config.decoder_start_token_id = token_id
    else:
        generation_config.forced_bos_token_id = token_id


def load_target_generation_config(
    checkpoint: str | Path, languages: Languages | None, source_prefix: str | None = None
) -> GenerationConfig:
    """Return a checkpoint's generation config with the target language, see `set_config_target_language`.

    `languages` and `source_prefix` are as in `load_tokenizer`.

    Raises:
        UserError: As `load_tokenizer` and `load_generation_config`.
    """
    config, generation_config = load_config(checkpoint), load_generation_config(checkpoint)
    set_config_target_language(config, generation_config, load_tokenizer(checkpoint, languages, source_prefix))
    return generation_config


def language_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the token of each language by the language's code; empty for tokenizers without languages.

    The tokens of mBART ("en_XX") and NLLB-200 ("eng_Latn") are the codes, the token of M2M100's "en" is "__en__".
    """
    if not hasattr(tokenizer, "src_lang"):
        return {}
    by_code: dict[str, str] | None = getattr(tokenizer, "lang_code_to_token", None)
    codes = [token for token in tokenizer.all_special_tokens if LANGUAGE_CODE.fullmatch(token)]
    return dict(zip(codes, codes, strict=True)) if by_code is None else by_code


# Lengths and token ids


def resolve_max_tokens(
    field: Literal["max_source_tokens", "max_target_tokens"],
    dataset: Dataset,
    preset: TeacherPreset | None,
    config: PretrainedConfig,
) -> int:
    """Return a length limit in tokens: the data set's, else the teacher's preset's, else the named data set's default.

    The last resort is 512 source and 128 target tokens. Limits that the user did not set are cut to the positions of
    the model.

    Raises:
        UserError: The data set's limit exceeds the positions of the model.
    """
    positions = max_positions(config)
    requested = getattr(dataset, field)
    if requested is not None:
        if positions is not None and requested > positions:
            raise UserError(f"dataset.{field} is {requested}, but the model has {positions} positions")
        return int(requested)
    default = 512 if field == "max_source_tokens" else 128
    limit = getattr(preset or DATASETS.get(dataset.name), field, default)
    return min(limit, positions) if positions else int(limit)


def source_limit(teacher: str, dataset: Dataset, checkpoint: str | Path) -> int:
    """Return the number of source tokens that a teacher or its student reads, see `resolve_max_tokens`."""
    preset = teacher_preset(teacher, dataset.name)
    return resolve_max_tokens("max_source_tokens", dataset, preset, load_config(checkpoint))


def tokenize_sources(tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int) -> list[list[int]]:
    """Return the token ids of each source text, truncated to `max_tokens` including special tokens.

    The text before every source that `load_tokenizer` set comes first.
    """
    if not texts:
        return []
    texts = [source_prefix(tokenizer) + text for text in texts]
    encoded = tokenizer(texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokenize_targets(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], max_tokens: int, join_lines: bool = False
) -> list[list[int]]:
    """Return the label ids of each target text, truncated to `max_tokens`; special tokens at the end are kept.

    A line break is the tokenizer's token for line breaks if it has one, see `load_tokenizer`. Otherwise, `join_lines`
    replaces line breaks by spaces; without `join_lines` the tokenizer reads them as any other character.
    """
    if not texts:
        return []
    replacement = line_break(tokenizer) or (" " if join_lines else None)
    texts = [text.replace("\n", replacement) for text in texts] if replacement else list(texts)
    encoded = tokenizer(text_target=texts, truncation=True, max_length=max_tokens, return_attention_mask=False)
    return [list(ids) for ids in encoded["input_ids"]]


def tokens_by_id(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """Return all tokens in the order of their ids."""
    by_id = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    return [token for _, token in by_id]


def embedding_tokens(tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig) -> list[str]:
    """Return the token of each row of the embedding table.

    Published T5, mT5, M2M100 and NLLB-200 models have more rows than tokens. A row without a token gets the name
    "<unused_N>", where N is its id.
    """
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    return [by_id.get(i, f"<unused_{i}>") for i in range(config.vocab_size)]


def _set_languages(
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    folder: Path,
    languages: Languages | None,
    checkpoint: str | Path,
) -> None:
    """Set `src_lang` and `tgt_lang` of a multilingual tokenizer.

    Raises:
        UserError: A language is unknown or missing.
    """
    tokens = language_tokens(tokenizer)
    for code in languages or ():
        if code not in tokens:
            raise UserError(f"{checkpoint}: unknown language {code!r}; the tokenizer knows {', '.join(sorted(tokens))}")
    if languages:
        tokenizer.src_lang, tokenizer.tgt_lang = languages
    elif tokenizer.tgt_lang is None:
        generation = load_generation_config(folder)
        first = config.decoder_start_token_id if _starts_with_language(tokenizer) else generation.forced_bos_token_id
        token = "" if first is None else str(tokenizer.convert_ids_to_tokens(first))
        codes = {token: code for code, token in tokens.items()}
        if token not in codes:
            source, target = sorted(tokens)[:2]
            raise UserError(
                f"{checkpoint}: the checkpoint names no languages; set `languages: [{source}, {target}]`, with source "
                f"and target of your data, in the data set, or give `--languages {source} {target}`; the tokenizer "
                f"knows {', '.join(sorted(tokens))}"
            )
        tokenizer.tgt_lang = codes[token]
    # Only the setter of src_lang updates the special tokens of the source.
    tokenizer.src_lang = tokenizer.src_lang


def _starts_with_language(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return whether the decoder starts with the token of the language (mBART-25)."""
    return "MBartTokenizer" in type(tokenizer).__name__
