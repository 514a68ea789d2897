"""What a run is made of before any training: the teacher, the texts and their tokens, the labels."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from raydistill.config.label_sources import LabelSource, parse_labels
from raydistill.config.presets import TeacherPreset, resolve_metric, teacher_preset
from raydistill.config.run import Dataset, Run
from raydistill.core.errors import UserError
from raydistill.data.batching import Examples
from raydistill.data.corpus import Corpus, read_corpus, split_names
from raydistill.evaluation.latency import malloc_trim
from raydistill.label_sets.label_set import read_label_set
from raydistill.label_sets.mixing import select_targets
from raydistill.models.hub import hub_commit
from raydistill.models.loading import (
    Languages,
    load_model,
    load_tokenizer,
    locate_checkpoint,
    resolve_languages,
    resolve_max_tokens,
    set_target_language,
    teacher_key,
    tokenize_sources,
    tokenize_targets,
)
from raydistill.models.shrinking import check_full_depth_copy


@dataclass(frozen=True)
class Teacher:
    """A teacher with all that depends on it and the data alone; shared by the runs of one process.

    `alignment`: how far a full-depth copy of it is off in its logits, as a share of the largest. `commit`: the hub's,
    of what was loaded.
    """

    location: str
    tokenizer: PreTrainedTokenizerBase
    key: str
    preset: TeacherPreset | None
    alignment_error: float
    languages: Languages | None
    commit: str | None

    @cached_property
    def model(self) -> PreTrainedModel:
        """The weights, without gradients, on the CPU; loaded anew where they were released."""
        return _load_frozen_model(self.location, self.tokenizer)

    def unload_model(self) -> None:
        """Drop the weights: a run that reads the cache needs none once its student is made."""
        self.__dict__.pop("model", None)
        malloc_trim()


@dataclass(frozen=True)
class TokenizedData:
    """Texts and their tokens by split."""

    corpora: dict[str, Corpus]
    sources: dict[str, list[list[int]]]
    max_source_tokens: int
    max_target_tokens: int
    metric: str

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of each split's content."""
        return {split: corpus.fingerprint for split, corpus in self.corpora.items()}


def input_fingerprints(run: Run) -> dict[str, Any]:
    """The teacher's key and the splits' fingerprints as they are now; nothing is tokenised or loaded."""
    key = teacher_key(locate_checkpoint(run.teacher, run.dataset.name)) if run.teacher else None
    found = {split: corpus for split in ("train", "validation", "test") if (corpus := read_split(run.dataset, split))}
    return {"teacher": key, "data": {split: corpus.fingerprint for split, corpus in found.items()}}


def open_teacher(name: str, dataset: Dataset) -> Teacher:
    """Open a teacher once per process: tokenizer, key, preset, and the weights, checked.

    Of the data set its name and languages count: runs on other numbers of its rows share the teacher.
    """
    return _open_teacher(name, dataset.name, resolve_languages(name, dataset))


@lru_cache(maxsize=2)
def _open_teacher(name: str, dataset: str, languages: Languages | None) -> Teacher:
    preset, where = teacher_preset(name, dataset), locate_checkpoint(name, dataset)
    tokenizer = load_tokenizer(where, languages)
    model = _load_frozen_model(where, tokenizer)
    alignment = check_full_depth_copy(model, name)
    teacher = Teacher(where, tokenizer, teacher_key(where), preset, alignment, languages, hub_commit(where))
    teacher.__dict__["model"] = model  # read once
    return teacher


def _load_frozen_model(location: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    model = load_model(location)
    set_target_language(model, tokenizer)
    return model.requires_grad_(False)


def load_tokenized_data(
    run: Run, preset: TeacherPreset | None, tokenizer: PreTrainedTokenizerBase, model_config: Any
) -> TokenizedData:
    """Read and tokenise the splits; the test split is optional."""
    source = resolve_max_tokens("max_source_tokens", run.dataset, preset, model_config)
    target = resolve_max_tokens("max_target_tokens", run.dataset, preset, model_config)
    metric = resolve_metric(run.dataset.name, run.evaluation.metric)
    corpora = {split: c for split in ("train", "validation", "test") if (c := read_split(run.dataset, split))}
    if "train" not in corpora or "validation" not in corpora:
        raise UserError(
            f"{run.dataset.name}: training needs a train and a validation split; found {', '.join(corpora) or 'none'}"
        )
    sources = {
        split: tokenize_split(tokenizer, run.dataset, split, "source", source) for split in ("train", "validation")
    }
    return TokenizedData(corpora, sources, source, target, metric)


@lru_cache(maxsize=8)
def read_split(dataset: Dataset, split: str) -> Corpus | None:
    """A split, read once per process; None where the data set does not have it."""
    return read_corpus(dataset, split) if split in split_names(dataset) else None


def make_examples(
    run: Run, data: TokenizedData, tokenizer: PreTrainedTokenizerBase, label_folders: Mapping[str, Path]
) -> Examples:
    """The tokenised training pairs, with the labels that the run asks for.

    `label_folders` are the folders of the label sets that teachers wrote, by source (pseudo, pseudo@TEACHER).
    """
    labels = tuple(parse_labels(run.resolved_labels))
    folders = [
        (p.spec, Path(p.folder) if p.folder else label_folders.get(p.spec)) for p in labels if p.spec != "original"
    ]
    found = tuple((source, folder) for source, folder in folders if folder is not None)
    return _make_examples(tokenizer, run.dataset, labels, found, data.max_source_tokens, data.max_target_tokens)


@lru_cache(maxsize=4)
def _make_examples(
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    labels: tuple[LabelSource, ...],
    label_folders: tuple[tuple[str, Path], ...],
    max_source_tokens: int,
    max_target_tokens: int,
) -> Examples:
    """Made once per process, so that the next trial on the same pairs starts at once."""
    corpus = read_split(dataset, "train")
    assert corpus is not None
    sets = {source: read_label_set(folder) for source, folder in label_folders}
    rows, targets = select_targets(corpus.ids, corpus.targets, labels, sets)
    return Examples(
        tokenize_split(tokenizer, dataset, "train", "source", max_source_tokens),
        tokenize_targets(tokenizer, targets, max_target_tokens),
        rows,
    )


@lru_cache(maxsize=8)
def tokenize_split(
    tokenizer: PreTrainedTokenizerBase, dataset: Dataset, split: str, side: str, max_length: int
) -> list[list[int]]:
    """Token ids of a split's sources or targets, made once per process."""
    corpus = read_split(dataset, split)
    assert corpus is not None
    if side == "source":
        return tokenize_sources(tokenizer, corpus.sources, max_length)
    return tokenize_targets(tokenizer, corpus.targets, max_length)
