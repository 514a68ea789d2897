"""Where raydistill writes."""

import os
from pathlib import Path


def raydistill_home() -> Path:
    """The folder that holds all outputs: `$RAYDISTILL_HOME`, else `./outputs`."""
    return Path(os.environ.get("RAYDISTILL_HOME", "outputs")).absolute()
