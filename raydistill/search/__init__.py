"""The sweep: preparation, trials, Optuna study, early stopping, shape latency and finalists. Read `sweep` first."""
