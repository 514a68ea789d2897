"""Ray jobs: pseudo-labels and teacher caches on Ray Data, training runs on Ray Train."""
