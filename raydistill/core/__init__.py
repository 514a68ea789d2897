"""Files, paths, errors, console output and secrets: no machine learning."""
