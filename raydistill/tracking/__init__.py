"""MLflow store, runs and registry; the export of a student and its model card."""
