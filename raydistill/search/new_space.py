"""Writes the space file of a user's data and teacher, and the recipe of a new teacher, for `raydistill init`."""

import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import yaml

from raydistill.config.examples import FOLDER as SCHEMA_FOLDER
from raydistill.config.loader import read_yaml
from raydistill.config.metric_names import MetricChoice
from raydistill.config.presets import DATASETS, is_translation, resolve_metrics, translation_evidence
from raydistill.config.run import Columns, Dataset, Run
from raydistill.config.space import read_space
from raydistill.config.validation import validate
from raydistill.core.files import write_atomic
from raydistill.core.paths import raydistill_home
from raydistill.search.user_inputs import UserData, UserTeacher, design_teacher, read_teacher

MAX_VALIDATION_ROWS = 2000
STUDENT_ROWS, TEACHER_ROWS = 48_000, 64_000  # rows that a training reads in all, where the data are few
BATCH_SIZE = 32
TRIALS_PER_SIZE = 6
# Widest model -> range of the learning rate with several decoder layers, and with a single one (docs/spaces.md)
LEARNING_RATES = {
    256: ((3e-4, 2e-3), (5e-4, 4e-3)),
    512: ((2e-4, 2e-3), (4e-4, 4e-3)),
    math.inf: ((1e-4, 2e-3), (3e-4, 4e-3)),
}


@dataclass(frozen=True)
class Request:
    """What the user asks for.

    Attributes:
        name: Name of the sweep.
        dataset: The data set, with the user's columns and languages.
        teacher: The teacher; None: a new one.
        metric: The metric of the task, or "auto".
        path: The space file. The recipe of a new teacher is next to it.
    """

    name: str
    dataset: Dataset
    teacher: str | None
    metric: str
    path: Path


@dataclass(frozen=True)
class Draft:
    """The values of the two templates, in addition to the data and the teacher.

    Attributes:
        name: Name of the sweep.
        file: Name of the space file.
        teacher: The value of `run.teacher`.
        dataset: The data set with all settings that it needs.
        metrics: The metrics.
        is_translation: Whether the task is a translation.
        sizes: Sizes of students.
        learning_rates: Cases of the learning rate: sizes, and the bounds for them.
        epochs, teacher_epochs: Epochs of a student and of a new teacher.
        warmup_steps: Warm-up of a student.
    """

    name: str
    file: str
    teacher: str
    dataset: Dataset
    metrics: MetricChoice
    is_translation: bool
    sizes: list[str]
    learning_rates: list[tuple[list[str], tuple[float, float]]]
    epochs: int
    teacher_epochs: int
    warmup_steps: int

    @property
    def dataset_settings(self) -> dict[str, Any]:
        """The keys of `run.dataset` that are set."""
        return self.dataset.model_dump(mode="json", exclude_defaults=True, exclude_none=True)

    @property
    def evaluation_settings(self) -> dict[str, Any]:
        """The keys of `run.evaluation`."""
        report = {"report": list(self.metrics.reported)} if self.metrics.reported else {}
        return {"metric": self.metrics.deciding, **report}

    @property
    def trials(self) -> int:
        """Number of trials."""
        return TRIALS_PER_SIZE * len(self.sizes)

    @property
    def point(self) -> dict[str, Any]:
        """Size and learning rate of the first points: the middle size, and the middle of its range of rates."""
        size = self.sizes[(len(self.sizes) - 1) // 2]
        bounds = next(bounds for sizes, bounds in self.learning_rates if size in sizes)
        return {"student.size": size, "training.learning_rate": float(f"{math.sqrt(math.prod(bounds)):.1g}")}


@dataclass(frozen=True)
class WrittenSpace:
    """The files of `raydistill init`.

    Attributes:
        draft: What was chosen.
        teacher: The teacher.
        space: The space file.
        recipe: The run file of a new teacher; None if the teacher exists.
    """

    draft: Draft
    teacher: UserTeacher
    space: Path
    recipe: Path | None

    def summary(self) -> list[str]:
        """What was chosen, and the next commands, in lines."""
        draft, source, target = self.draft, self.teacher.source, self.teacher.target
        train = [f"raydistill train {self.recipe}"] if self.recipe else []
        return [
            f"{self.space}: sizes {', '.join(draft.sizes)} of a {self.teacher.encoder_layers}-"
            f"{self.teacher.decoder_layers} teacher, {draft.metrics.deciding}, {draft.trials} trials of "
            f"{draft.epochs} epochs",
            f"lengths: 99 % of the sources have at most {source.p99} tokens, 99 % of the targets {target.p99}",
            "next: " + "; ".join([*train, f"raydistill sweep {self.space} --dry-run"]),
        ]

    def to_json(self) -> dict[str, Any]:
        """The result for `--json`."""
        draft = self.draft
        return {
            "space": str(self.space),
            "teacher_run": str(self.recipe) if self.recipe else None,
            "name": draft.name,
            "teacher": draft.teacher,
            "dataset": draft.dataset_settings,
            "metric": draft.metrics.deciding,
            "report": list(draft.metrics.reported),
            "sizes": draft.sizes,
            "trials": draft.trials,
        }


def choose_metrics(dataset: Dataset, metric: str, data: UserData) -> MetricChoice:
    """The metrics of a data set. For "auto", a translation is recognised also by its texts, unlike in a run."""
    evidence = "its texts" if data.task.is_translation else ""
    return resolve_metrics(dataset, metric, columns=data.corpus.columns, evidence=evidence)


def is_guessed_translation(dataset: Dataset, data: UserData) -> bool:
    """Whether the texts alone show that the data are a translation: there are no languages, and no names of columns."""
    is_known = dataset.name in DATASETS or translation_evidence(dataset, data.corpus.columns)
    return data.task.is_translation and not is_known


def write_space(request: Request, data: UserData) -> WrittenSpace:
    """Write the space file, and the recipe of a new teacher if the request names no teacher.

    The files are loaded as `raydistill sweep` and `raydistill train` load them before they get their names.

    Args:
        request: The user's choices.
        data: The data set of the request, read.

    Raises:
        UserError: The teacher or its tokenizer cannot be loaded, or the languages are unknown.
    """
    metrics = choose_metrics(request.dataset, request.metric, data)
    # By languages, columns, or the metric that is requested or chosen
    translates = is_translation(request.dataset, metrics.deciding, data.corpus.columns)
    if request.teacher is None:
        teacher = design_teacher(data, translates)
    else:
        teacher = read_teacher(request.teacher, request.dataset, data, translates)
    draft = draft_space(request, data, teacher, metrics, translates)
    recipe = recipe_path(request.path) if teacher.new_model else None
    if recipe is not None:
        _write_checked(recipe, _render("teacher.yaml.jinja", draft, data, teacher), _check_run_file)
    _write_checked(request.path, _render("space.yaml.jinja", draft, data, teacher), read_space)
    return WrittenSpace(draft, teacher, request.path, recipe)


def draft_space(
    request: Request, data: UserData, teacher: UserTeacher, metrics: MetricChoice, translates: bool
) -> Draft:
    """Choose the values of a space and of the recipe of a new teacher.

    Args:
        request: The user's choices.
        data: The data set of the request.
        teacher: The teacher.
        metrics: The metrics of the data.
        translates: Whether the task is a translation.
    """
    rows, sizes = data.rows["train"], student_sizes(teacher.encoder_layers, teacher.decoder_layers)
    epochs = max(2, min(20, round(STUDENT_ROWS / rows)))
    return Draft(
        name=request.name,
        file=request.path.name,
        teacher=request.teacher or _new_teacher_path(request.name),
        dataset=_complete_dataset(request.dataset, data, teacher),
        metrics=metrics,
        is_translation=translates,
        sizes=sizes,
        learning_rates=learning_rate_cases(sizes, teacher.width),
        epochs=epochs,
        teacher_epochs=max(3, min(40, round(TEACHER_ROWS / rows))),
        warmup_steps=max(1, min(500, round(0.05 * epochs * rows / BATCH_SIZE))),
    )


def student_sizes(encoder: int, decoder: int) -> list[str]:
    """Sizes to search: a half and a quarter of the decoder's layers, and one layer; the encoder keeps its layers.

    A decoder of one layer stays, and the encoder shrinks instead.
    """
    if decoder > 1:
        return [f"{encoder}-{layers}" for layers in _smaller_depths(decoder)]
    return [f"{layers}-1" for layers in _smaller_depths(encoder)]


def learning_rate_cases(sizes: list[str], width: int) -> list[tuple[list[str], tuple[float, float]]]:
    """Sizes with several decoder layers and sizes with a single one, each with the bounds of their learning rate."""
    deep, single = next(rates for limit, rates in LEARNING_RATES.items() if width <= limit)
    is_single = {size: size.endswith("-1") for size in sizes}
    cases = [([s for s in sizes if not is_single[s]], deep), ([s for s in sizes if is_single[s]], single)]
    return [(own, bounds) for own, bounds in cases if own]


def recipe_path(space: Path) -> Path:
    """The run file of a new teacher, next to the space file."""
    return space.with_name(f"{space.stem}-teacher.yaml")


def _smaller_depths(layers: int) -> list[int]:
    depths = {math.ceil(layers / 2), math.ceil(layers / 4), 1} - {layers}
    return sorted(depths, reverse=True) or [layers]


def _new_teacher_path(name: str) -> str:
    """The checkpoint of a teacher that is trained from a recipe, relative to the working directory if below it."""
    path = raydistill_home() / "runs" / f"{name}-teacher" / "best"
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def _complete_dataset(dataset: Dataset, data: UserData, teacher: UserTeacher) -> Dataset:
    """The data set with the lengths of its texts and the settings that its rows need."""
    update: dict[str, Any] = {}
    if data.num_bad:
        update["skip_bad_rows"] = True
    if data.has_duplicates:
        columns = data.corpus.columns
        update["columns"] = Columns(source=columns.source, target=columns.target, id="")
    if data.rows["validation"] > MAX_VALIDATION_ROWS:
        update["validation_rows"] = MAX_VALIDATION_ROWS
    if teacher.new_model or dataset.name not in DATASETS:  # named data sets have their own lengths
        update |= {"max_source_tokens": teacher.source.limit, "max_target_tokens": teacher.target.limit}
    if teacher.languages:
        update["languages"] = teacher.languages
    return dataset.model_copy(update=update)


def _render(name: str, draft: Draft, data: UserData, teacher: UserTeacher) -> str:
    environment = jinja2.Environment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["yaml"] = _yaml_value
    template = environment.from_string(Path(__file__).with_name(name).read_text(encoding="utf-8"))
    rows = ", ".join(f"{count:,} {split} rows" for split, count in data.rows.items())
    schemas = SCHEMA_FOLDER.resolve()
    return template.render(draft=draft, data=data, teacher=teacher, rows=rows, schemas=schemas, batch_size=BATCH_SIZE)


def _yaml_value(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=math.inf, sort_keys=False)
    return str(text).strip().removesuffix("...").strip()


def _write_checked(path: Path, text: str, check: Callable[[Path], object]) -> None:
    """Write a file once `check` has loaded its text."""
    with tempfile.TemporaryDirectory() as folder:
        draft = Path(folder) / path.name
        draft.write_text(text, encoding="utf-8")
        check(draft)
    write_atomic(path, text.encode("utf-8"))


def _check_run_file(path: Path) -> None:
    data, lines = read_yaml(path)
    validate(Run, data, path, lines)
