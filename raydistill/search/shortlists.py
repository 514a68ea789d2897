"""The shortlists of a sweep: vocabulary maps from the training targets and the label sets of the sweep.

A shortlist is an artifact below RAYDISTILL_HOME/shortlists, whose name is a hash of what the list was made from:
tokenizer, training split, label sets and the rules of the list. It is made once, after the label sets exist.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from raydistill.cluster import snapshots
from raydistill.config.label_sources import parse_labels
from raydistill.config.presets import joins_lines, teacher_preset
from raydistill.config.run import Dataset, Run
from raydistill.config.space import Space
from raydistill.core import artifact
from raydistill.core.artifact import Manifest
from raydistill.core.console import print_progress
from raydistill.core.errors import UserError
from raydistill.core.hashing import content_hash
from raydistill.core.paths import raydistill_home
from raydistill.data.corpus import Corpus
from raydistill.data.extra import read_extra
from raydistill.data.selection import selection_split
from raydistill.evaluation.latency import LATENCY_BATCH_SIZES
from raydistill.inference.shortlist import (
    MAP_FILE,
    Shortlist,
    fixed_shortlist,
    kept_tokens,
    measure_coverage,
    source_shortlist,
    stored_map,
    write_map,
)
from raydistill.inference.word_alignment import Rows, translation_probabilities
from raydistill.label_sets.label_set import read_label_set
from raydistill.models.fingerprints import settings_fingerprint
from raydistill.models.loading import load_config, locate_checkpoint
from raydistill.models.tokenization import (
    load_tokenizer,
    resolve_languages,
    resolve_max_tokens,
    tokenize_sources,
    tokenize_targets,
    tokens_by_id,
)
from raydistill.results.sweep_record import ShortlistCoverage, SweepTeacher
from raydistill.training.tokenized_data import read_split

KIND = "shortlist"
FORMAT = 1  # part of the key; raise it when the code makes another list from equal inputs
# Of a `source` list: likely translations of each source token, and most used tokens that are always allowed.
NUM_CANDIDATES = 20
NUM_MOST_USED = 1000


class ShortlistManifest(Manifest):
    """The manifest of a shortlist with its coverage."""

    coverage: ShortlistCoverage


@dataclass(frozen=True)
class ShortlistInputs:
    """What the shortlists of a sweep are made from.

    Attributes:
        checkpoint: The teacher, whose tokenizer the students share.
        dataset: The data set.
        languages: Languages of source and target, where the tokenizer needs them.
        label_folders: The label sets that trials are trained on.
        extra_folder: The extra sources, whose labels are among the label sets; None for none.
        max_source_tokens: Length at which sources are cut.
        max_target_tokens: Length at which targets are cut.
    """

    checkpoint: str
    dataset: Dataset
    languages: tuple[str, str] | None
    label_folders: tuple[Path, ...]
    extra_folder: Path | None
    max_source_tokens: int
    max_target_tokens: int

    @classmethod
    def of_sweep(cls, runs: Sequence[Run], teacher: SweepTeacher) -> "ShortlistInputs":
        """The inputs of a sweep with these runs. All runs share teacher and data set."""
        run = runs[0]
        checkpoint = locate_checkpoint(str(run.teacher), run.dataset.name)
        preset, config = teacher_preset(str(run.teacher), run.dataset.name), load_config(checkpoint)
        return cls(
            checkpoint,
            run.dataset,
            resolve_languages(run.teacher, run.dataset),
            label_set_folders(runs, teacher),
            extra_sources_folder(teacher),
            resolve_max_tokens("max_source_tokens", run.dataset, preset, config),
            resolve_max_tokens("max_target_tokens", run.dataset, preset, config),
        )

    def key(self, name: str | int) -> str:
        """The content key of a shortlist of these inputs."""
        content = {
            "format": FORMAT,
            "shortlist": name,
            "source": [NUM_CANDIDATES, NUM_MOST_USED],
            "tokenizer": settings_fingerprint(self.checkpoint),
            "languages": self.languages,
            "source_prefix": self.dataset.source_prefix,
            "join_lines": joins_lines(self.dataset.name),
            "data": [self._corpus("train").fingerprint, self._held_out.fingerprint],
            "labels": [folder.name for folder in self.label_folders],
            "max_tokens": [self.max_source_tokens, self.max_target_tokens],
        }
        return content_hash(content)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The teacher's tokenizer."""
        return load_tokenizer(self.checkpoint, self.languages, self.dataset.source_prefix)

    @cached_property
    def kept(self) -> set[int]:
        """The ids that every list allows."""
        return kept_tokens(self.tokenizer, load_config(self.checkpoint))

    @cached_property
    def training_rows(self) -> tuple[Rows, Rows]:
        """Token ids of sources and targets: the original rows, then the rows of every label set."""
        corpus = self._corpus("train")
        sources, targets = list(corpus.sources), list(corpus.targets)
        source_by_id = dict(zip(corpus.ids, corpus.sources, strict=True))
        if self.extra_folder:
            extra = read_extra(self.extra_folder)
            source_by_id |= zip(extra.ids, extra.sources, strict=True)
        for folder in self.label_folders:
            labels = read_label_set(folder).targets
            labelled = [row_id for row_id, text in labels.items() if text.strip() and row_id in source_by_id]
            sources += [source_by_id[row_id] for row_id in labelled]
            targets += [labels[row_id] for row_id in labelled]
        return self._tokenize(sources, targets)

    def make(self, name: str | int) -> Shortlist:
        """The shortlist with a name of the space: "source" or a number of tokens."""
        sources, targets = self.training_rows
        if isinstance(name, int):
            return fixed_shortlist(targets, name, self.kept)
        translations = translation_probabilities(sources, targets)
        return source_shortlist(sources, targets, translations, NUM_CANDIDATES, NUM_MOST_USED, self.kept)

    def coverage(self, shortlist: Shortlist, folder: str) -> ShortlistCoverage:
        """What a shortlist excludes on the rows that students are chosen on."""
        corpus = self._held_out
        sources, targets = self._tokenize(list(corpus.sources), list(corpus.targets))
        single = measure_coverage(shortlist, sources, targets)
        batch = measure_coverage(shortlist, sources, targets, LATENCY_BATCH_SIZES["latency_ms"])
        return ShortlistCoverage(
            folder=folder,
            allowed_tokens=single.mean_allowed,
            allowed_tokens_batch=batch.mean_allowed,
            share_of_tokens_outside=single.share_of_tokens_outside,
            share_of_rows_outside=single.share_of_rows_outside,
        )

    def _tokenize(self, sources: list[str], targets: list[str]) -> tuple[Rows, Rows]:
        return (
            tokenize_sources(self.tokenizer, sources, self.max_source_tokens),
            tokenize_targets(self.tokenizer, targets, self.max_target_tokens, joins_lines(self.dataset.name)),
        )

    @property
    def _held_out(self) -> Corpus:
        return self._corpus(selection_split(self.dataset))

    def _corpus(self, split: str) -> Corpus:
        corpus = read_split(self.dataset, split)
        assert corpus is not None, split
        return corpus


def ensure_shortlists(space: Space, runs: Sequence[Run], teacher: SweepTeacher) -> dict[str, ShortlistCoverage]:
    """Make the missing shortlists of a space, print what each excludes, and return the coverage by name.

    Raises:
        UserError: A label set of the sweep was deleted, or a token cannot be written to a vocabulary map.
    """
    names = space.serving.named_shortlists
    if not names:
        return {}
    inputs = ShortlistInputs.of_sweep(runs, teacher)
    coverages = {}
    for name in names:
        coverage = _ensure_shortlist(inputs, name)
        coverages[str(name)] = coverage
        print_progress(
            f"shortlist {name}: allows {coverage.allowed_tokens:,.0f} tokens for one text and "
            f"{coverage.allowed_tokens_batch:,.0f} for 32 texts, of {len(tokens_by_id(inputs.tokenizer)):,}; "
            f"{coverage.share_of_tokens_outside:.1%} of the tokens of the references that students are chosen on are "
            f"outside, in {coverage.share_of_rows_outside:.1%} of the references"
        )
    return coverages


def label_set_folders(runs: Sequence[Run], teacher: SweepTeacher) -> tuple[Path, ...]:
    """The label sets that the trials of a sweep are trained on.

    Raises:
        UserError: A label set was deleted.
    """
    named = {Path(part.folder) for run in runs for part in parse_labels(run.resolved_labels) if part.folder}
    by_name = {path.name: path for path in named}
    folders = [by_name.get(name, raydistill_home() / "labels" / name) for name in sorted(teacher.label_sets)]
    snapshots.pull(*folders)
    for folder in folders:
        if not artifact.is_complete(folder):
            raise UserError(
                f"{folder}: the label set was deleted, so that no shortlist can be made from its texts; label the "
                f"training split again with `raydistill pseudolabel`, or set serving.shortlist=[off]"
            )
    return tuple(folders)


def extra_sources_folder(teacher: SweepTeacher) -> Path | None:
    """The extra sources of a sweep; None for none.

    Raises:
        UserError: They were deleted.
    """
    if teacher.extra is None:
        return None
    folder = raydistill_home() / "extra" / teacher.extra.folder
    snapshots.pull(folder)
    if not artifact.is_complete(folder):
        raise UserError(
            f"{folder}: the extra sources were deleted, so that no shortlist can be made from their labels; run the "
            f"sweep again, or set serving.shortlist=[off]"
        )
    return folder


def _ensure_shortlist(inputs: ShortlistInputs, name: str | int) -> ShortlistCoverage:
    key = inputs.key(name)
    folder = stored_map(key).parent
    snapshots.pull(folder)
    with artifact.lock(folder, math.inf, print_progress):
        manifest = artifact.open_if_whole(folder, ShortlistManifest, KIND)
        if manifest is None:
            shortlist = inputs.make(name)
            manifest = ShortlistManifest(kind=KIND, key=key, coverage=inputs.coverage(shortlist, key))
            with artifact.build(folder, lambda: manifest) as temporary:
                write_map(temporary / MAP_FILE, shortlist, tokens_by_id(inputs.tokenizer))
    snapshots.save(folder)
    return manifest.coverage
