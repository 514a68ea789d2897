"""Distil a large fine-tuned encoder-decoder into the best small student for a budget, on Ray.

`sweep`, `train`, `pseudolabel`, `evaluate`, `choose` and `status` are functions that do what the commands of these
names do. Each is defined in the command's module and imported at its first use, so that `--help` and a mistyped command
are answered at once.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from raydistill.choose import choose as choose
    from raydistill.evaluate import evaluate as evaluate
    from raydistill.pseudolabel import pseudolabel as pseudolabel
    from raydistill.status import status as status
    from raydistill.sweep import sweep as sweep
    from raydistill.train import train as train

__version__ = "0.1.0"
__all__ = ["choose", "evaluate", "pseudolabel", "status", "sweep", "train"]


class _Package(ModuleType):
    """The package, whose functions are not replaced by the modules of the same names."""

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system sets an imported submodule as an attribute of its package.
        if name in __all__ and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{name}"), name)


sys.modules[__name__].__class__ = _Package
