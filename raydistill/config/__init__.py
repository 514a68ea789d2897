"""Floor 0: what a run is, which of its values may be distributions, the named teachers and data sets."""
