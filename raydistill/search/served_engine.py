"""Opens checkpoints of a sweep with the engine variants that students are served with."""

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from raydistill.config.metric_names import MetricChoice
from raydistill.config.run import Run
from raydistill.config.serving import EngineVariant, ServingConfig, ThroughputSetting
from raydistill.data.selection import selection_split
from raydistill.evaluation.latency import engine_version
from raydistill.inference.decoding import BeamSearchParams, Engine, EngineOptions
from raydistill.inference.engines import open_engine
from raydistill.inference.shortlist import restrict_map
from raydistill.models import conversions
from raydistill.models.tokenization import load_tokenizer, resolve_languages, source_limit, tokens_by_id
from raydistill.results.serving_latency import TEACHER_SHAPE
from raydistill.training.tokenized_data import read_split

ENGINE_LIBRARIES = ("ctranslate2", "transformers")


@dataclass(frozen=True)
class ServedCheckpoint:
    """A checkpoint of a sweep: the teacher, or a finalist.

    Attributes:
        key: Key of the trial; `TEACHER_SHAPE` for the teacher.
        shape: Size of the student; `TEACHER_SHAPE` for the teacher.
        checkpoint: Folder or hub name.
        folder: The folder of served.json and of the per-row statistics.
        decoding: The checkpoint's own decoding.
    """

    key: str
    shape: str
    checkpoint: str
    folder: Path
    decoding: BeamSearchParams

    @property
    def is_teacher(self) -> bool:
        """Whether the checkpoint is the teacher."""
        return self.shape == TEACHER_SHAPE

    def own_config(self, precision: str = "fp32") -> ServingConfig:
        """The serving configuration of the checkpoint's own decoding, with the whole vocabulary."""
        fields = {"beams": self.decoding.beams, "length_penalty": self.decoding.length_penalty}
        return ServingConfig.model_validate({**fields, "precision": precision})

    def beam(self, config: ServingConfig) -> BeamSearchParams:
        """The checkpoint's own decoding with the beams and the length penalty of a configuration."""
        return replace(self.decoding, beams=config.beams, length_penalty=config.length_penalty)

    @property
    def input_paths(self) -> list[Path]:
        """The paths that another machine needs to open the checkpoint. A trial's folder is stored as a whole."""
        path = Path(self.checkpoint)
        return [self.folder if path.is_relative_to(self.folder) else path]


@dataclass(frozen=True)
class ServingContext:
    """What every task that serves checkpoints of a sweep needs.

    Attributes:
        run: A run of the sweep, which names teacher, data set and engine.
        metrics: The metrics that served students are scored by.
        sweep_id: A name that no other sweep has, for converted models.
        maps: The vocabulary map of each shortlist.
    """

    run: Run
    metrics: MetricChoice
    sweep_id: str
    maps: Mapping[str | int, Path] = field(default_factory=dict)

    @property
    def cache_dir(self) -> Path:
        """Where the tasks of a command keep converted models; `remove_serving_cache` deletes the folder."""
        return conversions.serving_folder(self.sweep_id)

    @property
    def split(self) -> str:
        """The split that students are scored, timed and chosen on."""
        return selection_split(self.run.dataset)

    @cached_property
    def sources(self) -> list[str]:
        """The source texts of `split`, read once in each task."""
        corpus = read_split(self.run.dataset, self.split)
        assert corpus is not None, self.split
        return list(corpus.sources)

    def max_source_tokens(self, checkpoint: str) -> int:
        """The number of source tokens that a checkpoint reads."""
        return source_limit(str(self.run.teacher), self.run.dataset, checkpoint)


def open_served_engine(
    context: ServingContext, checkpoint: str, variant: EngineVariant, device: str, threads: int | ThroughputSetting
) -> Engine:
    """Open a checkpoint with a precision and a shortlist. Several engines may be open at once.

    `threads` is the number of threads that share each batch, or a setting with several batches at once.
    """
    run = context.run
    languages = resolve_languages(run.teacher, run.dataset)
    options = EngineOptions(
        device=device,
        precision=variant.precision,
        languages=languages,
        source_prefix=run.dataset.source_prefix,
        cache_dir=context.cache_dir,
    )
    if isinstance(threads, ThroughputSetting):
        options = options.with_setting(threads)
    else:
        options = replace(options, threads=threads)
    if variant.shortlist == "off":
        return open_engine(checkpoint, run.evaluation.engine, options)
    with tempfile.TemporaryDirectory(prefix="raydistill-map-") as scratch:
        tokens = tokens_by_id(load_tokenizer(checkpoint, languages, run.dataset.source_prefix))
        path = restrict_map(context.maps[variant.shortlist], tokens, Path(scratch))
        return open_engine(checkpoint, run.evaluation.engine, replace(options, shortlist=path))


def engine_versions() -> dict[str, str]:
    """The installed versions of the engines' libraries."""
    return {name: engine_version(name) for name in ENGINE_LIBRARIES}
