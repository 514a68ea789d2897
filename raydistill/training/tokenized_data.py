"""The data that a run trains on: its splits, their tokens and the training pairs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raydistill.config.label_sources import LabelSource, parse_labels
from raydistill.config.presets import TeacherPreset, joins_lines, resolve_metric
from raydistill.config.run import Dataset, Run
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.data.corpus import Corpus
from raydistill.data.selection import SELECTION, read_part
from raydistill.label_sets.label_set import read_label_set
from raydistill.label_sets.mixing import select_targets
from raydistill.models.fingerprints import teacher_key
from raydistill.models.loading import locate_checkpoint
from raydistill.models.tokenization import resolve_max_tokens, tokenize_sources, tokenize_targets
from raydistill.models.vocabulary import count_tokens, select_tokens
from raydistill.training.records import InputFingerprints

SPLITS = ("train", "validation", SELECTION, "test")
UNLIMITED_TOKENS = 2**30  # more than any text has


@dataclass(frozen=True)
class TokenizedData:
    """The texts of a data set by split, and the tokens of their sources.

    Attributes:
        corpora: The texts of each split; the selection and the test split are optional.
        sources: Token ids of the sources of the train and the validation split.
        max_source_tokens: Length at which sources are cut.
        max_target_tokens: Length at which targets are cut.
        metric: The metric of the scores, rouge2 or bleu.
    """

    corpora: dict[str, Corpus]
    sources: dict[str, list[list[int]]]
    max_source_tokens: int
    max_target_tokens: int
    metric: str

    @property
    def fingerprints(self) -> dict[str, str]:
        """The content fingerprint of each split."""
        return {split: corpus.fingerprint for split, corpus in self.corpora.items()}


def load_tokenized_data(
    run: Run, preset: TeacherPreset | None, tokenizer: PreTrainedTokenizerBase, model_config: PretrainedConfig
) -> TokenizedData:
    """Read the splits of a run's data set and tokenise the sources.

    Raises:
        UserError: The train or the validation split is missing.
    """
    max_source_tokens = resolve_max_tokens("max_source_tokens", run.dataset, preset, model_config)
    max_target_tokens = resolve_max_tokens("max_target_tokens", run.dataset, preset, model_config)
    metric = resolve_metric(run.dataset.name, run.evaluation.metric)
    corpora = _read_splits(run.dataset)
    if "train" not in corpora or "validation" not in corpora:
        raise UserError(
            f"{run.dataset.name}: training needs a train and a validation split; found {', '.join(corpora) or 'none'}"
        )
    sources = {
        split: tokenize_split(tokenizer, run.dataset, split, "source", max_source_tokens)
        for split in ("train", "validation")
    }
    return TokenizedData(corpora, sources, max_source_tokens, max_target_tokens, metric)


def input_fingerprints(run: Run) -> InputFingerprints:
    """The current key of the teacher and fingerprints of the splits, without tokenising texts or loading a model."""
    key = teacher_key(locate_checkpoint(run.teacher, run.dataset.name)) if run.teacher else None
    data = {split: corpus.fingerprint for split, corpus in _read_splits(run.dataset).items()}
    return InputFingerprints(teacher=key, data=data)


def _read_splits(dataset: Dataset) -> dict[str, Corpus]:
    corpora = {split: read_split(dataset, split) for split in SPLITS}
    return {split: corpus for split, corpus in corpora.items() if corpus}


@lru_cache(maxsize=8)
def read_split(dataset: Dataset, split: str) -> Corpus | None:
    """`data.selection.read_part`, once per process."""
    return read_part(dataset, split)


@lru_cache(maxsize=8)
def tokenize_split(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    split: str,
    side: Literal["source", "target"],
    max_length: int,
) -> list[list[int]]:
    """Token ids of the sources or targets of a split, computed once per process."""
    corpus = read_split(dataset, split)
    assert corpus is not None
    if side == "source":
        return tokenize_sources(tokenizer, corpus.sources, max_length)
    return tokenize_targets(tokenizer, corpus.targets, max_length, joins_lines(dataset.name))


def make_examples(
    run: Run, data: TokenizedData, tokenizer: PreTrainedTokenizerBase, label_folders: Mapping[str, Path]
) -> Examples:
    """The tokenised training pairs with the labels that the run names.

    Args:
        run: The run's config.
        data: The run's data.
        tokenizer: The tokenizer of the student.
        label_folders: Folders of the label sets that teachers wrote, by source ("pseudo" or "pseudo@TEACHER").
    """
    labels = tuple(parse_labels(run.resolved_labels))
    folders = _known_label_folders(labels, label_folders)
    return _make_examples(tokenizer, run.dataset, labels, folders, data.max_source_tokens, data.max_target_tokens)


def _known_label_folders(
    labels: tuple[LabelSource, ...], label_folders: Mapping[str, Path]
) -> tuple[tuple[str, Path], ...]:
    """The label sets that are complete, by label source: those that the run names, and those in `label_folders`."""
    folders = {
        label.spec: Path(label.folder) if label.folder else label_folders.get(label.spec)
        for label in labels
        if label.spec != "original"
    }
    return tuple((source, folder) for source, folder in folders.items() if folder is not None)


def select_student_tokens(
    run: Run, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig, label_folders: Mapping[str, Path]
) -> tuple[int, ...] | None:
    """The ids of the teacher's tokens that the student keeps, see `select_tokens`; None for all.

    The tokens of sources, original targets and label sets count, before texts are cut at a maximum length. The teacher
    and the student then split every training text into the same tokens if all tokens that occur are kept.

    Args:
        run: The run's config.
        tokenizer: The tokenizer of the teacher.
        config: The config of the teacher.
        label_folders: Folders of the label sets that teachers wrote, by source ("pseudo" or "pseudo@TEACHER").
    """
    size = run.student.vocabulary
    if size is None:
        return None
    folders = _known_label_folders(tuple(parse_labels(run.resolved_labels)), label_folders)
    return select_tokens(tokenizer, config, _count_training_tokens(tokenizer, run.dataset, folders), size)


@lru_cache(maxsize=4)
def _count_training_tokens(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, label_folders: tuple[tuple[str, Path], ...]
) -> Counter[int]:
    """How often each token occurs in sources, original targets and label sets; computed once per process."""
    corpus = read_split(dataset, "train")
    assert corpus is not None
    counts = count_tokens(tokenize_sources(tokenizer, corpus.sources, UNLIMITED_TOKENS))
    join_lines = joins_lines(dataset.name)
    counts += count_tokens(tokenize_targets(tokenizer, corpus.targets, UNLIMITED_TOKENS, join_lines))
    for _, folder in label_folders:
        texts = list(read_label_set(folder).targets.values())
        counts += count_tokens(tokenize_targets(tokenizer, texts, UNLIMITED_TOKENS, join_lines))
    return counts


@lru_cache(maxsize=4)
def _make_examples(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    labels: tuple[LabelSource, ...],
    label_folders: tuple[tuple[str, Path], ...],
    max_source_tokens: int,
    max_target_tokens: int,
) -> Examples:
    """Computed once per process, so that the next trial on the same pairs starts at once."""
    corpus = read_split(dataset, "train")
    assert corpus is not None
    label_sets = {source: read_label_set(folder) for source, folder in label_folders}
    rows, targets = select_targets(corpus.ids, corpus.targets, labels, label_sets)
    return Examples(
        tokenize_split(tokenizer, dataset, "train", "source", max_source_tokens),
        tokenize_targets(tokenizer, targets, max_target_tokens, joins_lines(dataset.name)),
        rows,
    )
