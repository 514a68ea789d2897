"""A handed-over student as MLflow loads it: `mlflow.pyfunc.load_model(...)` and `mlflow models serve`."""

import json
from pathlib import Path
from typing import Any

import torch

from raydistill.config.run import Decoding
from raydistill.core.files import CARD
from raydistill.core.machine import own_cores
from raydistill.inference.decoding import Engine, resolve_decoding
from raydistill.inference.engines import open_engine


class Student:
    """Writes a text for each source, with the engine that serves best here and the decoding that was chosen."""

    def __init__(self, engine: Engine, max_source_tokens: int) -> None:
        self.engine = engine
        self.max_source_tokens = max_source_tokens
        self.beam = resolve_decoding(Decoding(), engine.generation, None, 128)

    def predict(self, sources: Any, params: dict[str, Any] | None = None) -> list[str]:
        """Sources as a list of texts, or a table whose first column holds them; returns a text each."""
        texts = sources.iloc[:, 0].tolist() if hasattr(sources, "iloc") else _listed(sources)
        found = self.engine.generate(texts, self.beam, max_source_tokens=self.max_source_tokens)
        return [hypotheses[0].text.strip() for hypotheses in found]


def _load_pyfunc(path: str, settings: dict[str, Any] | None = None) -> Student:
    """What MLflow calls with the folder that holds the checkpoint, and `registry.SETTINGS` as a person changed them.

    By default the engine, the device and the threads are those with which a sweep times its finalists: the run's
    engine, a GPU where there is one, else all cores.
    """
    folder = Path(path)
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    languages = tuple(card["languages"]) if card.get("languages") else None
    kind = (card["config"].get("evaluation") or {}).get("engine", "auto")
    device, threads = _place(**(settings or {}))
    engine = open_engine(folder, kind, device=device, threads=threads, languages=languages)
    return Student(engine, card["max_source_tokens"])


def _place(device: str = "auto", threads: int | str = "all") -> tuple[str, int]:
    """The device to serve on and its CPU threads; a ValueError where `threads` is no number."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads == "all":
        threads = len(own_cores())
    return device, int(threads)


def _listed(sources: Any) -> list[str]:
    return [sources] if isinstance(sources, str) else [str(source) for source in sources]
