"""The contract of a metric, and metrics of users, `module:function`.

A metric turns rows of texts into statistics per row. The corpus score is the mean of [rows], or a function of the sums
of [rows, statistics]. A bootstrap resamples the statistics, so that no text is scored twice, and so that results are
read without the code of a user.
"""

import hashlib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import ModuleType
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from raydistill.core.errors import UserError

WORKING_DIR_ENV = "RAYDISTILL_WORKING_DIR"  # the directory of the command, for processes that run in another


class ScoredText(NamedTuple):
    """A row to score. `source` is empty where only labels are compared."""

    source: str
    prediction: str
    reference: str


# A user's metric: from rows to a number for each row, whose mean is the corpus score, or to two numbers for each row,
# a numerator and a denominator, whose sums are divided.
RowFunction = Callable[[Sequence[ScoredText]], ArrayLike]


@dataclass(frozen=True)
class Metric:
    """A metric of texts; a higher score is better.

    Attributes:
        row_statistics: From rows to a number for each row, [rows], or to statistics of each row, [rows, statistics].
        signature: Returns settings and versions behind the score, without spaces.
        library: The package that the metric needs; None if it needs none.
        corpus_scores: From sums of statistics over the rows of each sample, float64 [samples, statistics], to the
            corpus scores, [samples]. None if the score is the mean of a number for each row.
    """

    row_statistics: RowFunction
    signature: Callable[[], str]
    library: str | None = None
    corpus_scores: Callable[[np.ndarray], np.ndarray] | None = None


def ratio_of_sums(sums: np.ndarray) -> np.ndarray:
    """Return the quotient, [samples], of summed numerators and denominators [samples, 2]; 0 for a denominator of 0."""
    numerators, denominators = sums[:, 0], sums[:, 1]
    return np.divide(numerators, denominators, out=np.zeros(len(sums)), where=denominators != 0)


@lru_cache(32)
def load_own_metric(name: str) -> Metric:
    """Import a user's metric, `module:function`. Call this for names that the user wrote, never for names in a record.

    The module is imported from the installed packages, PYTHONPATH or the directory of the command.

    Raises:
        UserError: The module cannot be imported, or has no such function.
    """
    module_name, _, attribute = name.partition(":")
    directory = os.environ.get(WORKING_DIR_ENV) or os.getcwd()
    if directory not in sys.path:
        sys.path.append(directory)  # at the end, so that no file of the user hides an installed package
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"metric {name}: the module {module_name} cannot be imported ({type(error).__name__}: {error}). It has to "
            f"be installed, on PYTHONPATH or in {directory}, on every machine that scores texts"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        problem = "does not exist" if function is None else f"is no function but of type {type(function).__name__}"
        raise UserError(f"metric {name}: {attribute} of {module_name} {problem}")
    signature = f"{name}|source:{_source_hash(module)}"
    return Metric(lambda rows: _call(name, function, rows), lambda: signature, corpus_scores=ratio_of_sums)


def _call(name: str, function: RowFunction, rows: Sequence[ScoredText]) -> np.ndarray:
    """Return the statistics of a user's metric, float64 [rows] or [rows, 2].

    Raises:
        UserError: The function fails, its result has another shape, or a value is no finite number.
    """
    try:
        statistics = np.asarray(function(rows), dtype=np.float64)
    except Exception as error:
        raise UserError(f"metric {name} failed: {type(error).__name__}: {error}") from error
    if statistics.shape not in ((len(rows),), (len(rows), 2)):
        raise UserError(
            f"metric {name}: expected a number for each row, [{len(rows)}], or a numerator and a denominator for each "
            f"row, [{len(rows)}, 2]; the result has the shape {list(statistics.shape)}"
        )
    if not np.isfinite(statistics).all():
        row = int(np.argwhere(~np.isfinite(statistics))[0][0])
        raise UserError(f"metric {name}: the value of row {row} is not finite")
    return statistics


def _source_hash(module: ModuleType) -> str:
    """The first 8 hex digits of the SHA-256 of a module's source, so that a changed metric has another signature."""
    try:
        source = inspect.getsource(module)
    except (OSError, TypeError):
        return "unknown"
    return hashlib.sha256(source.encode()).hexdigest()[:8]
