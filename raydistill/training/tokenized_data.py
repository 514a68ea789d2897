"""The data that a run trains on: its splits, their tokens and the training pairs."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from raydistill.config.label_sources import LabelSource, parse_labels
from raydistill.config.metric_names import MetricChoice
from raydistill.config.presets import TeacherPreset, joins_lines, resolve_metrics
from raydistill.config.run import Dataset, Run
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.data.corpus import Corpus
from raydistill.data.extra import read_extra, read_extra_manifest
from raydistill.data.selection import SELECTION, read_part
from raydistill.data.streaming import scan_split
from raydistill.label_sets.label_set import read_label_set
from raydistill.label_sets.mixing import select_targets
from raydistill.models.fingerprints import teacher_key
from raydistill.models.loading import locate_checkpoint
from raydistill.models.tokenization import resolve_max_tokens, tokenize_sources, tokenize_targets
from raydistill.models.vocabulary import count_tokens, select_tokens
from raydistill.training.inputs import EXTRA_SOURCES, extra_labels
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
        metrics: The metrics of the scores.
    """

    corpora: dict[str, Corpus]
    sources: dict[str, list[list[int]]]
    max_source_tokens: int
    max_target_tokens: int
    metrics: MetricChoice

    @property
    def metric(self) -> str:
        """The deciding metric."""
        return self.metrics.deciding

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
    corpora = _read_splits(run.dataset)
    if "train" not in corpora or "validation" not in corpora:
        raise UserError(
            f"{run.dataset.name}: training needs a train and a validation split; found {', '.join(corpora) or 'none'}"
        )
    sources = {
        split: tokenize_split(tokenizer, run.dataset, split, "source", max_source_tokens)
        for split in ("train", "validation")
    }
    return TokenizedData(corpora, sources, max_source_tokens, max_target_tokens, choose_metrics(run))


def choose_metrics(run: Run) -> MetricChoice:
    """The metrics of a run; with `auto`, the metrics of its data set, by the columns of the validation split."""
    corpus = read_split(run.dataset, "validation")
    columns = corpus.columns if corpus else None
    return resolve_metrics(run.dataset, run.evaluation.metric, run.evaluation.report, columns)


def input_fingerprints(run: Run) -> InputFingerprints:
    """The current key of the teacher and fingerprints of the splits, without tokenising texts or loading a model."""
    key = teacher_key(locate_checkpoint(run.teacher, run.dataset.name)) if run.teacher else None
    data = {split: corpus.fingerprint for split, corpus in _read_splits(run.dataset).items()}
    if extra := run.pseudo.extra:
        data[EXTRA_SOURCES] = _scan_once(extra.as_dataset(), extra.split).fingerprint
    return InputFingerprints(teacher=key, data=data)


_scan_once = lru_cache(maxsize=2)(scan_split)


def extra_fingerprint(label_folders: Mapping[str, Path]) -> dict[str, str]:
    """The fingerprint of the file of the extra sources under its name in `InputFingerprints.data`; {} for none."""
    folder = label_folders.get(EXTRA_SOURCES)
    return {EXTRA_SOURCES: read_extra_manifest(folder).fingerprint} if folder else {}


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
        label_folders: Folders of label sets and extra sources, as in `training.inputs.LabelFolders`.

    Raises:
        UserError: A label set or the extra sources of the run are missing.
    """
    if run.reads_extra and EXTRA_SOURCES not in label_folders:
        raise UserError("pseudo.extra: the texts are not labelled; `raydistill train` and `sweep` label them first")
    texts = _training_texts(run, label_folders)
    return _make_examples(tokenizer, texts, data.max_source_tokens, data.max_target_tokens)


@dataclass(frozen=True)
class _TrainingTexts:
    """The texts that a run trains on, as a key of caches.

    Attributes:
        dataset: The data set.
        labels: The label sources of the run.
        label_folders: The complete label sets by label source.
        extra_folder: The extra sources; None for none.
        extra_rows: The number of extra sources that the run trains on; None for all.
    """

    dataset: Dataset
    labels: tuple[LabelSource, ...]
    label_folders: tuple[tuple[str, Path], ...]
    extra_folder: Path | None
    extra_rows: int | None

    @property
    def extra_labels(self) -> list[LabelSource]:
        """The label sources that label the extra sources."""
        return [label for label in self.labels if label.is_pseudo and self.extra_rows != 0]


def _training_texts(run: Run, label_folders: Mapping[str, Path]) -> _TrainingTexts:
    """The texts of a run: the label sets that the run names, and the label sets in `label_folders`."""
    labels = tuple(parse_labels(run.resolved_labels))
    folders = {label.spec: Path(label.folder) for label in labels if label.folder}
    for label in labels:
        names = [label.spec, extra_labels(label.spec)] if label.is_pseudo else []
        folders |= {name: label_folders[name] for name in names if name in label_folders}
    return _TrainingTexts(
        run.dataset, labels, tuple(folders.items()), label_folders.get(EXTRA_SOURCES), run.pseudo.extra_rows
    )


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
        label_folders: Folders of label sets and extra sources, as in `training.inputs.LabelFolders`.
    """
    size = run.student.vocabulary
    if size is None:
        return None
    texts = _training_texts(run, label_folders)
    return select_tokens(tokenizer, config, _count_training_tokens(tokenizer, texts), size)


@lru_cache(maxsize=4)
def _count_training_tokens(tokenizer: PreTrainedTokenizerBase, training_texts: _TrainingTexts) -> Counter[int]:
    """How often each token occurs in sources, original targets and label sets; computed once per process."""
    corpus = read_split(training_texts.dataset, "train")
    assert corpus is not None
    counts = count_tokens(tokenize_sources(tokenizer, corpus.sources, UNLIMITED_TOKENS))
    join_lines = joins_lines(training_texts.dataset.name)
    counts += count_tokens(tokenize_targets(tokenizer, corpus.targets, UNLIMITED_TOKENS, join_lines))
    if training_texts.extra_folder:
        sources = _read_extra_once(training_texts.extra_folder).sources
        counts += count_tokens(tokenize_sources(tokenizer, sources, UNLIMITED_TOKENS))
    for _, folder in training_texts.label_folders:
        texts = list(read_label_set(folder).targets.values())
        counts += count_tokens(tokenize_targets(tokenizer, texts, UNLIMITED_TOKENS, join_lines))
    return counts


@lru_cache(maxsize=4)
def _make_examples(
    tokenizer: PreTrainedTokenizerBase, texts: _TrainingTexts, max_source_tokens: int, max_target_tokens: int
) -> Examples:
    """Computed once per process, so that the next trial on the same pairs starts at once.

    The sources of the training split come first, then all extra sources: runs that train on fewer of these, or on none,
    share a teacher cache with the others.
    """
    corpus = read_split(texts.dataset, "train")
    assert corpus is not None
    label_sets = {source: read_label_set(folder) for source, folder in texts.label_folders}
    rows, targets = select_targets(corpus.ids, corpus.targets, texts.labels, label_sets)
    sources = tokenize_split(tokenizer, texts.dataset, "train", "source", max_source_tokens)
    if texts.extra_folder:
        sources = sources + _tokenize_extra(tokenizer, texts.extra_folder, max_source_tokens)
    if texts.extra_folder and texts.extra_labels:
        ids = _read_extra_once(texts.extra_folder).ids[: texts.extra_rows]
        extra_sets = {label.spec: label_sets[extra_labels(label.spec)] for label in texts.extra_labels}
        numbers, added = select_targets(ids, [], texts.extra_labels, extra_sets)
        rows += [len(corpus) + number for number in numbers]
        targets += added
    target_tokens = tokenize_targets(tokenizer, targets, max_target_tokens, joins_lines(texts.dataset.name))
    return Examples(sources, target_tokens, rows)


_read_extra_once = lru_cache(maxsize=2)(read_extra)


@lru_cache(maxsize=2)
def _tokenize_extra(tokenizer: PreTrainedTokenizerBase, folder: Path, max_length: int) -> list[list[int]]:
    return tokenize_sources(tokenizer, _read_extra_once(folder).sources, max_length)
