"""Distil a large fine-tuned encoder-decoder into the best small student for a budget, on Ray.

Nothing is imported here, so that `--help` and a mistyped command are answered at once.
"""

__version__ = "0.1.0"
