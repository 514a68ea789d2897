"""Distil a large fine-tuned encoder-decoder into the best small student for a budget, on Ray.

Nothing is imported here: a command must answer `--help` and a typing error at once.
"""

__version__ = "0.1.0"
