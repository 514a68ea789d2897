"""Reads a user's data and teacher for `raydistill init`: splits, columns, task, lengths in tokens, architecture."""

import math
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raydistill.config.presets import teacher_preset
from raydistill.config.run import Dataset, NewModel
from raydistill.core.errors import UserError
from raydistill.data.corpus import BadRow, Corpus, inspect_corpus, split_names
from raydistill.data.task import TaskGuess, guess_task
from raydistill.models.families import max_positions, num_layers
from raydistill.models.loading import load_config, load_generation_config, locate_checkpoint
from raydistill.models.random_init import build_tokenizer
from raydistill.models.tokenization import (
    Languages,
    load_tokenizer,
    resolve_languages,
    tokenize_sources,
    tokenize_targets,
)

MAX_MEASURED_ROWS = 2000  # rows that are split into tokens for the lengths, spread over the training split
MAX_TOKENIZER_ROWS = 20_000  # rows that the tokenizer of a new model is built from here; the run uses all
NEW_MODEL_MAX_TOKENS = 512
MANY_ROWS = 50_000  # with more, a new model is twice as wide


@dataclass(frozen=True)
class UserData:
    """A data set, read and checked.

    Attributes:
        corpus: The training split.
        rows: Usable rows of each split.
        num_bad: Rows of all splits that cannot be used; rows with repeated ids are not counted.
        has_duplicates: Whether ids are repeated.
        task: The guessed task.
    """

    corpus: Corpus
    rows: dict[str, int]
    num_bad: int
    has_duplicates: bool
    task: TaskGuess


@dataclass(frozen=True)
class Lengths:
    """Tokens of the texts of one side.

    Attributes:
        median, p99, longest: Percentiles over the measured rows.
        limit: The 99th percentile, rounded up to a multiple of 8 and cut to the positions of the model.
        cut_share: Share of the measured rows that are longer than `limit`.
    """

    median: int
    p99: int
    longest: int
    limit: int
    cut_share: float


@dataclass(frozen=True)
class UserTeacher:
    """What a space needs to know of its teacher.

    Attributes:
        encoder_layers, decoder_layers, width: The architecture.
        source, target: Lengths of the data in the teacher's tokens.
        max_length: The length limit of decoding that the checkpoint lacks; None if its own is sufficient.
        languages: Languages of the data set, where the model needs them and the columns name them.
        new_model: The architecture to train, of a teacher that does not exist yet.
    """

    encoder_layers: int
    decoder_layers: int
    width: int
    source: Lengths
    target: Lengths
    max_length: int | None = None
    languages: Languages | None = None
    new_model: NewModel | None = None


def read_data(dataset: Dataset) -> UserData:
    """Read the splits of a data set and guess the task.

    Raises:
        UserError: There is no train or no validation split, the columns are not recognised, or a split has no usable
            row.
    """
    splits = split_names(dataset)
    if missing := [split for split in ("train", "validation") if split not in splits]:
        raise UserError(
            f"{dataset.name}: no {' and no '.join(missing)} split; available: {', '.join(splits)}. A sweep needs a "
            "folder with a train and a validation file, and optionally a test file; the tutorial shows how to divide "
            "a single file"
        )
    inspected = {split: inspect_corpus(dataset, split) for split in splits}
    if empty := [split for split, (corpus, _) in inspected.items() if not len(corpus)]:
        first = next(iter(inspected[empty[0]][0].skipped), BadRow(dataset.name, 0, "empty"))
        raise UserError(f"{dataset.name}: no usable row in {', '.join(empty)}, such as {first}")
    train = inspected["train"][0]
    return UserData(
        corpus=train,
        rows={split: len(corpus) for split, (corpus, _) in inspected.items()},
        num_bad=sum(len(corpus.skipped) for corpus, _ in inspected.values()),
        has_duplicates=any(duplicates for _, duplicates in inspected.values()),
        task=guess_task(train),
    )


def read_teacher(teacher: str, dataset: Dataset, data: UserData, is_translation: bool) -> UserTeacher:
    """Read the configuration and the tokenizer of a teacher, and count the tokens of the data.

    Raises:
        UserError: The teacher or its tokenizer cannot be loaded, or it needs languages that nothing names.
    """
    checkpoint = locate_checkpoint(teacher, dataset.name)
    config = load_config(checkpoint)
    languages = resolve_languages(teacher, dataset)
    guessed = None
    if languages is None and is_translation:
        languages = guessed = _languages_of_columns(config, data.task)
    prefix = dataset.source_prefix
    if languages is None and prefix is None and is_translation and config.model_type == "t5":
        raise UserError(
            f"{teacher}: T5 needs the languages of a translation, for example --languages en de, or --source-prefix"
        )
    tokenizer = load_tokenizer(checkpoint, languages, prefix)
    source, target = _measure(tokenizer, data.corpus, max_positions(config))
    preset = teacher_preset(teacher, dataset.name)
    own_limit = (preset and preset.decoding.max_length) or load_generation_config(checkpoint).max_length
    max_length = target.limit if (own_limit or 0) < target.p99 else None
    return UserTeacher(*num_layers(config), config.d_model, source, target, max_length, guessed)


def design_teacher(data: UserData, is_translation: bool) -> UserTeacher:
    """A new teacher that suits the number of rows; its tokenizer is built to count the tokens of the data."""
    has_many_rows = data.rows["train"] >= MANY_ROWS
    new_model = NewModel(
        family="marian" if is_translation else "bart",
        encoder_layers=6 if is_translation else 2,
        decoder_layers=6 if is_translation else 4,
        d_model=256 if has_many_rows else 128,
        heads=4,
        ffn_dim=1024 if has_many_rows else 512,
        vocab_size=16_000 if has_many_rows else 8000 if is_translation else 4000,
    )
    corpus = data.corpus
    step = max(1, len(corpus) // MAX_TOKENIZER_ROWS)
    with tempfile.TemporaryDirectory() as folder:
        tokenizer = build_tokenizer(new_model, [*corpus.sources[::step], *corpus.targets[::step]], Path(folder))
        source, target = _measure(tokenizer, corpus, NEW_MODEL_MAX_TOKENS)
    # The final tokenizer is built from all rows and may split texts differently
    positions = max(64, 64 * math.ceil(1.25 * max(source.limit, target.limit) / 64))
    new_model = new_model.model_copy(update={"max_positions": positions})
    layers = (new_model.encoder_layers, new_model.decoder_layers)
    return UserTeacher(*layers, new_model.d_model, source, target, new_model=new_model)


def measure_lengths(
    tokenize: Callable[[list[str]], list[list[int]]], texts: Sequence[str], positions: int | None
) -> Lengths:
    """Count the tokens of texts.

    Args:
        tokenize: Returns the token ids of each text.
        texts: The texts; up to `MAX_MEASURED_ROWS` of them are read, spread over all.
        positions: The longest input of the model; None: no limit.
    """
    measured = list(texts[:: math.ceil(len(texts) / MAX_MEASURED_ROWS)])
    counts = sorted(map(len, tokenize(measured)))
    p99 = counts[math.ceil(0.99 * len(counts)) - 1]
    limit = 8 * math.ceil(p99 / 8)
    limit = min(limit, positions) if positions else limit
    cut_share = sum(count > limit for count in counts) / len(counts)
    return Lengths(counts[math.ceil(0.5 * len(counts)) - 1], p99, counts[-1], limit, cut_share)


def _measure(tokenizer: PreTrainedTokenizerBase, corpus: Corpus, positions: int | None) -> tuple[Lengths, Lengths]:
    no_limit = 10**6
    source = measure_lengths(lambda texts: tokenize_sources(tokenizer, texts, no_limit), corpus.sources, positions)
    target = measure_lengths(lambda texts: tokenize_targets(tokenizer, texts, no_limit), corpus.targets, positions)
    return source, target


def _languages_of_columns(config: PretrainedConfig, task: TaskGuess) -> Languages | None:
    """The languages that the columns name, for T5 and multilingual models; None for other families.

    The codes of mBART have a region, as in en_XX.
    """
    if task.languages is None:
        return None
    has_regions = all("_" in language for language in task.languages)
    needs_languages = config.model_type in ("t5", "m2m_100") or (config.model_type == "mbart" and has_regions)
    return task.languages if needs_languages else None
