"""An exported student as the Python interface returns it."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from raydistill.inference.mlflow_pyfunc import PyfuncStudent


@dataclass(frozen=True)
class ExportedStudent:
    """An exported student.

    Attributes:
        key: Key of the student in its sweep.
        label: The student for readers, such as "12-3 kd (trial 4, 2 beams)".
        folder: The export, which transformers, CTranslate2 and MLflow read.
    """

    key: str
    label: str
    folder: Path

    def load(self, device: str = "auto", threads: int | str = "auto") -> "PyfuncStudent":
        """Open the student as it was scored: its precision, beams and shortlist. `predict(texts)` returns the outputs.

        Args:
            device: "cpu" or "cuda"; by default a GPU if one is available.
            threads: CPU threads; by default the number with which latency was measured; "all" are all cores.
        """
        from raydistill.inference.mlflow_pyfunc import open_student

        return open_student(self.folder, device, threads)
