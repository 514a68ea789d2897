"""Configuration of runs and sweeps: models, search spaces, presets, and the loading of YAML files."""
