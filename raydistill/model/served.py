"""A handed-over student as MLflow loads it: `mlflow.pyfunc.load_model(...)` and `mlflow models serve`."""

import json
from pathlib import Path
from typing import Any

from raydistill.config.files import CARD
from raydistill.config.run import Decoding
from raydistill.model.decoding import Engine, resolve_decoding
from raydistill.model.generate import open_engine


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


def _load_pyfunc(path: str) -> Student:
    """What MLflow calls with the folder that holds the checkpoint."""
    folder = Path(path)
    card = json.loads((folder / CARD).read_text(encoding="utf-8"))
    languages = tuple(card["languages"]) if card.get("languages") else None
    return Student(open_engine(folder, languages=languages), card["max_source_tokens"])


def _listed(sources: Any) -> list[str]:
    return [sources] if isinstance(sources, str) else [str(source) for source in sources]
