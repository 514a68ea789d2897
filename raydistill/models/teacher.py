"""A teacher with everything that depends on the teacher and the data set alone."""

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from transformers import PreTrainedTokenizerBase

from raydistill.config.presets import TeacherPreset, teacher_preset
from raydistill.config.run import Dataset
from raydistill.core.machine import malloc_trim
from raydistill.models.fingerprints import teacher_key
from raydistill.models.hub import hub_commit
from raydistill.models.loading import load_model, locate_checkpoint
from raydistill.models.shrinking import check_full_depth_copy
from raydistill.models.tokenization import Languages, load_tokenizer, resolve_languages, set_target_language
from raydistill.models.vocabulary import trim_model, trim_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Teacher:
    """A teacher that the runs of one process share.

    Attributes:
        location: Its folder, or its name and revision on the hub.
        tokenizer: Its tokenizer, with the languages of the data set.
        key: Content key of the weights and of the settings that change a forward pass (`teacher_key`).
        preset: Its preset; None for a checkpoint without one.
        alignment_error: Largest difference of the logits of a full-depth copy, relative to the largest logit.
        languages: Source and target language; None where the model has none.
        source_prefix: The text before every source that the data set names; None for the teacher's own.
        commit: Commit of the loaded files on the hub; None for a folder.
        token_ids: Of a teacher whose vocabulary is trimmed to the vocabulary of a student, the ids of the tokens in the
            full vocabulary. Trimming changes no hidden state, and removes the logits of the other tokens.
    """

    location: str
    tokenizer: PreTrainedTokenizerBase
    key: str
    preset: TeacherPreset | None
    alignment_error: float
    languages: Languages | None
    source_prefix: str | None
    commit: str | None
    token_ids: tuple[int, ...] | None = None

    @cached_property
    def model(self) -> "PreTrainedModel":
        """The frozen model on the CPU; loaded at the first access, and again after `unload_model`."""
        model = load_model(self.location)
        return _freeze(model if self.token_ids is None else trim_model(model, self.token_ids), self.tokenizer)

    def unload_model(self) -> None:
        """Free the memory of the weights."""
        self.__dict__.pop("model", None)
        malloc_trim()


def open_teacher(name: str, dataset: Dataset, token_ids: tuple[int, ...] | None = None) -> Teacher:
    """Open a teacher once per process, and check its weights.

    The teacher depends on the name, the languages and the prefix of the data set: runs on different numbers of rows
    share it. `token_ids` trims the vocabulary of tokenizer and model to these tokens; the teacher's key stays the same.

    Raises:
        UserError: The checkpoint cannot be loaded, or a full-depth copy gives other logits.
    """
    teacher = _open_teacher(name, dataset.name, resolve_languages(name, dataset), dataset.source_prefix)
    return teacher if token_ids is None else _trim_teacher(teacher, token_ids)


@lru_cache(maxsize=2)
def _trim_teacher(teacher: Teacher, token_ids: tuple[int, ...]) -> Teacher:
    trimmed = replace(teacher, tokenizer=trim_tokenizer(teacher.tokenizer, token_ids), token_ids=token_ids)
    trimmed.__dict__["model"] = _freeze(trim_model(teacher.model, token_ids), trimmed.tokenizer)
    teacher.unload_model()
    return trimmed


@lru_cache(maxsize=2)
def _open_teacher(name: str, dataset: str, languages: Languages | None, source_prefix: str | None) -> Teacher:
    preset, location = teacher_preset(name, dataset), locate_checkpoint(name, dataset)
    tokenizer = load_tokenizer(location, languages, source_prefix)
    model = _freeze(load_model(location), tokenizer)
    alignment_error = check_full_depth_copy(model, name)
    key, commit = teacher_key(location), hub_commit(location)
    teacher = Teacher(location, tokenizer, key, preset, alignment_error, languages, source_prefix, commit)
    teacher.__dict__["model"] = model  # the value of the cached property: the weights are read once
    return teacher


def _freeze(model: "PreTrainedModel", tokenizer: PreTrainedTokenizerBase) -> "PreTrainedModel":
    set_target_language(model, tokenizer)
    return model.requires_grad_(False)
