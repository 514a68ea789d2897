"""Serves an exported student through MLflow: `mlflow.pyfunc.load_model(...)` and `mlflow models serve`."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from raydistill.config.run import Decoding
from raydistill.config.serving import ServingRecord
from raydistill.core.console import print_progress
from raydistill.core.machine import available_cores
from raydistill.inference.decoding import DEFAULT_TARGET_TOKENS, Engine, EngineOptions, resolve_decoding
from raydistill.inference.engines import open_engine, supported_precisions
from raydistill.models.loading import load_config
from raydistill.models.metadata import CheckpointMetadata


class PyfuncStudent:
    """Generates a text for each source with the decoding of the checkpoint's generation config."""

    def __init__(self, engine: Engine, max_source_tokens: int) -> None:
        self.engine = engine
        self.max_source_tokens = max_source_tokens
        self.beam = resolve_decoding(Decoding(), engine.generation_config, None, DEFAULT_TARGET_TOKENS)

    def predict(self, sources: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Return one text per source. `sources`: a text, a list of texts, or a table with the texts in column one."""
        texts = sources.iloc[:, 0].tolist() if hasattr(sources, "iloc") else _as_list(sources)
        results = self.engine.generate(texts, self.beam, max_source_tokens=self.max_source_tokens)
        return [hypotheses[0].text.strip() for hypotheses in results]


def _load_pyfunc(path: str, settings: dict[str, Any] | None = None) -> PyfuncStudent:
    """MLflow's entry point: open the checkpoint in folder `path` with the `device` and `threads` of `settings`.

    The student is opened with the precision, shortlist and decoding of its scores. By default, device and threads are
    chosen as in a sweep: a GPU if one is available, else the CPU threads with which the sweep measured latency.
    MLflow requires this function name.
    """
    return open_student(Path(path), **(settings or {}))


def open_student(folder: Path, device: str = "auto", threads: int | str = "auto") -> PyfuncStudent:
    """Open an exported student with the precision, shortlist and decoding that it was scored with.

    Args:
        folder: The export.
        device: "cpu" or "cuda"; "auto" is a GPU if one is available.
        threads: CPU threads; "auto" is the number with which the sweep measured latency, at most the cores that the
            process may use; "all" are these cores.
    """
    metadata = CheckpointMetadata.read_from(folder)
    assert metadata.serving is not None, "only exported students are served"
    engine_name = metadata.config.evaluation.engine if metadata.config else "auto"
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    threads = _resolve_threads(threads, metadata.serving.threads)
    options = serving_options(folder, metadata.serving, EngineOptions(device, threads), engine_name)
    return PyfuncStudent(open_engine(folder, engine_name, options), metadata.serving.max_source_tokens)


def serving_options(folder: Path, serving: ServingRecord, options: EngineOptions, engine_name: str) -> EngineOptions:
    """The options with the precision, languages and shortlist of an exported student.

    On a device that does not compute in this precision, the default precision of the device is used, with a warning.
    """
    precision: str = serving.config.precision
    if precision not in supported_precisions(engine_name, options.device, load_config(folder).model_type):
        print_progress(f"this {options.device} does not compute in {precision}; the default precision is used")
        precision = "auto"
    shortlist = folder / serving.vocabulary_map if serving.vocabulary_map else None
    return replace(options, precision=precision, languages=serving.languages, shortlist=shortlist)


def _resolve_threads(threads: int | str, measured: int | None) -> int:
    """Replace "auto" and "all"; raise ValueError if `threads` is not a number."""
    cores = len(available_cores())
    if threads == "auto":
        return min(measured or cores, cores)
    return cores if threads == "all" else int(threads)


def _as_list(sources: Any) -> list[str]:
    return [sources] if isinstance(sources, str) else [str(source) for source in sources]
